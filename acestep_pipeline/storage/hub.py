"""Files of a repository on the Hub, or from its cache where the Hub can't be reached."""

import contextlib
import fnmatch
import functools
import glob
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from ..data.text.text_files import one_line
from ..errors import RunError, UsageError
from ..files import sha256
from ..paths import without_secrets
from .checked_files import find_damaged
from .hub_address import HubAddress, parse_hub_address
from .release_manifest import MANIFEST_NAME, check_names

# To connect, and then for the first answer: huggingface_hub itself waits for ever.
_TIMEOUT = httpx2.Timeout(6.0)
# How often what arrives damaged is fetched.
_ATTEMPTS = 3


class NothingThere(UsageError):
    """There is no such repository, revision or folder that the token may see."""


def looks_like_path(name: str) -> bool:
    """Whether a name is no Hub id (user/name)."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith(".safetensors")


def download(
    repo: str,
    patterns: list[str] | None,
    *,
    revision: str | None,
    cache_dir: str | None,
    token: str | None = None,
    partly: bool = False,
    repo_type: str = "model",
) -> Path:
    """Files of a repository, from the cache where the Hub can't be reached: all of them, or `partly` what is there.

    Each file's content must be what its name in the cache says: the SHA-256 that the Hub gives of large files, or
    git's hash. One that is not is fetched again.

    Raises:
        UsageError: there is no such repository or revision, or it can't be reached and the cache lacks it.
        RunError: a file arrives damaged again and again.
    """
    try:
        for _ in range(_ATTEMPTS):
            snapshot = Path(
                snapshot_download(
                    repo,
                    repo_type=repo_type,
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    allow_patterns=patterns,
                    local_files_only=not _answers(),
                )
            )
            files = {path.resolve(): path for path in _chosen(snapshot, patterns)}
            damaged = find_damaged(files, _is_what_it_is_called)
            if not damaged:
                return snapshot
            for blob in damaged:
                blob.unlink(missing_ok=True)
                files[blob].unlink(missing_ok=True)
        name = files[damaged[0]].relative_to(snapshot)
        raise RunError(f"{repo}: {name} arrived damaged {_ATTEMPTS} times; run it again later.")
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _not_found(HubAddress(repo, repo_type, revision)) from error
    except HfHubHTTPError as error:
        raise _refused(HubAddress(repo, repo_type, revision), error, writing=False) from error
    except (LocalEntryNotFoundError, ConnectionError, httpx2.TransportError) as error:
        if partly and isinstance(error, IncompleteSnapshotError):
            return Path(error.snapshot_path)
        raise UsageError(
            f"{repo!r} is no folder here, the Hub can't be reached ({endpoint()}), and the cache has no complete "
            "copy: check the network, or give a folder or 'tiny'."
        ) from error


def _chosen(snapshot: Path, patterns: list[str] | None) -> Iterator[Path]:
    for path in snapshot.rglob("*"):
        name = path.relative_to(snapshot).as_posix()
        if path.is_file() and (patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)):
            yield path


def _is_what_it_is_called(blob: Path) -> bool:
    """Whether a file of the Hub's cache has the hash that is its name; one with another kind of name passes."""
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return sha256(blob) == blob.name
    if re.fullmatch(r"[0-9a-f]{40}", blob.name):
        content = blob.read_bytes()  # a small file: large ones are not kept in git
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == blob.name
    return True


def cached_blob_ids(repo: str, commit: str, *, cache_dir: str | None) -> dict[str, str]:
    """What names the content of each file of a commit; nothing where the cache doesn't know its files."""
    try:
        return {file.path: file.blob_id for file in get_cached_repo_tree(repo, revision=commit, cache_dir=cache_dir)}
    except CachedRepoTreeNotFoundError:
        return {}


def list_files(
    repo: str, *, revision: str | None, token: str | None = None, repo_type: str = "model"
) -> list[str] | None:
    """The names of a repository's files; None where the Hub can't be reached.

    Raises:
        UsageError: there is no such repository or revision.
    """
    if not _answers():
        return None
    try:
        return HfApi(token=token).list_repo_files(repo, revision=revision, repo_type=repo_type)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _not_found(HubAddress(repo, repo_type, revision)) from error
    except (HfHubHTTPError, ConnectionError, httpx2.TransportError):
        return None


