"""Look after releases: list them, read their content again, remove what no manifest names."""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from ..data.text.text_files import one_line
from ..engines import map_in_order
from ..errors import UsageError
from .copies import NUM_WORKERS
from .folder_store import Stored
from .publishing import REUSED_S, find_release, read_history, read_latest
from .release_manifest import (
    CONTENT_FOLDER,
    HISTORY_FOLDER,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Manifest,
    parse_manifest,
)
from .s3 import shown
from .stores import Store, open_store
from .transfer_progress import counting

# How deep below an address published names are looked for.
_MAX_DEPTH = 5
_CONTENT_KEY = re.compile(rf"{CONTENT_FOLDER}/[0-9a-f]{{64}}")


@dataclass(frozen=True)
class Garbage:
    """What `collect_garbage` found: content and unfinished uploads that no manifest names, and what is too young."""

    content: tuple[Stored, ...]
    unfinished: tuple[Stored, ...]
    num_young: int

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return sum(stored.size for stored in self.content)


def find_published(address: str) -> Iterator[tuple[str, Manifest | None]]:
    """The published names at and below an address, relative to it ("" for itself), with the latest manifest of each.

    The manifest is None where it can't be read. A folder that was sealed and not published (a checkpoint) is left out.
    """
    store = open_store(address)
    pending = [""]
    while pending:
        prefix = pending.pop()
        keys, prefixes = store.list_level(prefix)
        if f"{prefix}{MANIFEST_NAME}" in keys:
            manifest = _read_or_none(store, f"{prefix}{MANIFEST_NAME}")
            if manifest is None or manifest.content is not None:
                yield prefix.rstrip("/"), manifest
                prefixes = [
                    each for each in prefixes if each[len(prefix) : -1] not in (CONTENT_FOLDER, HISTORY_FOLDER)
                ]
        if prefix.count("/") < _MAX_DEPTH:
            pending += reversed(prefixes)


def _read_or_none(store: Store, key: str) -> Manifest | None:
    found = store.read(key, max_bytes=MAX_MANIFEST_BYTES)
    with contextlib.suppress(UsageError):
        return found and parse_manifest(found[0], key)
    return None


def verify(
    address: str,
    *,
    version: str | None = None,
    every_release: bool = False,
    num_workers: int = NUM_WORKERS,
    show_progress: bool = True,
) -> tuple[list[Manifest], list[str]]:
    """Read the content of a release (the latest, by `version`, or every one) and compare sizes and SHA-256.

    Returns:
        The releases, and what is wrong, a sentence for each file.

    Raises:
        UsageError: nothing is published there, or it can't be read.
    """
    store = open_store(address, num_workers=num_workers)
    releases = [find_release(store, version)]
    if every_release:
        releases = read_history(store, releases[0])
    files = {release.key(file): file for release in reversed(releases) for file in release.files}
    total = sum(file.size for file in files.values())

    def damage(key: str) -> str | None:
        file = files[key]
        digest = store.hash(key, size=file.size, count=count)
        if digest == file.sha256:
            return None
        state = "is missing or has another size" if digest is None else "has another SHA-256"
        return f"{one_line(file.file)} {state} ({key})"

    with counting(total, "Verifying", show_progress=show_progress) as count:
        found = [sentence for sentence in map_in_order(damage, files, num_workers=num_workers) if sentence]
    return releases, found


def find_garbage_places(address: str) -> list[str]:
    """The addresses at and below one that hold content: of published names, and of first publications that were cut.

    Raises:
        UsageError: there is none, or it can't be read.
    """
    store = open_store(address)
    places, pending = [], [""]
    while pending:
        prefix = pending.pop()
        _, prefixes = store.list_level(prefix)
        own = f"{prefix}{CONTENT_FOLDER}/"
        if own in prefixes:
            places.append(f"{store.url}/{prefix}".rstrip("/"))
            prefixes = [each for each in prefixes if each not in (own, f"{prefix}{HISTORY_FOLDER}/")]
        if prefix.count("/") < _MAX_DEPTH:
            pending += reversed(prefixes)
    if not places:
        raise UsageError(f"nothing is published below {shown(address)}; correct the name.")
    return places


def collect_garbage(address: str, *, older_than_s: float, dry_run: bool) -> Garbage:
    """Remove content that no release names, and uploads that were never finished, once they are old enough.

    What a publisher sends is named only when it has sent everything: `older_than_s` must be longer than the longest
    publication. Nothing else below the address is touched, and nothing at all if any manifest can't be read.

    Raises:
        UsageError: a manifest can't be read, the age is too low, or S3 refuses.
    """
    if older_than_s < 2 * REUSED_S:
        raise UsageError(f"content younger than {2 * REUSED_S / 3600:g} hours may be a publication under way.")
    store = open_store(address)
    limit = time.time() - older_than_s
    # Content first: a release that comes meanwhile is then read after it.
    content = [stored for stored in store.list_keys(f"{CONTENT_FOLDER}/") if _CONTENT_KEY.fullmatch(stored.key)]
    unnamed = _unnamed(store, content)
    old = tuple(stored for stored in unnamed if stored.modified < limit)
    unfinished = store.unfinished(f"{CONTENT_FOLDER}/")
    old_unfinished = tuple(upload for upload in unfinished if upload.modified < limit)
    num_young = len(unnamed) - len(old) + len(unfinished) - len(old_unfinished)
    if not dry_run:
        # Once more, for what was sent anew or named in the meantime.
        again = {stored.key: stored for stored in store.list_keys(f"{CONTENT_FOLDER}/")}
        old = tuple(stored for stored in _unnamed(store, old) if again.get(stored.key) == stored)
        store.delete(stored.key for stored in old)
        store.give_up(old_unfinished)
    return Garbage(old, old_unfinished, num_young)


def _unnamed(store: Store, content) -> list[Stored]:
    latest = read_latest(store)
    if latest is not None and latest[0].content is None:
        raise UsageError(f"{shown(store.url)} holds a folder that was not published: nothing in it is garbage.")
    named = {release.key(file) for release in read_history(store, latest and latest[0]) for file in release.files}
    return [stored for stored in content if stored.key not in named]
