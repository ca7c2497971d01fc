"""Make a folder hold the files of a repository on the Hub, or a repository those of a folder, under their plain names:
only what differs travels, and what is sent is one commit.

The Hub knows the hash of every file, so contents are compared, whatever the times say. Hidden files and folders are
passed over on both sides: a repository has some of its own (`.gitattributes`), and a folder some that are nobody's
business (`.env`).
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile

from ..data.text.text_files import one_line
from ..engines import map_in_order
from ..errors import RunError, UsageError
from ..version import __version__
from .copies import NUM_WORKERS, file_errors, is_remote
from .folder_store import Stored
from .folder_sync import ARRIVING, SYNC_FOLDER, Side, SyncReport, look, receiving, remove_files
from .hub import NothingThere, hub_errors, open_hub
from .hub_address import HubAddress, is_on_hub, parse_hub_address
from .hub_pull import Listing, list_repository
from .hub_push import check_may_push, find_head, matches
from .hub_rate import check_limited_sizes, hub_rate
from .release_manifest import check_names
from .remote_folder import open_remote_folder
from .transfer_progress import counting


def sync_with_hub(
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
    """Make `target` hold the files of `source`, one of which is a folder and the other an `hf://` address, of a
    repository or of a folder in one. A repository that is not there is made, private.

    Args:
        delete: remove files that are not in `source`.
        dry_run: change nothing.
        compare_content: contents are compared in any case.
        num_workers: requests at a time.
        show_progress: draw bars.
        max_bytes_per_s: limit of the rate, of all requests together.

    Raises:
        UsageError: nothing is in `source`, a name is not safe, the folder holds releases, there is no room, the token
            may not do it, or both are remote.
        RunError: another commit came first, the connection broke, or a file changed meanwhile.
    """
    if is_remote(source) or is_remote(target) or (is_on_hub(source) and is_on_hub(target)):
        raise UsageError(
            "sync goes between the Hub and a folder of this machine: sync to a folder, and from there to the other."
        )
    how = {"delete": delete, "dry_run": dry_run, "num_workers": num_workers, "max_bytes_per_s": max_bytes_per_s}
    if is_on_hub(source):
        return _fetch_from_hub(source, look(target), show_progress=show_progress, **how)
    return _send_to_hub(look(source), parse_hub_address(target), **how)


@dataclass(frozen=True)
class _Differences:
    """Names: of the files that travel, and of those that the target has and the source hasn't."""

    todo: list[str]
    surplus: list[str]


def _compare(source: dict, target: dict, is_same: Callable[[str], bool], delete: bool) -> _Differences:
    both = sorted(source.keys() & target.keys())
    same = {name for name, equal in zip(both, map_in_order(is_same, both, num_workers=4), strict=True) if equal}
    return _Differences(sorted(source.keys() - same), sorted(target.keys() - source.keys()) if delete else [])


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _local_files(side: Side) -> dict[str, Stored]:
    return {name: stored for name, stored in side.files.items() if not _is_hidden(name)}


def _matches(path: Path, file: RepoFile) -> bool:
    with file_errors(path, "read"):
        return path.stat().st_size == file.size and matches(path, file)


# --- from the Hub to a folder ----------------------------------------------------------------------------------------


def _fetch_from_hub(
    source: str,
    goal: Side,
    *,
    delete: bool,
    dry_run: bool,
    num_workers: int,
    show_progress: bool,
    max_bytes_per_s: float | None,
) -> SyncReport:
    if goal.hashes:
        raise UsageError(f"{goal.store.url} holds releases; sync to another folder.")
    address = parse_hub_address(source)
    listing = list_repository(address)
    there = _files_below(address, listing)
    check_names(there, str(address), may_hold_manifest=True)
    if not there:
        raise UsageError(f"{address} holds no files; name a folder that does.")
    here = _local_files(goal)
    differs = _compare(there, here, lambda name: _matches(goal.path(name), there[name]), delete)
    sizes = {name: there[name].size for name in differs.todo}
    size = sum(sizes.values())
    if not dry_run and differs.todo:
        check_limited_sizes(sizes, max_bytes_per_s)
        remote = open_remote_folder(str(replace(address, revision=listing.commit)), num_workers=num_workers)
        arriving = goal.store.root / SYNC_FOLDER / ARRIVING
        with (
            receiving(goal, size),
            hub_rate(max_bytes_per_s),
            counting(size, "Syncing", show_progress=show_progress) as count,
        ):

            def place(name: str) -> None:
                partial = arriving / hashlib.sha256(name.encode()).hexdigest()
                remote.fetch(name, partial, count)
                path = goal.path(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, path)

            for _ in map_in_order(place, differs.todo, num_workers=num_workers):
                pass
    if not dry_run and differs.surplus:
        remove_files(goal, differs.surplus, num_workers)
    return SyncReport(tuple(differs.todo), tuple(differs.surplus), len(there) - len(differs.todo), size)


def _files_below(address: HubAddress, listing: Listing) -> dict[str, RepoFile]:
    """A repository's files in the folder of an address, by their names relative to it."""
    below = f"{address.folder}/" if address.folder else ""
    files = {file.path.removeprefix(below): file for file in listing.files if file.path.startswith(below)}
    return {name: file for name, file in files.items() if not _is_hidden(name)}


# --- from a folder to the Hub ----------------------------------------------------------------------------------------


def _send_to_hub(
    origin: Side, address: HubAddress, *, delete: bool, dry_run: bool, num_workers: int, max_bytes_per_s: float | None
) -> SyncReport:
    here = _local_files(origin)
    if not here:
        raise UsageError(f"{one_line(origin.store.url)} holds no files; name a folder that does.")
    check_names(here, one_line(origin.store.url), may_hold_manifest=True)
    repository = replace(address, folder="")
    check_may_push(repository)
    names = {"repo_id": address.repo_id, "repo_type": address.repo_type}
    branch = address.revision or "main"
    if not dry_run:
        with hub_errors(address, writing=True):
            api = open_hub()
            api.create_repo(**names, private=not api.repo_exists(**names) or None, exist_ok=True)
            repository = replace(repository, revision=find_head(api, names, branch))
    listing = _listing_or_none(repository)
    there = _files_below(address, listing) if listing else {}
    paths = {name: origin.path(stored.key) for name, stored in here.items()}  # of a release, its content
    differs = _compare(here, there, lambda name: _matches(paths[name], there[name]), delete)
    if not dry_run and (differs.todo or differs.surplus):
        below = f"{address.folder}/" if address.folder else ""
        with file_errors(origin.store.root, "read"), hub_rate(max_bytes_per_s), hub_errors(address, writing=True):
            open_hub().create_commit(
                **names,
                operations=[
                    *(CommitOperationAdd(below + name, str(paths[name])) for name in differs.todo),
                    *(CommitOperationDelete(below + name) for name in differs.surplus),
                ],
                commit_message=f"Sync with ACE-Step LoRA {__version__}",
                revision=branch,
                parent_commit=listing.commit,
                num_threads=num_workers,
            )
        for name in differs.todo:
            if Stored.of_file(here[name].key, paths[name].stat()) != here[name]:
                raise RunError(f"{one_line(str(paths[name]))} changed while it was sent; run it again.")
    size = sum(here[name].size for name in differs.todo)
    return SyncReport(tuple(differs.todo), tuple(differs.surplus), len(here) - len(differs.todo), size)


def _listing_or_none(address: HubAddress) -> Listing | None:
    """What a repository holds at a revision, or where it has none such, at its latest; None where there is none."""
    for tried in (address, replace(address, revision=None)):
        try:
            return list_repository(tried)
        except NothingThere:
            continue
    return None
