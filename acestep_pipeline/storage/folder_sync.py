"""Make one place hold the files of another under their plain names, as `aws s3 sync` does: only what differs travels.

A place is a folder or an `s3://` address. A release (`publishing`) may be what is read: its files count under their
names. It can't be written to: releases are pushed.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..data.text.text_files import one_line
from ..engines import map_in_order
from ..errors import RunError, UsageError
from ..files import remove_with_folders, sha256
from ..paths import check_room, probe_writable
from .copies import NUM_WORKERS, file_errors, is_remote
from .folder_store import FolderStore, Stored
from .publishing import read_latest
from .release_manifest import CONTENT_FOLDER, MANIFEST_NAME, check_names
from .release_pull import fetch_checked
from .s3 import RemoteFile, s3_errors, shown
from .s3_checksums import has_etag
from .s3_downloads import keep_unfinished
from .s3_listing import PULL_FOLDER
from .stores import Store, open_store
from .transfer_progress import UNCOUNTED, ByteCount, Workers, counting, small_and_large

# Holds, in a folder that is being written, what is on its way; gone when all has arrived.
SYNC_FOLDER, ARRIVING = ".ace-step-sync", "arriving"
_OWN_FOLDERS = {PULL_FOLDER, SYNC_FOLDER}
# What `files.write_atomically` and a FolderStore call what is half-written.
_HALF_WRITTEN = ".partial-"
_CONTENT_KEY = re.compile(rf"{CONTENT_FOLDER}/[0-9a-f]{{64}}")
# How much younger than the local file an object must be to be taken for a copy of it: a server's Date is in seconds.
_DATE_S = 2.0
# What a time may lose on its way through a float.
_FLOAT_S = 1e-5


@dataclass(frozen=True)
class SyncReport:
    """What a sync did or would do: the files that travelled, those that were removed, how many were right."""

    sent: tuple[str, ...]
    removed: tuple[str, ...]
    num_unchanged: int
    sent_bytes: int


@dataclass(frozen=True)
class Side:
    """A place and its files by name; of a release, the content's keys, and the manifest's entries in `hashes`."""

    store: Store
    files: dict[str, Stored]
    hashes: dict = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        return isinstance(self.store, FolderStore)

    def path(self, name: str) -> Path:
        """The path of a file of a folder, which no symbolic link leads out of the folder."""
        path = self.store.root / name
        if not path.parent.resolve().is_relative_to(self.store.root.resolve()):
            raise UsageError(f"{one_line(str(path.parent))} leads out of {self.store.root}; remove the link.")
        return path


def sync_folder(
    source: str,
    target: str,
    *,
    delete: bool = False,
    dry_run: bool = False,
    compare_content: bool = False,
    num_workers: int = NUM_WORKERS,
    show_progress: bool = True,
    max_bytes_per_s: float | None = None,
) -> SyncReport:
    """Make `target` hold the files of `source`.

    A file is left alone if the one there has its size and, by the times, is a copy of it: a file that a sync fetched
    has the time of the object, and one that was sent is older than the object, by the server's clock. Where the times
    don't tell, checksums do: S3's ETag, a release's SHA-256. Each file appears whole or not at all.

    Args:
        delete: remove files that are not in `source`.
        dry_run: change nothing.
        compare_content: compare checksums of all files of equal size.
        num_workers: requests at a time.
        show_progress: draw a bar of bytes.
        max_bytes_per_s: limit of the rate, of all requests together.

    Raises:
        UsageError: nothing is in `source`, a name is not safe, `target` holds a release, one lies within the other,
            there is no room, or S3 or the file system refuses.
        RunError: the connection broke, or a file changed meanwhile; what has arrived is kept.
    """
    check_apart(source, target)
    origin, goal = look(source, num_workers=num_workers), look(target, num_workers=num_workers)
    if not origin.files:
        raise UsageError(f"{shown(source)} holds no files; name a folder that does.")
    check_names(origin.files, shown(source), may_hold_manifest=True)
    if goal.hashes:
        raise UsageError(f"{shown(target)} holds releases; add one with `acestep-lora storage push`.")
    # The manifest last: it says of the others that they are there.
    todo = sorted(_what_differs(origin, goal, compare_content), key=lambda name: name == MANIFEST_NAME)
    surplus = sorted(goal.files.keys() - origin.files.keys()) if delete else []
    size = sum(origin.files[name].size for name in todo)
    if not dry_run and todo:
        with (
            receiving(goal, size),
            counting(size, "Syncing", show_progress=show_progress, max_bytes_per_s=max_bytes_per_s) as count,
        ):

            def move(name: str, workers: Workers) -> None:
                _move(origin, goal, name, count=count, workers=workers)

            for part in (todo[:-1], todo[-1:]) if todo[-1] == MANIFEST_NAME else (todo,):
                for _ in small_and_large(move, part, lambda name: origin.files[name].size, num_workers=num_workers):
                    pass
    if not dry_run and surplus:
        remove_files(goal, surplus, num_workers)
    return SyncReport(tuple(sorted(todo)), tuple(surplus), len(origin.files) - len(todo), size)


def check_apart(source: str, target: str) -> None:
    """Refuse a place within the other: what is written would be read again."""
    places = [
        each.rstrip("/") if is_remote(each) else str(Path(each).expanduser().resolve()) for each in (source, target)
    ]
    if any(f"{one}/".startswith(f"{other}/") for one, other in (places, places[::-1])):
        raise UsageError(f"{shown(source)} and {shown(target)} lie one within the other; name two places.")


# --- what is there ---------------------------------------------------------------------------------------------------


def look(address: str, *, num_workers: int = NUM_WORKERS) -> Side:
    """A place and its files; none where there is nothing.

    Raises:
        UsageError: it can't be read, or a folder holds a link to a folder, or something that is no file.
    """
    store = open_store(address, num_workers=num_workers)
    if isinstance(store, FolderStore):
        with file_errors(store.root, "read"):
            files = dict(_local_files(store.root, "")) if store.root.is_dir() else {}
    else:
        files = {stored.key: stored for stored in store.list_keys() if not _is_passed_over(stored)}
    if MANIFEST_NAME in files and any(_CONTENT_KEY.fullmatch(name) for name in files):
        latest = read_latest(store)
        if latest is not None and latest[0].content is not None:
            hashes = {file.file: file for file in latest[0].files}
            named = {name: files.get(latest[0].key(file)) for name, file in hashes.items()}
            if lacking := [name for name, stored in named.items() if stored is None]:
                raise RunError(f"{shown(address)}: the content of {one_line(lacking[0])} is missing; push it again.")
            return Side(store, named, hashes)
    return Side(store, files)


def _is_passed_over(stored: Stored) -> bool:
    """The server's "directory" objects, and what our own transfers keep beside the files."""
    if stored.key == "" or (stored.key.endswith("/") and not stored.size):
        return True
    return not _OWN_FOLDERS.isdisjoint(stored.key.split("/"))


