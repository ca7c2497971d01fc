"""Bring what lies under an `s3://` address into a folder, checked and resumable.

A folder that was pulled remembers in `.ace-step-pull/index.json` which objects it holds, so the
next pull fetches only what changed and removes only what a pull brought.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ..data.text.text_files import one_line
from ..errors import RunError, UsageError
from ..files import remove_with_folders, sha256, write_text
from ..paths import cache_dir, check_addresses, check_room, probe_writable
from .hub_address import is_on_hub
from .release_manifest import MANIFEST_NAME
from .s3 import RemoteFile, open_client, parse_address, s3_errors, shown
from .s3_downloads import fetch, keep_unfinished
from .s3_listing import PULL_FOLDER, list_files
from .transfer_progress import Workers, counting, small_and_large

# Requests in flight: at ~10 ms for each, enough that small files don't wait for one another.
NUM_WORKERS = 8

_INDEX_INTERVAL_S = 2.0


def is_remote(location: str) -> bool:
    """Whether a location is an `s3://` address rather than a path."""
    return str(location).startswith("s3://")


def local_copy(
    location: str,
    *,
    choose: Callable[[list[str]], Iterable[str]] | None = None,
    num_workers: int = NUM_WORKERS,
    show_progress: bool = True,
) -> Path:
    """The folder that holds what is at a location: a path itself, or the copy of an `s3://` or `hf://` address, or of
    the latest release in a folder that was published to.

    The copy lies in `cache_dir()/s3/<bucket>/<prefix>`, of what is on the Hub in the Hub's cache, and is brought up to
    date by each call: all of it, or what `choose` takes of the files' names (relative to the address). Raises as
    `pull`, `hub.hub_copy` and `choose` do.
    """
    check_addresses(location)
    if is_on_hub(location):
        from .hub import hub_copy

        return hub_copy(location, choose=choose)
    if not is_remote(location):
        return _open_folder(Path(location).expanduser(), choose)
    bucket, folder = parse_address(location)
    root = cache_dir() / "s3" / bucket
    # One index for the bucket, so that copies of a folder and of a folder in it are the same files.
    _mirror(location, root, root_key="", choose=choose, num_workers=num_workers, show_progress=show_progress)
    return root / folder


def local_file(location: str | Path) -> Path:
    """A file of this machine: a path itself, or the copy in the cache, brought up to date, of a file at an `s3://` or
    `hf://` address. Raises as `local_copy`, and `UsageError` where no file has that address."""
    location = str(location)
    if not is_remote(location) and not is_on_hub(location):
        return Path(location).expanduser()
    above, _, name = location.rpartition("/")

    def choose(names: list[str]) -> list[str]:
        if name not in names:
            raise UsageError(
                f"{one_line(location)} is no file that is there; correct the name, or list what is there."
            )
        return [name]

    return local_copy(above, choose=choose, show_progress=False) / name


def _open_folder(folder: Path, choose: Callable[[list[str]], Iterable[str]] | None) -> Path:
    from .release_copy import copy_release, read_local_release

    manifest = read_local_release(folder)
    return folder if manifest is None else copy_release(folder, manifest, choose=choose)


def pull(url: str, directory: Path, *, num_workers: int = NUM_WORKERS, show_progress: bool = True) -> Path:
    """Make `directory` hold every object under `s3://bucket/prefix`, under its key without the prefix.

    Each file appears under its name when it is complete, its size right, and its checksums too: those that S3 sends
    with a whole object (CRC-32, SHA-1, SHA-256), and the MD5 that the ETag is unless the object is encrypted with a
    key of one's own. What earlier pulls of this address brought is not fetched again if its size and ETag are still
    those of the object, and is removed once the object is gone. Other files in `directory` are left alone. A pull
    that was stopped, even by kill -9, is continued by the next; processes that pull into one folder wait for one
    another. The server's empty "directory" objects (keys that end in /) are passed over.

    Args:
        url: `s3://bucket/prefix`, taken as a folder.
        directory: created if need be.
        num_workers: requests at a time.
        show_progress: draw a bar of bytes.

    Returns:
        `directory`.

    Raises:
        UsageError: boto3 or credentials are missing, the bucket can't be read or holds nothing there, a key is no
            safe file name, a file in `directory` is in the way, or there is no room.
        RunError: the transfer broke; what has arrived is kept.
    """
    bucket, folder = parse_address(url)
    _mirror(url, Path(directory), root_key=folder, num_workers=num_workers, show_progress=show_progress)
    return Path(directory)


def describe_objects(url: str) -> dict[str, str]:
    """What changes with the content of each file under an `s3://` address: its size and ETag, by its name.

    Raises:
        UsageError: it can't be read, or holds nothing.
    """
    with s3_errors(url):
        files = _list_some(open_client(1), url, parse_address(url)[1])
    return {name: f"{file.size} {file.etag}" for name, file in files.items()}


def _list_some(client: Any, url: str, root_key: str) -> dict[str, RemoteFile]:
    found = list_files(client, url, root_key)
    if not found:
        raise UsageError(f"{shown(url)} holds no files; name a folder of the bucket that does.")
    return found


def _mirror(
    url: str,
    root: Path,
    *,
    root_key: str,
    choose: Callable[[list[str]], Iterable[str]] | None = None,
    num_workers: int,
    show_progress: bool,
) -> None:
    """Make the objects under `url` files of `root`, where `root` stands for the key `root_key` ("" or ending in /)."""
    bucket, folder = parse_address(url)
    with s3_errors(url):
        client = open_client(num_workers)
        wanted = _list_some(client, url, root_key)
    with _pulling(root):
        index = _Index.read(root, f"s3://{bucket}/{root_key}")
        index.remove(name for name in index.files.keys() - wanted.keys() if name.startswith(folder[len(root_key) :]))
        if choose is not None:
            above = folder[len(root_key) :]
            chosen = set(choose([name.removeprefix(above) for name in wanted]))
            wanted = {name: file for name, file in wanted.items() if name.removeprefix(above) in chosen}
        todo = {name: file for name, file in wanted.items() if not index.holds(name, file)}
        if not todo:
            return
        _check_can_take(root, todo, index)
        index.files.update(dict.fromkeys(todo))
        index.write()
        with s3_errors(url):
            _fetch_all(client, bucket, todo, index, num_workers=num_workers, show_progress=show_progress)


# --- the folder and what it remembers --------------------------------------------------------------------------------


@contextlib.contextmanager
def _pulling(root: Path) -> Iterator[None]:
    """Alone with `root`, which can be written; what the file system refuses becomes one sentence."""
    from filelock import FileLock

    own = root / PULL_FOLDER
    with file_errors(root):
        own.mkdir(parents=True, exist_ok=True)  # first: the probe removes what it makes, under other processes' hands
        probe_writable(own)
        with FileLock(own / "lock"):
            for leftover in own.glob(".partial-*"):  # a killed write_text's
                shutil.rmtree(leftover, ignore_errors=True)
            (own / "partial").mkdir(exist_ok=True)
            try:
                keep_unfinished(own / "partial")
                yield
                shutil.rmtree(own / "partial", ignore_errors=True)
            finally:
                keep_unfinished(own / "partial")


@contextlib.contextmanager
def file_errors(root: Path, done: str = "written") -> Iterator[None]:
    """Turn what the file system refuses below `root` into one sentence: what can't be `done`."""
    try:
        yield
    except OSError as error:
        where = one_line(str(error.filename2 or error.filename or root))
        fix = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that, or name another folder"
        raise UsageError(f"{where} can't be {done} ({error.strerror or error}); {fix}.") from error