def hub_copy(
    address: str,
    *,
    choose: Callable[[list[str]], Iterable[str]] | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Path:
    """The folder in the Hub's cache that holds what is at an `hf://` address, brought up to date: all of it, or what
    `choose` takes of the files' names (relative to the address). While the Hub can't be reached it is what is cached.

    Args:
        revision: where the address has none.
        cache_dir, token: the Hub's.

    Raises:
        UsageError: there is no such repository, revision or folder, a name in it is not safe, or the Hub can't be
            reached and the cache lacks it; and as `choose` does.
        RunError: the Hub failed.
    """
    wanted = parse_hub_address(address)
    below = f"{wanted.folder}/" if wanted.folder else ""
    repository = {"revision": wanted.revision or revision, "token": token, "repo_type": wanted.repo_type}
    with hub_errors(wanted):
        names = list_files(wanted.repo_id, **repository)
    repository["cache_dir"] = cache_dir
    if names is None:
        # All of it is there, or, where a part is wanted, at least something.
        cached = download(wanted.repo_id, None, **repository, partly=choose is not None)
        names = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
    inside = [name.removeprefix(below) for name in names if name.startswith(below)]
    check_names((name for name in inside if name != MANIFEST_NAME), str(wanted))
    if not inside:
        raise UsageError(f"{wanted} holds no files; correct the folder's name.")
    chosen = [name for name in (inside if choose is None else choose(inside)) if name in inside]
    return download(wanted.repo_id, [glob.escape(below + name) for name in chosen], **repository) / wanted.folder


def open_hub() -> HfApi:
    """The Hub, having answered. Call it within `hub_errors`."""
    _ask(constants.ENDPOINT)
    return HfApi()


@functools.cache
def _ask(hub: str) -> None:
    get_session().head(hub, timeout=_TIMEOUT, follow_redirects=False)


def _answers() -> bool:
    try:
        _ask(constants.ENDPOINT)
    except (OfflineModeIsEnabled, httpx2.HTTPError, httpx2.InvalidURL):
        return False
    return True


def endpoint() -> str:
    """The Hub's address, as it may be shown."""
    return without_secrets(constants.ENDPOINT)


@contextlib.contextmanager
def hub_errors(address: HubAddress | str, *, writing: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises while reading (or `writing`) into one sentence."""
    try:
        yield
    except GatedRepoError:
        raise UsageError(f"{address} is gated; ask for access on its page, {endpoint()}.") from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if isinstance(address, HubAddress):
            raise _not_found(address) from error
        raise UsageError(f"{address}: there is none that you can see; check the name.") from error
    except HFValidationError as error:
        raise UsageError(f"{address}: {one_line(str(error))}") from None
    except HfHubHTTPError as error:
        raise _refused(address, error, writing=writing) from None
    except OfflineModeIsEnabled:
        raise UsageError(f"{address} can't be reached while HF_HUB_OFFLINE is set; unset it.") from None
    except (httpx2.TransportError, httpx2.InvalidURL, LocalEntryNotFoundError) as error:
        # Why the Hub gave no file, where the library only says that it isn't cached either.
        reason = (isinstance(error, LocalEntryNotFoundError) and error.__cause__) or error
        if isinstance(reason, HfHubHTTPError):
            raise _refused(address, reason, writing=writing) from None
        raise UsageError(
            f"{address}: {endpoint()} can't be reached ({type(reason).__name__}); check the network, or HF_ENDPOINT."
        ) from None


def _refused(address: HubAddress | str, error: HfHubHTTPError, *, writing: bool) -> UsageError | RunError:
    status = error.response.status_code
    if status == 401:
        return UsageError(f"{address}: {endpoint()} refuses the token; {token_fix()}.")
    if status == 403:
        what = "write there" if writing else "read it"
        return UsageError(f"{address}: the token may not {what} (403); {token_fix(write=writing)}.")
    if status in (409, 412):
        return RunError(
            f"{address}: another commit came first ({status}), and yours was not made; look at it, and run it again."
        )
    if status == 429:
        return RunError(f"{address}: {endpoint()} takes no more requests for now (429); run it again later.")
    if status >= 500:
        return RunError(f"{address}: {endpoint()} is busy or broken ({status}); run it again later.")
    said = one_line((error.server_message or "").strip())[:300]
    return UsageError(f"{address}: {endpoint()} refused it ({status}{': ' if said else ''}{said}).")


def token_fix(*, write: bool = False) -> str:
    """What to do about a token that is missing or not enough."""
    kind = "one with write access" if write else "one"
    return f"make {kind} at {endpoint()}/settings/tokens, and set HF_TOKEN to it or run `hf auth login`"


def _not_found(address: HubAddress) -> NothingThere:
    at = f" at revision {address.revision!r}" if address.revision else ""
    return NothingThere(
        f"the Hub has no {address.repo_type} {address.repo_id!r}{at} that you can see; check the name (private: "
        "`hf auth login`)."
    )
