"""Files that are looked at once: one whose content was found right is not read again until something writes to it."""

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

from ..engines import map_in_order
from ..files import write_text
from ..paths import cache_dir

# Hashing files beside each other: enough for a disk, and Python's lock is released meanwhile.
_NUM_WORKERS = 4


def find_damaged(paths: Iterable[Path], is_right: Callable[[Path], bool]) -> list[Path]:
    """Those of the files whose content is not what it should be.

    What was right is remembered by size and time in the project's cache, where that can be written.
    """
    record = cache_dir() / "checked-files.json"
    known = _read(record)
    stamps = {path: _stamp(path) for path in paths}
    todo = [path for path, stamp in stamps.items() if known.get(str(path)) != stamp]
    right = dict(zip(todo, map_in_order(is_right, todo, num_workers=_NUM_WORKERS), strict=True))
    new = {str(path): stamps[path] for path, is_so in right.items() if is_so}
    if new:
        with contextlib.suppress(OSError):  # a cache that can't be written costs the time to look again
            record.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(record.with_suffix(".lock")):
                there = {path: stamp for path, stamp in _read(record).items() if Path(path).is_file()}
                write_text(record, json.dumps(there | new, indent=1))
    return [path for path, is_so in right.items() if not is_so]


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read(record: Path) -> dict[str, list[int]]:
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
