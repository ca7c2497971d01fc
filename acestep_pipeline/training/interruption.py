"""SIGTERM and SIGINT while training: finish the update, write a checkpoint, and leave with status 128 + signal."""

import ctypes
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import psutil
import torch
from accelerate import Accelerator

from ..errors import Interrupted
from .run_directory import describe_kept

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal, a launcher and a supervisor may each pass the same request on: what comes so soon is no second one.
SAME_REQUEST_S = 1.0


class Interruption:
    """From its making until `release()`, a signal is noted and no longer ends the process; a second one does.

    Make it in the main thread, on every process of a run.
    """

    def __init__(self) -> None:
        self.signal, self._since = 0, 0.0
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        _follow_launcher()

    def release(self) -> None:
        """Put the signals' former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agree(self, accelerator: Accelerator, sums: torch.Tensor) -> tuple[list[float], int]:
        """Add `sums` `[n]` up over all processes and, in the same collective, hear whether any of them got a signal.

        Returns:
            The sums, and the signal that every process stops for after this update; 0 if there was none.
        """
        noted = [float(self.signal == number) for number in SIGNALS]
        together = torch.cat([sums, torch.tensor(noted, device=sums.device)])
        *values, terminated, interrupted = accelerator.reduce(together, "sum").tolist()
        noted = (terminated, interrupted)
        return values, next((int(number) for number, count in zip(SIGNALS, noted, strict=True) if count), 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self._since = number, time.monotonic()
            if os.environ.get("LOCAL_RANK", "0") == "0":  # not print(), which a handler must not enter twice
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: stopping after this update; a second signal stops at once.\n".encode())
        elif time.monotonic() - self._since > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def interrupted(number: int, *, done: int, num_updates: int, output_dir: Path) -> Interrupted:
    """The end of a run that was asked to stop, with the command that continues it."""
    command = [sys.argv[0], *_without_resuming(sys.argv[1:]), "--resume_from_checkpoint", "latest"]
    return Interrupted(
        number,
        f"stopped by {signal.Signals(number).name} after update {done} of {num_updates}. {describe_kept(output_dir)} "
        f"Continue with the same launcher and: {shlex.join(command)}",
    )


def _follow_launcher() -> None:
    """Get SIGTERM when `accelerate launch` dies, which passes no signal on and would leave this process behind.

    prctl(PR_SET_PDEATHSIG), Linux only: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
    """
    parent = psutil.Process().parent()
    if sys.platform == "linux" and parent is not None and any("accelerate" in part for part in parent.cmdline()[:4]):
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))


def _without_resuming(arguments: list[str]) -> list[str]:
    """The command line without `--resume_from_checkpoint` and `--overwrite_output_dir`."""
    kept, before = [], ""
    for argument in arguments:
        dropped = argument.startswith(("--resume_from_checkpoint", "--overwrite_output_dir"))
        if not dropped and before != "--resume_from_checkpoint":
            kept.append(argument)
        before = argument
    return kept
