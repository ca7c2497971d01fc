"""The two kinds of failure a user sees, and how they become one sentence and an exit status."""

import contextlib
import errno
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

# How long a process waits for the launcher to end it because another one had the same error.
ALONE_AFTER_S = 3


class UsageError(Exception):
    """Wrong usage or input (exit status 2). The message names the file or flag, and the fix."""


class RunError(Exception):
    """The work itself failed (exit status 1). The message says what was kept and what to do next."""


@contextlib.contextmanager
def naming_failed_output(output: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that may not be written, into a sentence that names what was to be written.

    Raises:
        RunError: the disk is full.
        UsageError: `output` can't be made or written.
    """
    try:
        yield
    except Exception as error:  # pyarrow and safetensors have exceptions of their own
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise RunError(f"{output} can't be written: the disk is full; make room, and run this again.") from error
        named = getattr(error, "filename", None)
        if isinstance(named, str | bytes | Path) and Path(os.fsdecode(named)).is_relative_to(output):
            raise UsageError(f"{output} can't be written ({error.strerror}); choose another.") from error
        raise


class Interrupted(Exception):
    """A signal asked the work to stop, and it did so in order (exit status 128 + signal)."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


@contextlib.contextmanager
def one_sentence_errors(*, debug: bool = False) -> Iterator[None]:
    """Turn `UsageError` and `RunError` into one sentence on stderr and exit status 2 or 1, signals into 128 + signal;
    a reader of stdout that has gone (`| head`) ends the program without a word, as if by SIGPIPE. Warnings are lines.

    Every other exception is a defect of ours and keeps its traceback. With `debug` (or `ACESTEP_DEBUG=1`) these two
    keep theirs as well.
    """
    format_warning, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        yield
    except (UsageError, RunError) as error:
        if debug or os.environ.get("ACESTEP_DEBUG") == "1":
            raise
        traceback.clear_frames(error.__traceback__)  # lets go of an open progress bar, which ends its line
        rank, process = os.environ.get("LOCAL_RANK", "0"), os.environ.get("RANK", "0")
        # What is wrong for every process of a machine is said by its first, whose end makes the launcher end the
        # others. One that is still there after a while is alone with its error.
        if rank != "0":
            time.sleep(ALONE_AFTER_S)
        print("error: " if rank == "0" else f"error (process {process}): ", error, sep="", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except BrokenPipeError as gone:
        if gone.filename is not None or not _reader_is_gone():
            raise
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (Interrupted, KeyboardInterrupt) as stop:
        traceback.clear_frames(stop.__traceback__)
        if os.environ.get("RANK", "0") == "0":
            print(str(stop) or "stopped by SIGINT.", file=sys.stderr, flush=True)
        raise SystemExit(128 + getattr(stop, "signal", signal.SIGINT)) from None
    finally:
        warnings.formatwarning = format_warning


def _warning_line(message: Warning | str, category: type[Warning], *_: object) -> str:
    """A warning without the line of the source that it comes from, which says nothing to who runs a command."""
    return f"warning: {message}\n"


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads; if so, what is left of it is dropped."""
    poll, stdout = select.poll(), sys.__stdout__.fileno()
    poll.register(stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # Python flushes once more at its end, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
