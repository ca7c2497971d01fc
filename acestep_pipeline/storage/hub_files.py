"""Which files of a folder go to the Hub, as an adapter or as a dataset, and what they are called there."""

import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ..data.audio import AUDIO_SUFFIXES, AV_SUFFIXES
from ..data.text.text_files import one_line
from ..errors import UsageError
from ..model_card import card_in_repository
from ..paths import LORA_WEIGHTS_NAME, PEFT_CONFIG_NAME, PEFT_DIR, PEFT_WEIGHTS_NAME
from .hub_address import HubAddress
from .release_manifest import files_to_publish

CARD_NAME = "README.md"
# The card that building a dataset leaves beside it.
DATASET_CARD_NAME = "dataset_card.md"
# Of an adapter directory, whoever wrote it. A star stands for no slash.
_OF_ADAPTER = (
    "*.safetensors",
    PEFT_CONFIG_NAME,
    f"{PEFT_DIR}/{PEFT_WEIGHTS_NAME}",
    f"{PEFT_DIR}/{PEFT_CONFIG_NAME}",
    "comfyui/*.safetensors",
    f"best/{LORA_WEIGHTS_NAME}",
    "training_args.json",
    "metrics.jsonl",
    "validation.jsonl",
    "effect.json",
    CARD_NAME,
    "LICENSE*",
    "samples/*.wav",
    "samples/*.flac",
    "samples/*.ogg",
    "loss.png",
    "update_norms.png",
)
_OF_DATASET = AUDIO_SUFFIXES | AV_SUFFIXES | {
    ".arrow", ".parquet", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".lrc", ".caption", ".md", ".html"
}  # fmt: skip
_DATASET_STATES = ("state.json", "dataset_dict.json")


def belongs(name: str, repo_type: str) -> bool:
    """Whether a file of this name (with /) is of the kind that is published in such a repository."""
    path = PurePosixPath(name)
    if repo_type == "dataset":
        return path.suffix.lower() in _OF_DATASET or path.name.startswith("LICENSE")
    return any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in _OF_ADAPTER)


def choose_files(directory: Path, address: HubAddress) -> tuple[dict[str, Path | bytes], list[str]]:
    """The files to publish by their names in the repository (a card with its content), and the names of the others.

    Raises:
        UsageError: there is no such folder, or it is not what the address is for.
    """
    directory = Path(directory).expanduser()
    names, left_out = files_to_publish(directory)
    chosen = [name for name in names if belongs(name, address.repo_type)]
    left_out = sorted([*left_out, *(name for name in names if name not in chosen)])
    shown = one_line(str(directory))
    is_dataset = any(name in chosen or name in left_out for name in _DATASET_STATES)
    if address.repo_type == "model":
        if is_dataset:
            raise UsageError(f"{shown} is a dataset; write hf://datasets/{address.repo_id}.")
        if not any(name.endswith(".safetensors") for name in chosen):
            raise UsageError(f"{shown} holds no {LORA_WEIGHTS_NAME}: it is no adapter directory.")
    elif LORA_WEIGHTS_NAME in names or PEFT_WEIGHTS_NAME in names:
        raise UsageError(f"{shown} is an adapter; write hf://{address.repo_id}.")
    elif not chosen:
        raise UsageError(f"{shown} holds no data (audio, text, Arrow); name the folder of a dataset.")
    files: dict[str, Path | bytes] = {name: directory / name for name in chosen}
    if address.repo_type == "model" and CARD_NAME in files:
        files[CARD_NAME] = card_in_repository(_read(files[CARD_NAME]), address.repo_id).encode()
    elif is_dataset:
        _check_complete(directory, shown)
        card = next((name for name in (CARD_NAME, DATASET_CARD_NAME) if name in files), None)
        files[CARD_NAME] = _dataset_card(_read(files[card]) if card else "", list(files)).encode()
    return files, left_out


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{one_line(str(path))} is not UTF-8; save it as such.") from None


def _dataset_card(text: str, names: list[str]) -> str:
    """The card, whose metadata say which files the data are: `datasets.load_dataset` would take the JSON for it."""
    import yaml

    found = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    try:
        metadata = (yaml.safe_load(found[1]) if found else None) or {}
    except yaml.YAMLError:
        raise UsageError(f"the metadata of {CARD_NAME} or {DATASET_CARD_NAME} are no YAML; correct them.") from None
    if not isinstance(metadata, dict) or "configs" in metadata:
        return text
    folders = sorted({name.rpartition("/")[0] for name in names if name.endswith(".arrow")})
    files = [{"split": folder or "train", "path": f"{folder}/*.arrow".lstrip("/")} for folder in folders]
    metadata["configs"] = [{"config_name": "default", "data_files": files}]
    body = text[found.end() :] if found else text
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{body}"


def _check_complete(directory: Path, shown: str) -> None:
    """Refuse a dataset that only refers to audio files of this machine."""
    from datasets import Audio, DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(directory))
    except Exception as error:  # datasets raises many types for a damaged directory
        raise UsageError(f"{shown} is a damaged dataset ({type(error).__name__}); build it again.") from error
    for dataset in loaded.values() if isinstance(loaded, DatasetDict) else [loaded]:
        if "audio" not in dataset.column_names:
            continue
        audio = dataset.cast_column("audio", Audio(decode=False)).data.column("audio")
        if any(chunk.field("bytes").null_count for chunk in audio.chunks):
            raise UsageError(f"{shown} only refers to audio files on this machine; build it again without --link.")
