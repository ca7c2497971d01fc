"""Bring a release into a folder: under a temporary name, each file checked by its SHA-256, then renamed as a whole."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..data.text.text_files import one_line
from ..errors import RunError, UsageError
from ..files import flush_to_disk, sha256
from ..paths import check_room, probe_writable
from .copies import NUM_WORKERS, file_errors
from .folder_store import Stored
from .publishing import find_release
from .release_manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, ManifestFile, parse_manifest
from .s3 import shown
from .s3_downloads import keep_unfinished
from .stores import Store, open_store
from .transfer_progress import ByteCount, Workers, counting, small_and_large

# Below the temporary folder: what is complete and checked, under its final name; what is on its way; what was there.
_DONE, _ARRIVING, _OLD = "new", "arriving", "old"
# How often content that arrives with another SHA-256 is fetched before it is taken for damaged.
_ATTEMPTS = 3


def pull_release(
    address: str,
    directory: Path,
    *,
    version: str | None = None,
    force: bool = False,
    choose: Callable[[str], bool] | None = None,
    num_workers: int = NUM_WORKERS,
    show_progress: bool = True,
    max_bytes_per_s: float | None = None,
) -> tuple[Manifest, int]:
    """Make `directory` hold a release and its manifest.

    It gets its name when every file in it has the size and the SHA-256 that the manifest gives. Until then the files
    are in `.partial-<name>` beside it, and a pull that follows one that was cut takes those that are right from
    there, as well as from a folder that it replaces.

    Args:
        address: `s3://bucket/name` or a folder that was published to.
        directory: new or empty, or with this release already; its parents are created.
        version: a version's tag or a release's number; None for the latest.
        force: replace a folder that holds another release, or a changed one. One with files that are no release's
            is not replaced.
        choose: which of the release's files; all without it.
        num_workers: requests at a time.
        show_progress: draw a bar of bytes.
        max_bytes_per_s: limit of the rate, of all requests together.

    Returns:
        The manifest, and the bytes that were fetched.

    Raises:
        UsageError: no such release, a manifest with unsafe names, a folder that is in the way, no room, or S3 refuses.
        RunError: what is stored is damaged, or the connection broke; what has arrived is kept.
    """
    from filelock import FileLock, Timeout

    store = open_store(address, num_workers=num_workers)
    manifest = find_release(store, version)
    if choose is not None:
        manifest = dataclasses.replace(manifest, files=tuple(file for file in manifest.files if choose(file.file)))
    directory = Path(directory).expanduser().absolute()
    with file_errors(directory):
        if _is_complete(directory, manifest):
            return manifest, 0
        _check_replaceable(directory, manifest, force)
        partial = directory.with_name(f".partial-{directory.name}")
        probe_writable(directory.parent)
        for path in (partial, partial / _DONE):
            if path.is_symlink():
                raise UsageError(f"{one_line(str(path))} is a link; remove it.")
        (partial / _DONE).mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(partial / "lock", timeout=0):
                _put_back(partial, directory)
                todo = _take_what_is_right(manifest, partial, directory)
                fetched = _fetch(
                    store,
                    manifest,
                    todo,
                    partial,
                    num_workers=num_workers,
                    show_progress=show_progress,
                    max_bytes_per_s=max_bytes_per_s,
                )
                _finish(manifest, partial, directory)
        except Timeout:
            raise UsageError(f"{one_line(str(directory))} is being pulled by another process; wait for it.") from None
        shutil.rmtree(partial, ignore_errors=True)
    return manifest, fetched


def _is_complete(directory: Path, manifest: Manifest) -> bool:
    """Whether a folder holds these files and no others."""
    if not (directory / MANIFEST_NAME).is_file():
        return False
    wanted = {file.file: file for file in manifest.files}
    return _names(directory) - {MANIFEST_NAME} == wanted.keys() and all(
        _is_right(directory / name, file) for name, file in wanted.items()
    )


def _names(directory: Path) -> set[str]:
    return {
        Path(folder, name).relative_to(directory).as_posix()
        for folder, _, names in os.walk(directory)
        for name in names
    }


def _is_right(path: Path, file: ManifestFile) -> bool:
    """Whether a file (not what a link points to) has a size and a hash."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
        return False
    return sha256(path) == file.sha256


def _check_replaceable(directory: Path, manifest: Manifest, force: bool) -> None:
    """Refuse a target that holds something, or, with `force`, something that no release brought."""
    if not os.path.lexists(directory):
        return
    name = one_line(str(directory))
    if directory.is_symlink() or not directory.is_dir():
        raise UsageError(f"{name} is in the way; name a new folder.")
    there = _names(directory)
    if there and not force:
        raise UsageError(f"{name} holds other files than the release; name a new folder, or replace it with --force.")
    known = {file.file for file in manifest.files} | {MANIFEST_NAME}
    with contextlib.suppress(OSError, UsageError):
        if (directory / MANIFEST_NAME).stat().st_size <= MAX_MANIFEST_BYTES:
            own = parse_manifest((directory / MANIFEST_NAME).read_bytes(), name)
            known |= {file.file for file in own.files}
    if foreign := sorted(there - known):
        raise UsageError(
            f"{name} holds {one_line(foreign[0])}, which no release brought and --force would remove; move it, or "
            "name a new folder."
        )


