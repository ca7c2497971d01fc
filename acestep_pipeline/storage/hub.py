"""Files of a repository on the Hub, or from its cache where the Hub can't be reached."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import UsageError


def looks_like_path(name: str) -> bool:
    """Whether a name is no Hub id (user/name)."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith(".safetensors")


def download(
    repo: str,
    patterns: list[str],
    *,
    revision: str | None,
    cache_dir: str | None,
    token: str | None = None,
    partly: bool = False,
) -> Path:
    """Files of a repository, from the cache where the Hub can't be reached: all of them, or `partly` what is there.

    Raises:
        UsageError: there is no such repository or revision, or it can't be reached and the cache lacks it.
    """
    try:
        return Path(
            snapshot_download(repo, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=patterns)
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _not_found(repo, revision) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        if partly and isinstance(error, IncompleteSnapshotError):
            return Path(error.snapshot_path)
        raise UsageError(
            f"{repo!r} is no folder here, the Hub can't be reached, and the cache has no complete copy: "
            "check the network, or give a folder or 'tiny'."
        ) from error


def list_files(repo: str, *, revision: str | None, token: str | None = None) -> list[str] | None:
    """The names of a repository's files; None where the Hub can't be reached.

    Raises:
        UsageError: there is no such repository or revision.
    """
    try:
        return HfApi(token=token).list_repo_files(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _not_found(repo, revision) from error
    except (HfHubHTTPError, ConnectionError, OfflineModeIsEnabled):
        return None


def _not_found(repo: str, revision: str | None) -> UsageError:
    at = f" at revision {revision!r}" if revision else ""
    return UsageError(
        f"the Hub has no model {repo!r}{at} that you can see; check the name (private: `hf auth login`)."
    )