def _local_files(folder: Path, prefix: str) -> Iterator[tuple[str, Stored]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = prefix + entry.name
            if entry.name in _OWN_FOLDERS or entry.name.startswith(_HALF_WRITTEN):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _local_files(Path(entry.path), f"{name}/")
            elif entry.is_file():
                yield name, Stored.of_file(name, entry.stat())
            else:
                raise UsageError(
                    f"{one_line(entry.path)} is no file (a link to a folder or to nothing, or a device); remove it."
                )


# --- what differs ----------------------------------------------------------------------------------------------------


def _what_differs(origin: Side, goal: Side, compare_content: bool) -> list[str]:
    told = {name: _by_times(origin, goal, name, compare_content) for name in origin.files}
    unsure = [name for name, same in told.items() if same is None]
    if unsure:
        compared = map_in_order(lambda name: _by_content(origin, goal, name), unsure, num_workers=4)
        told.update(zip(unsure, compared, strict=True))
    return [name for name, same in told.items() if not same]


def _by_times(origin: Side, goal: Side, name: str, compare_content: bool) -> bool | None:
    """Whether `goal` has this file of `origin` already, by sizes and times; None where they don't tell."""
    here, there = origin.files[name], goal.files.get(name)
    if there is None or here.size != there.size:
        return False
    if compare_content or name in origin.hashes:
        return None
    if origin.is_local and goal.is_local:
        is_copy = abs(here.modified - there.modified) < _FLOAT_S
    elif goal.is_local:  # in whole seconds, as the AWS CLI sets it, a file that is written hardly ever gets its time
        is_copy = min(abs(there.modified - time) for time in (here.modified, int(here.modified))) < _FLOAT_S
    elif origin.is_local:
        is_copy = here.modified + goal.store.clock_ahead_s + _DATE_S < there.modified
    else:
        is_copy = here.etag == there.etag
    return is_copy or None


def _by_content(origin: Side, goal: Side, name: str) -> bool:
    """Whether the two files of equal size have one checksum."""
    here, there = origin.files[name], goal.files[name]
    with file_errors(Path(name), "read"):
        if name in origin.hashes and goal.is_local:
            return sha256(goal.path(name)) == origin.hashes[name].sha256
        if origin.is_local and goal.is_local:
            return sha256(origin.path(name)) == sha256(goal.path(name))
        if not origin.is_local and not goal.is_local:
            return here.etag == there.etag
        path, store, stored = (
            (origin.path(here.key), goal.store, there) if origin.is_local else (goal.path(name), origin.store, here)
        )
        with s3_errors(store.url):
            remote = RemoteFile(store.folder + stored.key, stored.size, stored.etag)
            return has_etag(store.client, store.bucket, remote, path) is True


# --- transfer --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def receiving(goal: Side, size: int) -> Iterator[None]:
    """Alone with a folder that is written, which has room for so many bytes."""
    if not goal.is_local:
        yield
        return
    from filelock import FileLock, Timeout

    root = goal.store.root
    with file_errors(root):
        probe_writable(root)
        check_room(root, size)
        own = root / SYNC_FOLDER
        if own.is_symlink():
            raise UsageError(f"{one_line(str(own))} is a link; remove it.")
        own.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(own / "lock", timeout=0):
                if (own / ARRIVING).is_symlink():
                    raise UsageError(f"{one_line(str(own / ARRIVING))} is a link; remove it.")
                (own / ARRIVING).mkdir(exist_ok=True)
                keep_unfinished(own / ARRIVING)
                try:
                    yield
                finally:
                    keep_unfinished(own / ARRIVING)
        except Timeout:
            raise UsageError(f"{one_line(str(root))} is being written by another sync; wait for it.") from None
        shutil.rmtree(own, ignore_errors=True)


def _move(origin: Side, goal: Side, name: str, *, count: ByteCount, workers: Workers) -> None:
    stored = origin.files[name]
    if goal.is_local:
        partial = goal.store.root / SYNC_FOLDER / ARRIVING / hashlib.sha256(name.encode()).hexdigest()
        _fetch(origin, name, partial, count=count, workers=workers)
        modified = stored.modified
        if not origin.is_local and modified > origin.store.listed_at - _DATE_S:
            modified -= 1  # it may change again within its second: by this time, the next sync compares checksums
        os.utime(partial, (modified, modified))
        path = goal.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, path)
    elif origin.is_local:
        path = origin.path(stored.key)  # of a release, its content
        with file_errors(path, "read"):
            goal.store.put(path, name, size=stored.size, sha256=None, count=count, workers=workers)
            if Stored.of_file(stored.key, path.stat()) != stored:
                raise RunError(f"{one_line(str(path))} changed while it was sent; run it again.")
    else:
        with tempfile.TemporaryDirectory(prefix="ace-step-") as folder, file_errors(Path(folder)):
            partial = Path(folder, "file")
            _fetch(origin, name, partial, count=UNCOUNTED, workers=workers)
            goal.store.put(partial, name, size=stored.size, sha256=None, count=count, workers=workers)


def _fetch(origin: Side, name: str, path: Path, *, count: ByteCount, workers: Workers) -> None:
    stored = origin.files[name]
    if name in origin.hashes:
        fetch_checked(origin.store, stored, origin.hashes[name], path, count=count, workers=workers)
    else:
        origin.store.fetch(stored, path, count=count, workers=workers)


def remove_files(goal: Side, names: list[str], num_workers: int) -> None:
    """Remove files of a place, and the folders that are empty then."""
    if not goal.is_local:
        for _ in map_in_order(lambda name: goal.store.delete([name]), names, num_workers=num_workers):
            pass
        return
    with file_errors(goal.store.root, "removed"):
        for name in names:
            remove_with_folders(goal.path(name), depth=len(PurePosixPath(name).parts) - 1)
