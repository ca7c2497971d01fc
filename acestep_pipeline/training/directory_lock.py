"""One run at a time in an output directory: a second one would remove or replace what the first has made."""

import contextlib
import fcntl
import os
import time
import weakref
from pathlib import Path

from ..errors import RunError, UsageError

# A run that was just told to stop may still be writing its checkpoint.
PATIENCE_S = 5.0

_HELD: "weakref.WeakValueDictionary[Path, HeldDirectory]" = weakref.WeakValueDictionary()


class HeldDirectory:
    """A lock on a directory itself, so that no file is left: it ends with this object, and with the process however
    that ends. Where the file system knows no locks, there is none."""

    def __init__(self, directory: Path, *, shared: bool = False) -> None:
        self._descriptor: int | None = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    self.release()
                    raise UsageError(
                        f"--output_dir {directory} is in use by another run, which has not ended; wait for it or "
                        "stop it, or name another directory."
                    ) from None
                time.sleep(0.1)
            except OSError:
                return

    def release(self) -> None:
        """Let go of it, once."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # there is no such directory
            self.release()


def hold_directory(directory: Path) -> HeldDirectory:
    """Make an output directory, if need be, and hold it as long as the returned object lives.

    What an earlier run of this process holds there, whose objects something still keeps, is let go of.

    Raises:
        UsageError: another process has a run there.
        RunError: it can't be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{directory} can't be made ({error.strerror}); make room, and run this again.") from error
    _release(directory)
    held = _HELD[directory.resolve()] = HeldDirectory(directory)
    return held


def check_not_held(directory: Path) -> None:
    """Refuse a directory where another process has a run.

    Raises:
        UsageError: one has.
    """
    _release(directory)
    with contextlib.suppress(FileNotFoundError):
        HeldDirectory(directory, shared=True).release()


def _release(directory: Path) -> None:
    if earlier := _HELD.pop(directory.resolve(), None):
        earlier.release()
