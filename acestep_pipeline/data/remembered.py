"""What reading something that lies elsewhere has told, remembered in the cache folder, so that a later run needn't."""

import hashlib
import json
from collections.abc import Callable
from typing import TypeVar

from ..files import write_text
from ..paths import cache_dir
from ..storage.copies import file_errors

# Raise when what is read, or how it is kept, changes.
VERSION = 1

Told = TypeVar("Told")


def remembered(kind: str, key: list, read: Callable[[], dict], parse: Callable[[dict], Told]) -> Told:
    """What is remembered under a key, or else is read now, once for all processes of this machine.

    Args:
        kind: the name of the folder in the cache folder.
        key: JSON that changes whenever what is read does: an address, a file's name, its size and tag.
        read: gives what is kept, as JSON.
        parse: makes the result of it; it raises `ValueError`, `KeyError` or `TypeError` for what is damaged, which is
            then read again.

    Raises as `read`, and `UsageError` where the cache folder can't be written.
    """
    from filelock import FileLock

    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    folder = cache_dir() / f"{kind}-v{VERSION}" / name[:2]
    path = folder / f"{name}.json"

    def recall() -> Told | None:
        try:
            return parse(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or damaged

    told = recall()
    if told is None:
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / "lock")
        with lock:
            told = recall()
            if told is None:
                content = read()
                told = parse(content)
                with file_errors(folder):
                    write_text(path, json.dumps(content))
    return told
