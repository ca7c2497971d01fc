"""Releases kept in a folder: keys below it, as below a prefix on S3 (`stores`)."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..data.text.text_files import one_line
from ..errors import RunError, UsageError
from ..files import flush_to_disk
from .copies import file_errors
from .release_manifest import MAX_MANIFEST_BYTES
from .transfer_progress import Workers

BLOCK_BYTES = 1 << 20
_LOCK_NAME = ".lock"
_PARTIAL_PREFIX = ".partial-"


@dataclass(frozen=True)
class Stored:
    """What lies under a key: size in bytes, a tag that changes with the content, seconds since 1970 when written."""

    key: str
    size: int
    etag: str
    modified: float

    @classmethod
    def of_file(cls, key: str, status: os.stat_result) -> "Stored":
        return cls(key, status.st_size, f"{status.st_ino}-{status.st_mtime_ns}", status.st_mtime)


class FolderStore:
    """Keys below a folder. Conditional writes take a file lock: the file system must have these on all its machines.

    Every method raises `UsageError` for what the file system refuses.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.url = str(self.root)

    def list_keys(self, prefix: str = "") -> list[Stored]:
        found = []
        start = self.root / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(start):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and name != _LOCK_NAME and not name.startswith(_PARTIAL_PREFIX):
                    with contextlib.suppress(FileNotFoundError):  # gc works at the same time
                        found.append(Stored.of_file(key, path.stat()))
        return sorted(found, key=lambda stored: stored.key)

    def list_level(self, prefix: str) -> tuple[list[str], list[str]]:
        folder = self.root / prefix
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        keys = [prefix + path.name for path in entries if path.is_file() and path.name != _LOCK_NAME]
        return keys, [f"{prefix}{path.name}/" for path in entries if path.is_dir() and not path.is_symlink()]

    def read(self, key: str, *, max_bytes: int) -> tuple[bytes, str] | None:
        with self._errors("read"):
            try:
                with (self.root / key).open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    data = file.read(size) if size <= max_bytes else None  # read() would set its limit aside at once
            except (FileNotFoundError, NotADirectoryError):
                return None
        if data is None:
            raise UsageError(f"{one_line(self.url)}/{key} is larger than {max_bytes} bytes.")
        return data, hashlib.sha256(data).hexdigest()

    def write(self, key: str, data: bytes, *, replaces: str | None) -> bool:
        from filelock import FileLock

        path = self.root / key
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / _LOCK_NAME):
                there = self.read(key, max_bytes=MAX_MANIFEST_BYTES)
                if (there and there[1]) != replaces:
                    return False
                temporary = path.with_name(f"{_PARTIAL_PREFIX}{uuid.uuid4().hex}")
                temporary.write_bytes(data)
                flush_to_disk(temporary)
                os.replace(temporary, path)
                flush_to_disk(path.parent)
        return True

    def check_conditional_writes(self) -> None:
        """They hold wherever file locks do."""

    def put(
        self, path: Path, key: str, *, size: int, sha256: str, count: Callable[[int], None], workers: Workers
    ) -> None:
        target = self.root / key
        temporary = target.with_name(f"{_PARTIAL_PREFIX}{uuid.uuid4().hex}")
        with self._errors():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("rb") as source, temporary.open("wb") as sink:
                    found = digest(_blocks(source), count, sink)
                if found != sha256:
                    raise RunError(f"{one_line(str(path))} changed while it was copied; nothing was published.")
                flush_to_disk(temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)

    def fetch(self, stored: Stored, path: Path, *, count: Callable[[int], None], workers: Workers) -> str | None:
        with self._errors(), (self.root / stored.key).open("rb") as source, path.open("wb") as sink:
            return digest(_blocks(source, stored.size), count, sink)

    def hash(self, key: str, *, size: int, count: Callable[[int], None]) -> str | None:
        with self._errors("read"):
            try:
                if (self.root / key).stat().st_size != size:
                    return None
                with (self.root / key).open("rb") as file:
                    return digest(_blocks(file), count)
            except FileNotFoundError:
                return None

    def delete(self, keys: Iterable[str]) -> None:
        with self._errors():
            for key in keys:
                (self.root / key).unlink(missing_ok=True)

    def unfinished(self, prefix: str) -> list[Stored]:
        return [
            Stored.of_file(path.relative_to(self.root).as_posix(), path.stat())
            for path in (self.root / prefix).rglob(f"{_PARTIAL_PREFIX}*")
        ]

    def give_up(self, uploads: Iterable[Stored]) -> None:
        self.delete(each.key for each in uploads)

    @contextlib.contextmanager
    def _errors(self, done: str = "written") -> Iterator[None]:
        with file_errors(self.root, done):
            yield


def _blocks(file: BinaryIO, size: int | None = None) -> Iterator[bytes]:
    """A file's content, or its first `size` bytes."""
    while (size is None or size > 0) and (block := file.read(BLOCK_BYTES if size is None else min(size, BLOCK_BYTES))):
        size = None if size is None else size - len(block)
        yield block


def digest(blocks: Iterable[bytes], count: Callable[[int], None], sink: BinaryIO | None = None) -> str:
    """The SHA-256 of blocks, which are written to `sink` as well."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
        if sink is not None:
            sink.write(block)
        count(len(block))
    return digest.hexdigest()
