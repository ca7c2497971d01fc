"""Writing files so that a finished name is a finished file, readable by whoever may read its neighbours."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import UsageError
from .paths import cache_dir


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under a temporary name in a folder beside it, then rename it to `path`.

    The file gets the permissions that the umask gives to new files (safetensors alone would make it private). An
    `OSError` names `path`: a full disk is noticed by writes that know of no name.
    """
    path = Path(path)
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".partial-{path.name}-", dir=path.parent))
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def is_taken(directory: Path) -> bool:
    """Whether something lies where a new folder is to be written: a file, or a folder that is not empty."""
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


@contextlib.contextmanager
def replacing_directory(directory: Path) -> Iterator[Callable[[], contextlib.AbstractContextManager[Path]]]:
    """Hold `directory` for one writer, who may put a new one in its place.

    Yields a function that makes a context: a new, empty folder beside `directory` that takes its name when the
    context ends without an error. A writer that was killed leaves such a folder (and perhaps the old directory in it);
    the next one, on the same machine and cache directory, puts things right and removes it.

    Raises:
        UsageError: another process holds the directory.
    """
    from filelock import FileLock, Timeout

    directory = directory.absolute()
    partial = directory.with_name(f".partial-{directory.name}")
    locks = cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:32]
    try:
        with FileLock(locks / f"{name}.lock", timeout=0):
            _clean_up(partial, directory)
            yield lambda: _replacement(partial, directory)
    except Timeout:
        raise UsageError(f"{directory} is being written by another process; wait for it to end.") from None


def _clean_up(partial: Path, directory: Path) -> None:
    if (partial / "old").exists() and not directory.exists():
        os.replace(partial / "old", directory)
    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _replacement(partial: Path, directory: Path) -> Iterator[Path]:
    new = partial / "new"
    new.mkdir(parents=True)
    try:
        yield new
        if directory.exists():
            os.replace(directory, partial / "old")
        os.replace(new, directory)
        shutil.rmtree(partial, ignore_errors=True)
    finally:
        _clean_up(partial, directory)


def flush_to_disk(path: Path) -> None:
    """Have a file's content, or a directory's names, written to disk: a rename alone survives no power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file  # torch, which callers that only write text should not wait for

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata=metadata)
        sort_metadata(temporary)

    write_atomically(path, write)


def sort_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors header, in place, so that equal content makes equal bytes.

    The library writes it in another order each time. Layout: 8 bytes of little-endian length, then that much JSON,
    padded with spaces, then the tensors (the safetensors format's specification).
    """
    with Path(path).open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:  # the same JSON, as compact as it can be, has no way to grow
            raise AssertionError(f"{path}: the header grew from {length} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(length))


def remove_with_folders(path: Path, *, depth: int) -> None:
    """Remove a file, if it is there, and of the `depth` folders around it those that are empty then."""
    path.unlink(missing_ok=True)
    for parent in list(path.parents)[:depth]:
        try:
            parent.rmdir()
        except OSError:
            break  # something else is in it, or it went with another file
