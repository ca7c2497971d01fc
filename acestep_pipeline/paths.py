"""Places on disk outside a run's own output directory, and what can be learnt about a place without leaving a trace."""

import os
import shutil
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """The project's cache directory: `ACESTEP_CACHE_DIR`, else `~/.cache/acestep-lora`. It may not exist yet."""
    return Path(os.environ.get("ACESTEP_CACHE_DIR") or "~/.cache/acestep-lora").expanduser()


def free_space_bytes(directory: Path) -> int:
    """Free bytes, for this user, on the file system that holds `directory` or would hold it once created."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def probe_writable(directory: Path) -> None:
    """Create `directory` if need be, write a file in it, and remove whatever this call created.

    Raises `OSError` when any of it can't be done: not a directory, no permission, read-only, no space left.
    """
    created: list[Path] = []
    try:
        for ancestor in [*reversed(directory.absolute().parents), directory.absolute()]:
            if not ancestor.is_dir():
                ancestor.mkdir()
                created.append(ancestor)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())  # a full disk may only show now
    finally:
        for ancestor in reversed(created):
            try:
                ancestor.rmdir()
            except OSError:
                break  # somebody else put something there meanwhile: it is theirs now
