"""One interface to what lies in a folder, under `s3://bucket/prefix`, or on the Hub (`hf://user/repo[@revision]`).

    from acestep_pipeline import storage

    storage.push("output/jazz", "s3://bucket/lora/jazz", version="v1")     # a release: all of it or nothing
    storage.pull("s3://bucket/lora/jazz", "jazz")                          # its files, checked by SHA-256
    storage.sync("my_music", "s3://bucket/music")                          # plain files, as `aws s3 sync`
    [file.key for file in storage.list("s3://bucket/music")]
    with storage.open("s3://bucket/lora/jazz/README.md") as file: ...

A release is a folder to all of them: `list`, `open` and `sync` show its files under their names. Addresses hold no
secrets: boto3 finds credentials, and `AWS_ENDPOINT_URL` the server. Every function raises `UsageError` where something
is refused or not there, and `RunError` where the work broke off; both say in one sentence what to do.
"""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..paths import check_addresses

if TYPE_CHECKING:
    from types import ModuleType

    from .folder_store import Stored
    from .folder_sync import SyncReport

__all__ = ["exists", "list", "open", "pull", "push", "sync"]


def _backend(*locations: str | Path) -> ModuleType:
    """What serves these locations: a module with the functions below, imported when it is used."""
    check_addresses(*locations)
    if any(str(location).startswith("hf://") for location in locations):
        from . import on_hub

        return on_hub
    from . import folders

    return folders


def pull(source: str | Path, directory: str | Path, *, version: str | None = None, **options) -> Path:
    """Make `directory` hold the release at `source`, whole and checked; what was pulled before is not fetched again.

    Args:
        source: where a release was pushed.
        directory: new or empty, or with an earlier pull of it.
        version: a version's tag or a release's number; None for the latest.
        options: `force` (replace another release there), `num_workers` (requests at a time), `show_progress`,
            `max_bytes_per_s`.

    Returns:
        `directory`.
    """
    return _backend(source).pull(str(source), Path(directory), version=version, **options)


def push(directory: str | Path, target: str | Path, *, version: str | None = None, **options) -> str:
    """Publish a folder's files as a release; readers see the old release or the new one, and one publisher wins.

    Args:
        directory: a run's output, a dataset, …; hidden files, checkpoints and optimizer state stay here.
        target: where to; it holds nothing or earlier releases.
        version: a tag for the release.
        options: `message`, `private` (on the Hub), `force` (add to the releases there), `include_checkpoints`,
            `num_workers`, `show_progress`, `max_bytes_per_s`.

    Returns:
        The release, by its tag or number.
    """
    return _backend(target).push(Path(directory), str(target), version=version, **options)


def sync(
    source: str | Path, target: str | Path, *, delete: bool = False, dry_run: bool = False, **options
) -> SyncReport:
    """Make `target` hold the files of `source` under their names; only what differs travels.

    Args:
        source, target: folders or addresses, one kind or two.
        delete: remove what `source` does not have.
        dry_run: change nothing; the report says what would be done.
        options: `compare_content` (by checksum instead of size and time), `num_workers`, `show_progress`,
            `max_bytes_per_s`.

    Returns:
        What was done.
    """
    return _backend(source, target).sync(str(source), str(target), delete=delete, dry_run=dry_run, **options)


def list(location: str | Path) -> builtins.list[Stored]:
    """The files in and below a location by `key` (relative to it), with `size` in bytes and `modified` (s since 1970).

    Nothing is there: an empty list.
    """
    return _backend(location).list_files(str(location))


def exists(location: str | Path) -> bool:
    """Whether there is a file, or a folder with files, at a location."""
    return _backend(location).exists(str(location))


def open(location: str | Path) -> BinaryIO:
    """A file for reading, in bytes. One that is not on this machine is fetched whole, and checked, before."""
    return _backend(location).open_file(str(location))
