"""Where an adapter library's adapters lie: a folder, a bucket or repositories of the Hub, as names and addresses."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..errors import UsageError
from ..storage.copies import is_remote, local_copy
from ..storage.hub import download, hub_copy, list_files, looks_like_path
from ..storage.hub_address import is_on_hub, parse_hub_address
from ..storage.release_copy import read_local_release
from ..storage.release_manifest import MANIFEST_NAME, parse_manifest
from ..storage.s3_listing import list_names
from .formats.locate import choose_file

# The end of a collection's slug: `owner/title-<24 hexadecimal digits>`.
_COLLECTION = re.compile(r"(?:https://huggingface\.co/collections/)?([^/\s]+/[^/\s]+-[0-9a-f]{24})")


def list_adapters(root: str | os.PathLike | Sequence[str]) -> dict[str, str]:
    """The adapters under `root` by name, sorted, each with the address that `load_lora_weights` takes.

    Args:
        root: a folder, `s3://bucket/prefix` or `hf://user/repo` whose folders (and .safetensors files) are an adapter
            each; a collection of the Hub (its address, or `owner/title-<id>`); or a list of Hub ids, addresses,
            folders and files.

    Raises:
        UsageError: it can't be read, or holds no adapter.
    """
    if not isinstance(root, str | os.PathLike):
        found = _by_last_part([str(address) for address in root])
    elif is_remote(str(root)):
        found = _among(list_names(str(root)), str(root))
    elif is_on_hub(str(root)):
        found = _in_repository(str(root))
    elif Path(root).expanduser().is_dir():
        found = _in_folder(Path(root).expanduser())
    elif match := _COLLECTION.fullmatch(str(root)):
        found = _by_last_part(_in_collection(match[1]))
    else:
        raise UsageError(f"{root} is no folder, no s3:// address, no collection of the Hub and no list of adapters.")
    if not found:
        raise UsageError(f"{root} holds no adapters: it should have a folder, or a .safetensors file, for each.")
    return dict(sorted(found.items()))


def _in_folder(root: Path) -> dict[str, str]:
    files = {path.stem: str(path) for path in root.glob("*.safetensors")}
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return files | {folder.name: str(folder) for folder in folders if _holds_adapter(_names_in(folder))}


def _names_in(folder: Path) -> list[str]:
    """The names of a folder's files, or of those of the release that was published to it."""
    if manifest := read_local_release(folder):
        return [file.file for file in manifest.files]
    return [path.relative_to(folder).as_posix() for glob in ("*", "*/*") for path in folder.glob(glob)]


def _in_repository(url: str) -> dict[str, str]:
    address = parse_hub_address(url)
    names = list_files(address.repo_id, revision=address.revision, repo_type=address.repo_type)
    if names is None:
        raise UsageError(f"{address} can't be listed: the Hub can't be reached; give a list of its adapters.")
    below = f"{address.folder}/" if address.folder else ""
    return _among([name.removeprefix(below) for name in names if name.startswith(below)], url)


def _among(names: Iterable[str], url: str) -> dict[str, str]:
    """The adapters among the files below an address."""
    inside: dict[str, list[str]] = {}
    for file in names:
        folder, slash, name = file.partition("/")
        inside.setdefault(folder, []).append(name if slash else "")
    root = url.rstrip("/")
    return {
        name.removesuffix(".safetensors"): f"{root}/{name}"
        for name, files in inside.items()
        if (files == [""] and name.endswith(".safetensors")) or _holds_adapter(files)
    }


def _holds_adapter(names: Iterable[str]) -> bool:
    try:
        choose_file(names, "")
    except UsageError:
        return False
    return True


def _in_collection(slug: str) -> list[str]:
    try:
        return [item.item_id for item in HfApi().get_collection(slug).items if item.item_type == "model"]
    except OfflineModeIsEnabled:
        raise UsageError(f"the collection {slug} can't be listed offline; give a list of its Hub ids.") from None
    except (HfHubHTTPError, ConnectionError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = "there is none that you can see" if status in (401, 403, 404) else "the Hub can't be reached"
        raise UsageError(f"the collection {slug} can't be listed: {reason}.") from error


def _by_last_part(addresses: list[str]) -> dict[str, str]:
    """Named `jazz` for `someone/jazz`; by the whole address where two would have the same name."""
    names = [PurePosixPath(address).name.removesuffix(".safetensors") for address in addresses]
    return {
        name if names.count(name) == 1 else address: address for name, address in zip(names, addresses, strict=True)
    }


def read_manifest(address: str) -> tuple[Path, dict[str, str]]:
    """The folder on this machine that stands for an adapter's address, and the SHA-256 of files in it that its
    publisher gave in `manifest.json`, by name; none where there is no manifest.

    Raises:
        UsageError: the manifest can't be read.
    """
    here = Path(address).expanduser()
    if here.is_dir() and (manifest := read_local_release(here)):
        return local_copy(address, choose=lambda names: ()), {file.file: file.sha256 for file in manifest.files}
    folder = _manifest_folder(address)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return folder, {}
    manifest = parse_manifest(path.read_bytes(), f"the {MANIFEST_NAME} of {address}")
    return folder, {file.file: file.sha256 for file in manifest.files}


def _manifest_folder(address: str) -> Path:
    if is_remote(address):
        if address.endswith(".safetensors"):
            address = address.rpartition("/")[0]
        return local_copy(address, choose=lambda names: set(names) & {MANIFEST_NAME}, show_progress=False)
    if is_on_hub(address):
        if address.endswith(".safetensors"):
            address = address.rpartition("/")[0]
        return hub_copy(address, choose=lambda names: set(names) & {MANIFEST_NAME} or names[:1])
    path = Path(address).expanduser()
    if path.exists() or looks_like_path(address):
        return path if path.is_dir() else path.parent
    return download(address, [MANIFEST_NAME], revision=None, cache_dir=None, partly=True)
