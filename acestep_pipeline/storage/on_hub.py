"""What `acestep_pipeline.storage` does with repositories of the Hub."""

from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from ..errors import UsageError
from .copies import local_file
from .folder_store import Stored
from .hub import NothingThere
from .hub_address import HubAddress, parse_hub_address
from .hub_pull import list_repository, pull_from_hub
from .hub_push import push_to_hub
from .hub_sync import sync_with_hub

sync = sync_with_hub


def pull(source: str, directory: Path, *, version: str | None, **options) -> Path:
    known = _known(options, "force", "num_workers", "max_bytes_per_s")
    pull_from_hub(at_version(parse_hub_address(source), version), directory, **known)
    return directory


def push(directory: Path, target: str, *, version: str | None, **options) -> str:
    known = _known(options, "message", "private", "num_workers", "max_bytes_per_s")
    release = push_to_hub(directory, parse_hub_address(target), tag=version, **known)
    return version or release.commit


def list_files(location: str) -> list[Stored]:
    address = parse_hub_address(location)
    listing = list_repository(address)
    below = f"{address.folder}/" if address.folder else ""
    return [Stored(file.path.removeprefix(below), file.size, file.blob_id, listing.modified) for file in listing.files]


def exists(location: str) -> bool:
    """Whether it is there; a repository that can't be seen is not."""
    try:
        return bool(list_files(location))
    except NothingThere:
        return False


def open_file(location: str) -> BinaryIO:
    return local_file(location).open("rb")


def at_version(address: HubAddress, version: str | None) -> HubAddress:
    """The address at a revision that was given beside it, and not in it."""
    if version is None:
        return address
    if address.revision is not None:
        raise UsageError(f"version {version} and {address} both name a revision; give one of them.")
    return replace(address, revision=version)


def _known(options: dict, *names: str) -> dict:
    """The options that mean something there; the bar is huggingface_hub's own."""
    for name, value in options.items():
        if name not in (*names, "show_progress", "force") and value:
            raise UsageError(f"{name} means nothing on the Hub; leave it out.")
    return {name: options[name] for name in names if name in options}
