"""Where an adapter is: a file, a folder of any trainer, a repository on the Hub, a folder on S3."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import torch

from ...errors import UsageError
from ...paths import COMFYUI_DIR, LORA_WEIGHTS_NAME, PEFT_CONFIG_NAME, PEFT_DIR, PEFT_WEIGHTS_NAME, check_addresses
from ...storage.copies import is_remote, local_copy
from ...storage.hub import download, hub_copy, list_files, looks_like_path
from ...storage.hub_address import is_on_hub
from ...storage.release_copy import read_local_release
from .read import read_adapter
from .record import Adapter
from .tensor_files import PICKLE_SUFFIXES, from_state_dict, open_tensors, pickle_error

# What a folder is searched for, in this order: diffusers and ours; PEFT, and where the official trainer and ours put
# it; Side-Step's LyCORIS files.
_KNOWN_NAMES = (
    LORA_WEIGHTS_NAME,
    PEFT_WEIGHTS_NAME,
    f"adapter/{PEFT_WEIGHTS_NAME}",
    f"{PEFT_DIR}/{PEFT_WEIGHTS_NAME}",
    "lokr_weights.safetensors",
    "loha_weights.safetensors",
)


def load_adapter(
    source: str | os.PathLike | dict[str, torch.Tensor],
    *,
    layer_shapes: Mapping[str, tuple[int, int]] | None = None,
    strict: bool = True,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Adapter:
    """Find an adapter, check it and read it.

    Args:
        source: a file, a folder (also one that was published to), a Hub id, an `s3://` or `hf://` address, or a state
            dict.
        layer_shapes: the transformer's (`install.layer_shapes`); None checks the file against itself alone.
        strict: whether doubts are errors, as in `read.read_adapter`.
        weight_name, subfolder: which file of a folder or repository.
        revision, cache_dir, token: the Hub's.

    Raises:
        UsageError: it is not there, or is a pickle, or damaged.
        ValueError: what is in it can't be used.
    """
    if isinstance(source, dict):
        return read_adapter(from_state_dict(source), layer_shapes=layer_shapes, strict=strict)
    path = locate(
        str(source), weight_name=weight_name, subfolder=subfolder, revision=revision, cache_dir=cache_dir, token=token
    )
    config = _read_config(path)
    stored = open_tensors(path)
    return read_adapter(stored, config=config, path=path, layer_shapes=layer_shapes, strict=strict)


def locate(
    source: str,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Path:
    """The weights' file on this machine, fetched with what belongs to it and nothing else."""
    check_addresses(source)
    wanted = {"weight_name": weight_name, "subfolder": subfolder}
    hub = {"revision": revision, "cache_dir": cache_dir, "token": token}
    path = Path(source).expanduser()
    on_hub = is_on_hub(source)
    if on_hub or is_remote(source) or (path.is_dir() and read_local_release(path)):
        folder, name = source.rstrip("/"), weight_name
        if PurePosixPath(source).suffix == ".safetensors" or PurePosixPath(source).suffix in PICKLE_SUFFIXES:
            folder, _, name = source.rpartition("/")
        chosen: list[str] = []

        def choose(names: list[str]) -> Iterable[str]:
            chosen.append(choose_file(names, source, weight_name=name, subfolder=subfolder))
            return _with_companions(chosen[0])

        if on_hub:
            return hub_copy(folder, choose=choose, **hub) / chosen[0]
        return local_copy(folder, choose=choose, show_progress=False) / chosen[0]
    if path.is_dir():
        names = [
            file.relative_to(path).as_posix()
            for pattern in ("*", "*/*")
            for file in path.glob(pattern)
            if subfolder is None or pattern == "*/*"
        ]
        if subfolder is not None:
            names += [file.relative_to(path).as_posix() for file in (path / subfolder).glob("*")]
        return path / choose_file(names, source, **wanted)
    if path.is_file():
        return path
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise pickle_error(path)
    if looks_like_path(source):
        raise UsageError(f"the adapter {source} does not exist.")
    names = list_files(source, revision=revision, token=token)
    if names is None:
        below = f"{subfolder}/" if subfolder else ""
        patterns = [f"{below}{name}" for name in ([weight_name] if weight_name else _KNOWN_NAMES)]
        cached = download(source, [f"{below}*{PEFT_CONFIG_NAME}", *patterns], **hub, partly=True)
        names = [file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file()]
        return cached / choose_file(names, source, **wanted)
    chosen_name = choose_file(names, source, **wanted)
    return download(source, list(_with_companions(chosen_name)), **hub) / chosen_name


def choose_file(
    names: Iterable[str], source: str, *, weight_name: str | None = None, subfolder: str | None = None
) -> str:
    """Which of a folder's files holds the adapter.

    Raises:
        UsageError: none does, or several could.
    """
    below = f"{subfolder.strip('/')}/" if subfolder else ""
    inside = {name.removeprefix(below) for name in names if name.startswith(below)}
    if weight_name is not None:
        if weight_name not in inside:
            raise UsageError(f"{source} holds no {below}{weight_name}.")
        return below + weight_name
    for name in _KNOWN_NAMES:
        if name in inside:
            return below + name
    files = sorted(name for name in inside if name.endswith(".safetensors"))
    files = [name for name in files if "/" not in name] or [
        name for name in files if name.startswith(f"{COMFYUI_DIR}/")
    ]
    if len(files) == 1:
        return below + files[0]
    if files:
        raise UsageError(f"{source} holds several adapters ({', '.join(files[:9])}); name the file itself.")
    pickles = sorted(name for name in inside if PurePosixPath(name).suffix in PICKLE_SUFFIXES and "/" not in name)
    if pickles:
        raise pickle_error(f"{source.rstrip('/')}/{below}{pickles[0]}")
    raise UsageError(f"{source} holds no {LORA_WEIGHTS_NAME} or other .safetensors file: it is no adapter directory.")


def _with_companions(name: str) -> Iterable[str]:
    """An adapter's file, and what belongs to it."""
    folder = PurePosixPath(name).parent
    return [name, *((folder / companion).as_posix() for companion in (PEFT_CONFIG_NAME, "training_args.json"))]


def _read_config(path: Path) -> dict | None:
    """PEFT's configuration beside its file, or {} where it is missing; None if this is no file of PEFT's."""
    config_path = path.with_name(PEFT_CONFIG_NAME)
    if path.name == LORA_WEIGHTS_NAME or not (config_path.is_file() or path.name == PEFT_WEIGHTS_NAME):
        return None
    if not config_path.is_file():
        return {}
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{config_path} can't be read as JSON ({error}); copy it again.") from error
    if not isinstance(config, dict):
        raise UsageError(f"{config_path} holds no JSON object; copy it again.")
    return config