def _put_back(partial: Path, directory: Path) -> None:
    """Undo half a replacement that was killed."""
    if (partial / _OLD).exists():
        if directory.exists():
            shutil.rmtree(partial / _OLD)
        else:
            os.replace(partial / _OLD, directory)
    if (partial / _ARRIVING).is_symlink():
        (partial / _ARRIVING).unlink()
    (partial / _ARRIVING).mkdir(exist_ok=True)
    keep_unfinished(partial / _ARRIVING)


def _take_what_is_right(manifest: Manifest, partial: Path, directory: Path) -> list[ManifestFile]:
    """Keep and copy the files that are here already; returns those that are not."""
    done = partial / _DONE
    wanted = {file.file: file for file in manifest.files}
    for folder, folders, names in os.walk(done, topdown=False):
        for name in [*names, *(name for name in folders if Path(folder, name).is_symlink())]:
            path = Path(folder, name)
            file = wanted.get(path.relative_to(done).as_posix())
            if file is None or not _is_right(path, file):
                path.unlink()
        if Path(folder) != done:
            with contextlib.suppress(OSError):
                Path(folder).rmdir()  # empty: where a file may come
    todo = []
    for file in manifest.files:
        target, old = done / file.file, directory / file.file
        if target.exists():
            continue
        if old.parent.resolve().is_relative_to(directory.resolve()) and _is_right(old, file):
            target.parent.mkdir(parents=True, exist_ok=True)
            arriving = partial / _ARRIVING / "copy"
            shutil.copyfile(old, arriving)
            os.replace(arriving, target)
        else:
            todo.append(file)
    return todo


def _fetch(
    store: Store,
    manifest: Manifest,
    todo: list[ManifestFile],
    partial: Path,
    *,
    num_workers: int,
    show_progress: bool,
    max_bytes_per_s: float | None,
) -> int:
    """Download files, equal ones once; returns the bytes."""
    if not todo:
        return 0
    stored = _stored(store, manifest)
    same: dict[str, list[ManifestFile]] = {}
    for file in todo:
        same.setdefault(file.sha256, []).append(file)
    for first, *_ in same.values():
        _check_stored(store, manifest, first, stored)
    total = sum(files[0].size for files in same.values())
    check_room(partial.parent, sum(file.size for file in todo))
    with counting(total, "Downloading", show_progress=show_progress, max_bytes_per_s=max_bytes_per_s) as count:

        def place(files: list[ManifestFile], workers: Workers) -> None:
            arriving = partial / _ARRIVING / files[0].sha256
            fetch_checked(store, stored[manifest.key(files[0])], files[0], arriving, count=count, workers=workers)
            _place(files, arriving, partial / _DONE)

        for _ in small_and_large(place, same.values(), lambda files: files[0].size, num_workers=num_workers):
            pass
    return total


def _place(files: list[ManifestFile], arrived: Path, folder: Path) -> None:
    """Give what has arrived the names of all the files that it is."""
    for file in files:
        target = folder / file.file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file is files[-1]:
            os.replace(arrived, target)
        else:
            copy = arrived.with_name(f"{file.sha256}-copy")
            shutil.copyfile(arrived, copy)
            os.replace(copy, target)


def _stored(store: Store, manifest: Manifest) -> dict[str, Stored]:
    """What is there, by key: of the content's folder, or of all where the files lie beside the manifest."""
    return {stored.key: stored for stored in store.list_keys(f"{manifest.content}/" if manifest.content else "")}


def _check_stored(store: Store, manifest: Manifest, file: ManifestFile, stored: dict[str, Stored]) -> None:
    """Nothing is fetched that has another size than the manifest gives: sizes are bounded by it."""
    found = stored.get(manifest.key(file))
    if found is None or found.size != file.size:
        state = "is missing" if found is None else f"has {found.size} bytes instead of {file.size}"
        raise RunError(
            f"{shown(store.url)}: the content of {one_line(file.file)} {state}; publish it again, or pull an earlier "
            "release with --version."
        )


def fetch_checked(
    store: Store, stored: Stored, file: ManifestFile, path: Path, *, count: ByteCount, workers: Workers
) -> None:
    """Fetch a file of a release, again if it is not what its manifest says; `RunError` where it stays so."""
    for _ in range(_ATTEMPTS):
        arrived = store.fetch(stored, path, count=count, workers=workers) or sha256(path)
        if path.stat().st_size == file.size and arrived == file.sha256:
            return
        count(-path.stat().st_size)
    path.unlink()
    raise RunError(
        f"{shown(store.url)}: the content of {one_line(file.file)} is damaged (another SHA-256 than its manifest "
        "gives); publish it again, or pull an earlier release with --version."
    )


def _finish(manifest: Manifest, partial: Path, directory: Path) -> None:
    """Give the folder its name; a folder that it replaces is there until then."""
    done = partial / _DONE
    # Here the files lie beside it, under their names.
    (done / MANIFEST_NAME).write_bytes(dataclasses.replace(manifest, content=None).to_json())
    for path in _all_below(done):
        flush_to_disk(path)
    if directory.exists():
        os.replace(directory, partial / _OLD)
    os.replace(done, directory)
    flush_to_disk(directory.parent)


def _all_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)
        yield Path(parent)
