"""`hf://` addresses, as huggingface_hub spells them: `hf://[datasets/]user/repo[@revision][/folder]`."""

from dataclasses import dataclass

from ..data.text.text_files import one_line
from ..errors import UsageError

SCHEME = "hf://"


@dataclass(frozen=True)
class HubAddress:
    """A repository on the Hub: `user/name`, `model` or `dataset`, the revision and the folder (or file) in it, if
    they were named."""

    repo_id: str
    repo_type: str
    revision: str | None = None
    folder: str = ""

    @property
    def repository(self) -> str:
        """The address without revision and folder."""
        return f"{SCHEME}{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo_id}"

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{at}{'/' * bool(self.folder)}{self.folder}"


def is_on_hub(location: str) -> bool:
    """Whether a location is an `hf://` address."""
    return str(location).startswith(SCHEME)


def parse_hub_address(address: str, *, kind: str | None = None) -> HubAddress:
    """Take an `hf://` address apart.

    Args:
        address: with `hf://`.
        kind: `model` or `dataset`, where only that will do.

    Raises:
        UsageError: it is no such address.
    """
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    shown = one_line(str(address))
    example = f"{SCHEME}{'datasets/' if kind == 'dataset' else ''}user/name"
    try:
        uri = parse_hf_uri(str(address))
    except HfUriError:
        raise UsageError(
            f"{shown} is no address on the Hub; write {example}, with @revision where it is not main."
        ) from None
    if uri.type not in ("model", "dataset") or (kind is not None and uri.type != kind):
        raise UsageError(f"{shown} is a {uri.type}, which this doesn't take; write {example}.")
    return HubAddress(uri.id, uri.type, uri.revision, uri.path_in_repo.strip("/"))
