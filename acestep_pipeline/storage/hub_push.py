"""Publish a folder on the Hub: one commit a release, of what has changed, and a tag.

Of the repository's other files those are removed that an earlier release brought and this one lacks; a commit by
somebody else meanwhile makes ours fail instead of being overwritten.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..data.text.text_files import one_line
from ..errors import RunError, UsageError
from ..files import sha256
from ..version import __version__
from .copies import NUM_WORKERS
from .hub import endpoint, hub_errors, open_hub, token_fix
from .hub_address import HubAddress
from .hub_files import CARD_NAME, belongs, choose_files
from .hub_rate import hub_rate

_TAG = re.compile(r"(?!\.)[\w.+-]{1,100}(?<!\.lock)", re.ASCII)
_MAY_WRITE = ("repo.write", "repo.content.write")


@dataclass(frozen=True)
class HubRelease:
    """What a publication came to: the commit, whether it is new, its page, how many files and bytes changed, and the
    names of files that were left out."""

    commit: str
    is_new: bool
    url: str
    num_files: int
    size_bytes: int
    left_out: tuple[str, ...]


def complete_id(name: str | None, *, default: str) -> str:
    """`user/name` of what may be a name alone, or nothing (`default`): whose it is, the token says.

    Raises:
        UsageError: there is no token, the Hub refuses it, or it can't be reached.
    """
    name = name or re.sub(r"[^\w.-]+", "-", default, flags=re.ASCII).strip("-.") or "adapter"
    return name if "/" in name else f"{_user(name)['name']}/{name}"


def check_may_push(address: HubAddress, *, private: bool = False, tag: str | None = None) -> None:
    """Refuse what a push would be refused for, before there is anything to push.

    Raises:
        UsageError: no token, one that may not write there, a folder in the address, a repository that is public and
            should be `private`, a tag that exists, or the Hub can't be reached.
        RunError: the Hub failed.
    """
    if address.folder:
        raise UsageError(f"{address} names a folder of a repository; publish to the repository, {address.repository}.")
    _check_tag(tag)
    user = _user(str(address))
    token = user.get("auth", {}).get("accessToken", {})
    scopes = token.get("fineGrained", {}).get("scoped", [])
    may_write = token.get("role") in (None, "write", "admin") or any(
        permission in _MAY_WRITE for scope in scopes for permission in scope.get("permissions", ())
    )
    if not may_write:
        raise UsageError(f"{address}: the token may not write; {token_fix(write=True)}.")
    with hub_errors(address, writing=True):
        api = open_hub()
        try:
            is_private = api.repo_info(address.repo_id, repo_type=address.repo_type).private
        except RepositoryNotFoundError:
            _check_may_create(address, user)
            return
        api.auth_check(address.repo_id, repo_type=address.repo_type, write=True)
        if private and not is_private:
            raise UsageError(
                f"{address} exists and is public; make it private in its settings, name another one, or leave "
                "private out."
            )
        if tag is not None and tag in _tags(api, address):
            raise UsageError(f"{address} has a tag {tag} already; name another one.")


def push_to_hub(
    directory: Path,
    address: HubAddress,
    *,
    private: bool = False,
    tag: str | None = None,
    message: str | None = None,
    num_workers: int = NUM_WORKERS,
    max_bytes_per_s: float | None = None,
) -> HubRelease:
    """Publish an adapter directory or a dataset as one commit; nothing is sent if nothing has changed.

    Args:
        directory: what `hub_files.choose_files` takes of it.
        address: the repository, made if need be; its revision is the branch to commit to.
        private: make the repository private, and refuse one that is public.
        tag: for the commit; it may exist if it is of this same commit.
        message: the commit's.
        num_workers: uploads at a time.
        max_bytes_per_s: limit of the rate, of all requests together.

    Raises:
        UsageError: as `check_may_push`, and for a folder that can't be published there.
        RunError: somebody else committed meanwhile, or the Hub failed; nothing was published unless the tag alone is
            missing, which is then said.
    """
    _check_tag(tag)
    files, left_out = choose_files(directory, address)
    check_may_push(address, private=private)
    repository = {"repo_id": address.repo_id, "repo_type": address.repo_type}
    branch = address.revision or "main"
    with hub_rate(max_bytes_per_s), hub_errors(address, writing=True):
        api = open_hub()
        api.create_repo(**repository, private=private or None, exist_ok=True)
        head = find_head(api, repository, branch)
        entries = api.list_repo_tree(**repository, recursive=True, revision=head)
        there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        changed = {name: file for name, file in files.items() if not _is_same(file, there.get(name))}
        gone = [n for n in there if belongs(n, address.repo_type) and n not in files and n != CARD_NAME]
        tags = {} if tag is None else _tags(api, address)
        if tag in tags and (changed or gone or tags[tag] != head):
            raise UsageError(f"{address} has a tag {tag} already, of another commit; name another one.")
        commit = head
        if changed or gone:
            commit = api.create_commit(
                **repository,
                operations=[
                    *(CommitOperationAdd(name, _content(file)) for name, file in changed.items()),
                    *(CommitOperationDelete(name) for name in gone),
                ],
                commit_message=message or f"Publish with ACE-Step LoRA {__version__}",
                revision=branch,
                parent_commit=head,
                num_threads=num_workers,
            ).oid
        if tag is not None and tag not in tags:
            _tag(api, repository, tag, commit, address)
    return HubRelease(
        commit=commit,
        is_new=commit != head,
        url=f"{endpoint()}/{address.repository.partition('://')[2]}",
        num_files=len(changed),
        size_bytes=sum(_size(file) for file in changed.values()),
        left_out=tuple(left_out),
    )


def _check_tag(tag: str | None) -> None:
    if tag is not None and not _TAG.fullmatch(tag):
        raise UsageError(f"{one_line(tag)!r} is no tag; write letters, digits and . _ + -, e.g. v1.2.")


def _user(what: str) -> dict:
    """Who the token is of, and what it may do."""
    with hub_errors(what, writing=True):
        if get_token() is None:
            raise UsageError(f"{one_line(what)}: there is no token for the Hub; {token_fix(write=True)}.")
        return open_hub().whoami(cache=True)


def _check_may_create(address: HubAddress, user: dict) -> None:
    owner = address.repo_id.partition("/")[0]
    owners = [user["name"], *(o["name"] for o in user.get("orgs", ()) if o.get("roleInOrg") != "read")]
    if owner.lower() not in [name.lower() for name in owners]:
        raise UsageError(
            f"{address} doesn't exist, and the token can't make it: it is of {', '.join(owners)}; write one of these "
            "before the /."
        )


def _tags(api: HfApi, address: HubAddress) -> dict[str, str]:
    refs = api.list_repo_refs(address.repo_id, repo_type=address.repo_type)
    return {tag.name: tag.target_commit for tag in refs.tags}


def find_head(api: HfApi, repository: dict, branch: str) -> str:
    """The latest commit of a branch, which is made if need be."""
    try:
        return api.repo_info(**repository, revision=branch).sha
    except RevisionNotFoundError:
        api.create_branch(**repository, branch=branch, exist_ok=True)
        return api.repo_info(**repository, revision=branch).sha


def _tag(api: HfApi, repository: dict, tag: str, commit: str, address: HubAddress) -> None:
    try:
        api.create_tag(**repository, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        raise RunError(
            f"{address}: commit {commit[:12]} is published, but not tagged {tag} "
            f"({error.response.status_code}); run it again."
        ) from None


def _content(file: Path | bytes) -> str | bytes:
    return file if isinstance(file, bytes) else str(file)


def _size(file: Path | bytes) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def _is_same(file: Path | bytes, entry: RepoFile | None) -> bool:
    """Whether a file is what lies in the repository: by SHA-256 where LFS keeps it, else by git's SHA-1."""
    return entry is not None and entry.size == _size(file) and matches(file, entry)


def matches(file: Path | bytes, entry: RepoFile) -> bool:
    """Whether a file has the hash that the repository gives."""
    if entry.lfs is not None:
        found = hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else sha256(file)
        return found == entry.lfs.sha256
    content = file if isinstance(file, bytes) else file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.blob_id
