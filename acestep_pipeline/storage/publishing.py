"""Publish a folder under a name, so that whoever reads the name sees the old release or the new one, whole.

Below the name (a prefix on S3, or a folder) lie

    content/<sha256>      the files, each under the hash of its content, which is never written over
    releases/<n>.json     the manifest of release n, once a later one has taken its place
    manifest.json         the manifest of the latest release (`release_manifest`)

Content is sent first, and only what is not there yet. `manifest.json` is written last, in one conditional request: the
first time only if there is none, later only if it still is what it was before. So of several publishers one wins, and
the others are told; one that is killed leaves the release before. A rollback is a new release of old files: history
only grows.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.text.text_files import one_line
from ..engines import map_in_order
from ..errors import RunError, UsageError
from .copies import NUM_WORKERS
from .release_manifest import (
    CHECKPOINTS_FOLDER,
    CONTENT_FOLDER,
    HISTORY_FOLDER,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    PROBE_KEY,
    Manifest,
    ManifestFile,
    check_version,
    describe_file,
    files_to_publish,
    new_release,
    parse_manifest,
)
from .s3 import shown
from .stores import Store, open_store
from .transfer_progress import Workers, counting, small_and_large

# Content that no manifest names is used again if it is younger than this, and `gc` leaves alone what is younger than
# a day: a publisher has the rest of the day to finish.
REUSED_S = 3600.0
_ATTEMPTS = 3


@dataclass(frozen=True)
class Published:
    """What a publication came to: the release, whether it is new, and how many of its bytes were sent."""

    manifest: Manifest
    is_new: bool
    sent_bytes: int
    left_out: tuple[str, ...]


def publish(
    directory: Path,
    address: str,
    *,
    version: str | None = None,
    message: str | None = None,
    force: bool = False,
    follows: int | None = None,
    include_checkpoints: bool = False,
    num_workers: int = NUM_WORKERS,
    show_progress: bool = True,
    max_bytes_per_s: float | None = None,
) -> Published:
    """Publish the files of a folder as a release at `s3://bucket/name` or in a folder.

    A folder whose files are those of the latest release is not published again.

    Args:
        directory: what `files_to_publish` takes of it.
        address: where; it holds nothing, or earlier releases.
        version: a tag for the release, which no other release there has.
        message: kept in the manifest.
        force: make a new release where there is one already (the old ones stay).
        follows: the release that must be the latest, 0 for none: another one is another publisher's.
        include_checkpoints: publish what resuming a training needs, too.
        num_workers: requests at a time.
        show_progress: draw a bar of bytes.
        max_bytes_per_s: limit of the rate, of all requests together.

    Raises:
        UsageError: nothing to publish, the place is taken, the version is, or S3 or the file system refuses.
        RunError: another publisher was faster, a file changed while it was read, or the connection broke.
    """
    if version is not None:
        check_version(version)
    names, left_out = files_to_publish(Path(directory), include_checkpoints=include_checkpoints)
    store = open_store(address, num_workers=num_workers)
    latest = read_latest(store)
    if follows not in (None, latest[0].release if latest else 0):
        raise RunError(
            f"{shown(store.url)}: another publisher published {f'release {latest[0].release}' if latest else 'there'} "
            "meanwhile; yours was not published. Choose another name, or see to it that one publishes there at a time."
        )
    if latest is None:
        _check_free(store)
    else:
        _check_may_follow(store, latest[0], {name: (directory / name).stat().st_size for name in names}, force)
    store.check_conditional_writes()
    history = read_history(store, latest[0] if latest else None)
    before = _stats(directory, names)
    files = list(map_in_order(lambda name: describe_file(directory, name), names, num_workers=num_workers))
    if latest is not None:
        same = sorted(files, key=lambda file: file.file) == sorted(latest[0].files, key=lambda file: file.file)
        if same and version in (None, latest[0].version):
            return Published(latest[0], is_new=False, sent_bytes=0, left_out=tuple(left_out))
        _check_may_follow(store, latest[0], None, force)
    if version is not None and any(version == old.version for old in history):
        raise UsageError(f"{shown(store.url)} has a version {version} already; name another one.")
    sent = _send(
        store,
        directory,
        files,
        history,
        num_workers=num_workers,
        show_progress=show_progress,
        max_bytes_per_s=max_bytes_per_s,
    )
    if _stats(directory, names) != before:
        raise RunError(f"{one_line(str(directory))} changed while it was sent; nothing was published, run it again.")
    manifest = new_release(files, parent=latest[0] if latest else None, version=version, message=message)
    commit(store, manifest, latest)
    return Published(manifest, is_new=True, sent_bytes=sent, left_out=tuple(left_out))


def check_target(address: str) -> Manifest | None:
    """Refuse early what `publish` would refuse at an address, whatever it is to publish; writes nothing that is seen.

    Returns:
        The latest release there.

    Raises:
        UsageError: the place is taken by something that is no release, or S3 or the file system refuses.
    """
    store = open_store(address)
    latest = read_latest(store)
    if latest is None:
        _check_free(store)
    elif latest[0].content is None:
        _check_may_follow(store, latest[0], None, force=True)
    store.check_conditional_writes()
    return latest and latest[0]


def _stats(directory: Path, names: Sequence[str]) -> list[tuple[int, int]]:
    statuses = [(directory / name).stat() for name in names]
    return [(status.st_size, status.st_mtime_ns) for status in statuses]


def _check_free(store: Store) -> None:
    """Nothing but what an unfinished publication left may lie at a new name."""
    own = (f"{CONTENT_FOLDER}/", f"{HISTORY_FOLDER}/", f"{CHECKPOINTS_FOLDER}/")
    others = [file.key for file in store.list_keys() if not file.key.startswith(own) and file.key != PROBE_KEY]
    if others:
        raise UsageError(
            f"{shown(store.url)} holds files that were not published ({one_line(others[0])}); choose another name."
        )


def _check_may_follow(store: Store, latest: Manifest, sizes: dict[str, int] | None, force: bool) -> None:
    """Refuse to publish over `latest` unless forced, or unless files of these sizes could be the same."""
    if latest.content is None:
        raise UsageError(f"{shown(store.url)} holds a folder that was not published; choose another name.")
    if not force and sizes != {file.file: file.size for file in latest.files}:
        raise UsageError(
            f"{shown(store.url)} is published already (release {latest.release}, {latest.created}); choose another "
            "name, or add a release with --force."
        )


def _send(
    store: Store,
    directory: Path,
    files: Sequence[ManifestFile],
    history: Sequence[Manifest],
    *,
    num_workers: int,
    show_progress: bool,
    max_bytes_per_s: float | None,
) -> int:
    """Upload the content that is not there yet; returns its bytes."""
    named = {file.sha256 for manifest in history for file in manifest.files}
    recent = time.time() - REUSED_S
    there = {
        stored.key.rpartition("/")[2]: stored.size
        for stored in store.list_keys(f"{CONTENT_FOLDER}/")
        if stored.modified > recent or stored.key.rpartition("/")[2] in named
    }
    todo = list({file.sha256: file for file in files if there.get(file.sha256) != file.size}.values())
    total = sum(file.size for file in todo)
    with counting(total, "Uploading", show_progress=show_progress, max_bytes_per_s=max_bytes_per_s) as count:

        def send(file: ManifestFile, workers: Workers) -> None:
            key = f"{CONTENT_FOLDER}/{file.sha256}"
            store.put(directory / file.file, key, size=file.size, sha256=file.sha256, count=count, workers=workers)

        for _ in small_and_large(send, todo, lambda file: file.size, num_workers=num_workers):
            pass
    stored = {file.key.rpartition("/")[2]: file.size for file in store.list_keys(f"{CONTENT_FOLDER}/")}
    if lacking := [file.file for file in files if stored.get(file.sha256) != file.size]:
        raise RunError(
            f"{shown(store.url)}: the content of {one_line(lacking[0])} is gone again, removed by someone; nothing "
            "was published, run it again."
        )
    return total


# --- manifests -------------------------------------------------------------------------------------------------------


def read_latest(store: Store) -> tuple[Manifest, bytes, str] | None:
    """The manifest of the latest release, as it lies there, and its tag; None where nothing is published."""
    found = store.read(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    return found and (parse_manifest(found[0], f"{shown(store.url)}/{MANIFEST_NAME}"), *found)


def read_history(store: Store, latest: Manifest | None) -> list[Manifest]:
    """Every release, the latest first."""
    keys = [stored.key for stored in store.list_keys(f"{HISTORY_FOLDER}/")]
    numbers = sorted(int(match[1]) for key in keys if (match := re.fullmatch(r".*/([1-9]\d{0,8})\.json", key)))
    old = [number for number in reversed(numbers) if latest is None or number != latest.release]
    return [*([latest] if latest else []), *map_in_order(lambda number: _read_old(store, number), old)]


def _read_old(store: Store, number: int) -> Manifest:
    key = f"{HISTORY_FOLDER}/{number}.json"
    found = store.read(key, max_bytes=MAX_MANIFEST_BYTES)
    where = f"{shown(store.url)}/{key}"
    manifest = found and parse_manifest(found[0], where)
    if manifest is None or manifest.release != number:
        raise UsageError(f"{where} is not the manifest of release {number}; restore it.")
    return manifest


def find_release(store: Store, version: str | None = None) -> Manifest:
    """The latest release, or the one with this version or number.

    Raises:
        UsageError: nothing is published there, or no such release.
    """
    latest = read_latest(store)
    if latest is None:
        raise UsageError(
            f"{shown(store.url)} is not published (it has no {MANIFEST_NAME}); correct the name, or see "
            "`acestep-lora storage ls`."
        )
    if version in (None, "latest"):
        return latest[0]
    for manifest in read_history(store, latest[0]):
        if version in (manifest.version, str(manifest.release)):
            return manifest
    raise UsageError(f"{shown(store.url)} has no version {one_line(version)}; see `acestep-lora storage ls` of it.")


def rollback(address: str, version: str) -> Manifest:
    """Publish an earlier release's files anew, as the latest release.

    Raises:
        UsageError: there is no such release, or it is the latest.
        RunError: another publisher was faster.
    """
    store = open_store(address)
    target = find_release(store, version)
    latest = read_latest(store)
    if latest[0].content is None or target.files == latest[0].files:
        raise UsageError(f"{shown(store.url)}: the latest release has these files; there is nothing to roll back.")
    store.check_conditional_writes()
    manifest = new_release(target.files, parent=latest[0], message=f"release {target.release} again")
    commit(store, manifest, latest)
    return manifest


def commit(store: Store, manifest: Manifest, latest: tuple[Manifest, bytes, str] | None) -> None:
    """Make `manifest` the latest release if `latest`, as it was read, still is.

    Raises:
        RunError: it is not: another publisher was faster.
    """
    if latest is not None:
        key = f"{HISTORY_FOLDER}/{latest[0].release}.json"
        if not store.write(key, latest[1], replaces=None):
            kept = store.read(key, max_bytes=MAX_MANIFEST_BYTES)
            if kept is None or kept[0] != latest[1]:
                raise RunError(f"{shown(store.url)}/{key} is not what release {latest[0].release} was; look at it.")
    data = manifest.to_json()
    now = None
    for attempt in range(_ATTEMPTS):
        if store.write(MANIFEST_NAME, data, replaces=latest and latest[2]):
            return
        now = store.read(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
        if now and now[0] == data:
            return  # it was written, and the answer was lost
        if (now and now[1]) != (latest and latest[2]):
            break
        time.sleep(0.2 * (attempt + 1))  # requests that ran at the same moment, all of which the server refused
    theirs = f"release {parse_manifest(now[0], store.url).release}" if now else "something"
    raise RunError(
        f"{shown(store.url)}: another publisher was faster and published {theirs} meanwhile; yours was not published. "
        "Look at theirs, and push again with --force to follow it."
    )