@dataclass
class _Index:
    """Which files of a folder came from where: name → the object, or None for one that was still on its way; and when,
    in seconds since 1970, they were last written to."""

    root: Path
    source: str
    files: dict[str, RemoteFile | None]
    written: dict[str, int]

    @classmethod
    def read(cls, root: Path, source: str) -> "_Index":
        path = root / PULL_FOLDER / "index.json"
        if not path.exists():
            return cls(root, source, {}, {})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            files = {name: entry and RemoteFile(**entry) for name, entry in content["files"].items()}
            known = str(content["source"])
            written = {str(name): int(seconds) for name, seconds in content.get("written", {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path} is damaged; delete the folder {root} and pull again.") from None
        if known != source:
            raise UsageError(f"{root} holds a copy of {one_line(known)}; name another folder for {one_line(source)}.")
        return cls(root, source, files, written)

    def write(self) -> None:
        files = {
            name: file and {"key": file.key, "size": file.size, "etag": file.etag} for name, file in self.files.items()
        }
        content = json.dumps({"source": self.source, "files": files, "written": self.written}, ensure_ascii=False)
        write_text(self.root / PULL_FOLDER / "index.json", content)

    def path(self, name: str) -> Path:
        """The file's path, which no symbolic link leads out of the folder."""
        path = self.root / name
        if not path.parent.resolve().is_relative_to(self.root.resolve()):
            raise UsageError(f"{one_line(str(path.parent))} leads out of {self.root}; remove the link.")
        return path

    def holds(self, name: str, file: RemoteFile) -> bool:
        """Whether a file is what was fetched: nothing else has written to it."""
        path = self.root / name
        if self.files.get(name) != file or not path.is_file():
            return False
        status = path.stat()
        return status.st_size == file.size and self.written.get(name) in (None, int(status.st_mtime))

    def add(self, name: str, file: RemoteFile) -> None:
        """A file has arrived under its name."""
        self.files[name], self.written[name] = file, int((self.root / name).stat().st_mtime)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files whose objects are gone, and folders that are empty then."""
        names = list(names)
        for name in names:
            remove_with_folders(self.path(name), depth=len(PurePath(name).parts) - 1)
            del self.files[name]
            self.written.pop(name, None)
        if names:
            self.write()


def _check_can_take(root: Path, todo: dict[str, RemoteFile], index: _Index) -> None:
    for name in todo:
        if name not in index.files and os.path.lexists(index.path(name)):
            raise UsageError(f"{one_line(str(root / name))} is in the way and not from a pull; name another folder.")
    check_room(root, sum(file.size for file in todo.values()))


# --- transfer --------------------------------------------------------------------------------------------------------


def _fetch_all(
    client: Any, bucket: str, todo: dict[str, RemoteFile], index: _Index, *, num_workers: int, show_progress: bool
) -> None:
    total = sum(file.size for file in todo.values())
    with counting(total, "Downloading", show_progress=show_progress) as count:

        def place(name: str, workers: Workers) -> str:
            partial = index.root / PULL_FOLDER / "partial" / hashlib.sha256(name.encode()).hexdigest()
            file = todo[name]
            arrived = fetch(client, bucket, file, partial, workers=workers, count=count)
            if file.sha256 not in (None, arrived) and sha256(partial) != file.sha256:
                partial.unlink()
                raise RunError(
                    f"the content of {one_line(name)} is damaged (another SHA-256 than its {MANIFEST_NAME} gives); "
                    "publish it again."
                )
            path = index.path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, path)
            return name

        written = time.monotonic()
        try:
            for name in small_and_large(place, todo, lambda name: todo[name].size, num_workers=num_workers):
                index.add(name, todo[name])
                if time.monotonic() - written > _INDEX_INTERVAL_S:
                    index.write()
                    written = time.monotonic()
        finally:
            index.write()
