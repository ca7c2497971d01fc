"""Which files of a dataset on S3 or the Hub make its splits, and how each is read: as `datasets` itself says.

Nothing but text is fetched for that: a README.md and JSON.
"""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ..errors import UsageError
from ..storage.copies import file_errors
from ..storage.remote_folder import RemoteFolder
from ..storage.s3 import shown
from .dataset_rows import STATES, are_parquet
from .remembered import remembered
from .remote_shards import SHELF, Shard, loading, reading

# Beside the names of the files, what `datasets.load_dataset` looks at before it reads any.
_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
# And what `Dataset.save_to_disk` writes beside the files of a split.
_STATE_OF_SPLIT = ("dataset_info.json", "state.json")


@functools.lru_cache(maxsize=4)  # of a run's training and held-out data, each asked for its splits and for two of them
def find_splits(remote: RemoteFolder) -> dict[str, Callable[[], list[Shard]]]:
    """The splits of a dataset, in its order, each with a function that gives its shards in theirs; of one that
    `Dataset.save_to_disk` wrote, a single one without a name.

    The function may fetch a shard, to see what the columns hold. Raises `UsageError` where it is damaged, or nothing
    that can be streamed.
    """
    return _parquet_splits(remote) if are_parquet(remote.files) else _arrow_splits(remote)


# --- as save_to_disk writes them ------------------------------------------------------------------------------------


def _arrow_splits(remote: RemoteFolder) -> dict[str, Callable[[], list[Shard]]]:
    names = [name for name in remote.files if PurePosixPath(name).name in {*STATES, *_STATE_OF_SPLIT}]
    texts = remote.keep(names)
    with reading(shown(remote.place)):
        if "state.json" in remote.files:
            below = {"": ""}
        else:
            below = {name: f"{name}/" for name in _read_json(texts / "dataset_dict.json")["splits"]}
        shards = {split: _arrow_shards(remote, texts, folder) for split, folder in below.items()}
    return {split: functools.partial(list, found) for split, found in shards.items()}


def _arrow_shards(remote: RemoteFolder, texts: Path, below: str) -> list[Shard]:
    _check_there(remote, [below + name for name in _STATE_OF_SPLIT])
    content = {name: _read_json(texts / below / name) for name in _STATE_OF_SPLIT}
    names = [below + file["filename"] for file in content["state.json"].pop("_data_files")]
    _check_there(remote, names)
    return [Shard(remote, name, content) for name in names]


def _check_there(remote: RemoteFolder, names: list[str]) -> None:
    for name in names:
        if name not in remote.files:
            raise FileNotFoundError(f"{name} is missing")


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# --- of Parquet files -----------------------------------------------------------------------------------------------


def _parquet_splits(remote: RemoteFolder) -> dict[str, Callable[[], list[Shard]]]:
    files, features = _ask_datasets(remote)
    first = next(name for names in files.values() for name in names)

    def shards(names: list[str]) -> list[Shard]:
        # What columns hold is said in the README, or else by the first file for all.
        read_as = features or _features_of(Shard(remote, first, None))
        return [Shard(remote, name, None if name == first and not features else read_as) for name in names]

    return {split: functools.partial(shards, names) for split, names in files.items()}


def _ask_datasets(remote: RemoteFolder) -> tuple[dict[str, list[str]], dict | None]:
    """The files of each split, and what the columns hold where the README says that; of a folder of empty files with
    the same names."""
    from datasets import load_dataset_builder

    address = shown(remote.place)
    cards = [name for name in _CARDS if name in remote.files]
    texts = remote.keep(cards) if cards else None
    with file_errors(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="ace-step-") as scratch:
        folder = Path(scratch).resolve() / "dataset"
        for name in remote.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        for name in cards:
            shutil.copyfile(texts / name, folder / name)
        with loading(address, folder):
            builder = load_dataset_builder(str(folder), cache_dir=f"{scratch}/cache")
        config = builder.config
        if builder.name != "parquet" or config.columns is not None or config.filters is not None:
            raise UsageError(
                f"{address} is read by `datasets` as {builder.name}, or with `columns` or `filters` of its README.md, "
                "which can't be streamed; leave --streaming out."
            )
        files = {
            str(split): [str(name).removeprefix(f"{folder.as_posix()}/") for name in names]
            for split, names in config.data_files.items()
        }
        if not all(name in remote.files for names in files.values() for name in names):
            raise UsageError(f"the README.md of {address} names files elsewhere; leave --streaming out.")
        return files, builder.info.features and builder.info.features.to_dict()


def _features_of(shard: Shard) -> dict:
    def read() -> dict:
        with SHELF.reading(shard) as dataset:
            return dataset.features.to_dict()

    return remembered("remote-features", shard.key(), read, dict)
