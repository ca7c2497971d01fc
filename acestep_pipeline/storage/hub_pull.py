"""Bring a repository of the Hub into a folder: under a temporary name, each file checked by its hash, then renamed."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.hf_api import RepoFile

from ..data.text.text_files import one_line
from ..errors import RunError, UsageError
from ..paths import free_space_bytes, probe_writable
from .copies import NUM_WORKERS, file_errors
from .hub import NothingThere, hub_errors, open_hub
from .hub_address import HubAddress
from .hub_push import matches
from .hub_rate import check_limited_sizes, hub_rate
from .release_manifest import MANIFEST_NAME, check_names

# What huggingface_hub keeps beside the files while they arrive.
_OWN_FOLDER = ".cache"


@dataclass(frozen=True)
class Listing:
    """A revision of a repository: its commit and when that was (seconds since 1970, 0 if unknown), its files, and its
    tags with their commits."""

    commit: str
    modified: float
    files: tuple[RepoFile, ...]
    tags: dict[str, str]


def list_repository(address: HubAddress) -> Listing:
    """What a repository holds at the revision and in the folder of an address.

    Raises:
        UsageError: there is none that can be seen, or the Hub can't be reached.
        RunError: the Hub failed.
    """
    repository = {"repo_id": address.repo_id, "repo_type": address.repo_type}
    with hub_errors(address):
        api = open_hub()
        info = api.repo_info(**repository, revision=address.revision)
        commit, changed = info.sha, info.last_modified
        entries = api.list_repo_tree(**repository, recursive=True, revision=commit)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(**repository).tags}
    below = f"{address.folder}/" if address.folder else ""
    inside = [file for file in files if file.path.startswith(below) or file.path == address.folder]
    if not inside and address.folder:
        raise NothingThere(f"{address} is not there; correct the folder's name (`acestep-lora storage ls`).")
    return Listing(commit, changed.timestamp() if changed else 0.0, tuple(inside), tags)


def pull_from_hub(
    address: HubAddress,
    directory: Path,
    *,
    force: bool = False,
    num_workers: int = NUM_WORKERS,
    max_bytes_per_s: float | None = None,
) -> tuple[Listing, int]:
    """Make `directory` hold a repository, at the revision of the address.

    The files arrive in `.partial-<name>` beside it, where a pull that follows one that was cut goes on.

    Args:
        address: of a whole repository.
        directory: new or empty.
        num_workers: requests at a time.
        max_bytes_per_s: limit of the rate, of all requests together.
        force: replace what an earlier pull of this repository brought, if it was not changed.

    Returns:
        What it holds now, and its bytes.

    Raises:
        UsageError: there is no such repository, names in it are not safe, the folder is in the way, or there is no
            room.
        RunError: what arrived is not what the repository says, or the connection broke.
    """
    from filelock import FileLock, Timeout

    if address.folder:
        raise UsageError(f"{address} names a part of a repository; pull all of it, {address.repository}.")
    listing = list_repository(address)
    check_names((file.path for file in listing.files if file.path != MANIFEST_NAME), str(address))
    check_limited_sizes({file.path: file.size for file in listing.files}, max_bytes_per_s)
    directory = Path(directory).expanduser().absolute()
    name, total = one_line(str(directory)), sum(file.size for file in listing.files)
    with file_errors(directory):
        if os.path.lexists(directory) and (not directory.is_dir() or any(directory.iterdir())):
            _check_replaceable(directory, listing, force)
        partial = directory.with_name(f".partial-{directory.name}")
        probe_writable(directory.parent)
        if partial.is_symlink():
            raise UsageError(f"{one_line(str(partial))} is a link; remove it.")
        partial.mkdir(exist_ok=True)
        if total > free_space_bytes(partial):
            raise UsageError(f"{name}: {total / 1e9:.1f} GB are to come, and there is less room; make room.")
        try:
            with FileLock(directory.with_name(f".partial-{directory.name}.lock"), timeout=0):
                with hub_rate(max_bytes_per_s):
                    _fetch(address, listing, partial, num_workers)
                shutil.rmtree(partial / _OWN_FOLDER, ignore_errors=True)
                if directory.is_dir():
                    shutil.rmtree(directory)
                os.replace(partial, directory)
        except Timeout:
            raise UsageError(f"{name} is being pulled by another process; wait for it.") from None
        directory.with_name(f".partial-{directory.name}.lock").unlink(missing_ok=True)
    return listing, total


def _check_replaceable(directory: Path, listing: Listing, force: bool) -> None:
    name = one_line(str(directory))
    if directory.is_symlink() or not directory.is_dir():
        raise UsageError(f"{name} is in the way; name a new folder.")
    if not force:
        raise UsageError(f"{name} holds files already; name a new folder, or replace it with --force.")
    known = {file.path for file in listing.files}
    for folder, _, names in os.walk(directory):
        for file in names:
            relative = Path(folder, file).relative_to(directory).as_posix()
            if relative not in known:
                raise UsageError(
                    f"{name} holds {one_line(relative)}, which the repository doesn't and --force would remove; move "
                    "it, or name a new folder."
                )


def _fetch(address: HubAddress, listing: Listing, partial: Path, num_workers: int) -> None:
    known = {file.path for file in listing.files}
    for folder, _, names in os.walk(partial):
        for path in (Path(folder, name) for name in names):
            relative = path.relative_to(partial).as_posix()
            if relative not in known and relative.partition("/")[0] != _OWN_FOLDER:
                path.unlink()  # of another revision
    with hub_errors(address):
        snapshot_download(
            address.repo_id,
            repo_type=address.repo_type,
            revision=listing.commit,
            local_dir=partial,
            max_workers=num_workers,
        )
    for file in listing.files:
        if not matches(partial / file.path, file):
            (partial / file.path).unlink()
            raise RunError(f"{address}: {one_line(file.path)} arrived with another hash than it has; pull it again.")
