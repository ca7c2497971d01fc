"""Reading the rows of a `datasets` directory or a Hub dataset as raw records of tracks."""

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import UsageError
from .audio import AUDIO_SUFFIXES
from .text.fields import FIELD_NAMES, canonical_name, text_fields

# Columns that describe the music; a dataset without any of them is asked for the tags inside its files.
_DESCRIPTIVE = {name for field in ("tags", "lyrics", "genre", "bpm", "keyscale") for name in FIELD_NAMES[field]}

# Of what `save_to_disk` writes, the file that says so.
STATES = frozenset({"state.json", "dataset_dict.json"})

# The number of records, and a function that reads one.
Records = tuple[int, Callable[[int], dict]]


@dataclass(frozen=True, eq=False)
class EmbeddedAudio:
    """The encoded file in one row of a `datasets.Dataset`."""

    dataset: object
    index: int

    def read(self) -> bytes:
        """The bytes of the file; none where the row has none."""
        row = self.dataset[self.index]["audio"] or {}
        return row.get("bytes") or b""


def is_dataset(directory: Path) -> bool:
    """Whether a directory is one that `disk_records` reads."""
    return any((directory / name).is_file() for name in STATES) or holds_parquet(directory)


def are_dataset(names: Collection[str]) -> bool:
    """Whether a directory with files of these names (relative to it, with /) is one that `disk_records` reads."""
    return not STATES.isdisjoint(names) or are_parquet(names)


def holds_parquet(directory: Path) -> bool:
    """Whether a directory is a dataset as most on the Hub are: Parquet files, and no audio beside them."""
    paths = [path for pattern in ("*", "*/*") for path in Path(directory).glob(pattern)]
    return are_parquet([path.relative_to(directory).as_posix() for path in paths])


def are_parquet(names: Iterable[str]) -> bool:
    """Whether files of these names are such a dataset."""
    found = {PurePosixPath(name).suffix.lower() for name in names if name.count("/") < 2}
    return ".parquet" in found and not AUDIO_SUFFIXES.intersection(found)


def disk_splits(directory: Path) -> tuple[str, ...]:
    """Names of the splits of a directory that `DatasetDict.save_to_disk` wrote, or of one of Parquet files; none where
    it is something else."""
    if holds_parquet(directory):
        return hub_splits(str(directory))
    try:
        return tuple(json.loads((directory / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()  # no such directory, or a damaged one, which `disk_records` names


def hub_splits(name: str) -> tuple[str, ...]:
    """Names of the splits of anything `datasets.load_dataset` takes; none where `hub_records` would fail."""
    from datasets import get_dataset_split_names

    try:
        return tuple(get_dataset_split_names(name))
    except Exception:  # datasets raises many types for a missing or unreachable dataset
        return ()


def disk_records(directory: Path, split: str) -> Records:
    """The rows of a directory that `Dataset.save_to_disk` wrote, or of Parquet files; of one split.

    Raises:
        UsageError: it is damaged, or has no such split.
    """
    from datasets import DatasetDict, load_from_disk

    if holds_parquet(directory):
        return hub_records(str(directory), split)
    try:
        dataset = load_from_disk(str(directory))
    except Exception as error:  # datasets raises many types for a damaged directory
        raise UsageError(f"{directory} is a damaged dataset ({cause(error)}); build it again.") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise no_such_split(str(directory), split, dataset)
        dataset = dataset[split]
    return row_records(undecoded(dataset, str(directory)), str(directory))


def hub_records(name: str, split: str) -> Records:
    """The rows of one split of anything `datasets.load_dataset` takes. Raises `UsageError` where it can't be had."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:  # datasets raises many types for a missing or unreachable dataset
        if (splits := hub_splits(name)) and split not in splits:
            raise no_such_split(name, split, splits) from error
        what = f"the dataset {name}" if Path(name).is_dir() else f"--dataset_name {name}"
        raise UsageError(f"{what} can't be loaded: {cause(error)}") from error
    return row_records(undecoded(dataset, name), name)


def no_such_split(source: str, split: str, splits: Iterable[str]) -> UsageError:
    """The error that a dataset has other splits."""
    return UsageError(f"the dataset {source} has no split {split!r} (it has {', '.join(splits)}).")


def cause(error: Exception) -> str:
    """Why `datasets` failed, on one line."""
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__  # itself it only says that there was an error
    return " ".join(str(error).split())[:300] or type(error).__name__


def undecoded(dataset, source: str):
    """A `datasets.Dataset` whose column `audio` gives encoded files as they are.

    Raises:
        UsageError: it has no such column, or one of something else.
    """
    from datasets import Audio

    if "audio" not in dataset.column_names:
        raise UsageError(f"the dataset {source} has no column 'audio' (it has {', '.join(dataset.column_names)}).")
    try:
        return dataset.cast_column("audio", Audio(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"the column 'audio' of the dataset {source} holds no audio ({cause(error)}).") from error


def row_records(dataset, source: str) -> Records:
    """The rows of an `undecoded` dataset; a row that has neither an id nor a file's name has an empty id."""
    from datasets import ClassLabel

    classes = {name: feature for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
    described = any(canonical_name(name) in _DESCRIPTIVE for name in dataset.column_names)

    def read_record(index: int) -> dict:
        try:
            row = dataset[index]
        except Exception as error:  # pyarrow raises many types for a damaged file
            raise UsageError(f"row {index} of the dataset {source} can't be read ({cause(error)}).") from error
        audio = row["audio"] or {"bytes": b"", "path": None}
        path = audio.get("path")
        warnings: list[str] = []
        return {
            **text_fields(_name_classes(row, classes), warnings),
            "id": str(row.get("id") or path or ""),
            "audio": Path(path) if path and audio.get("bytes") is None else EmbeddedAudio(dataset, index),
            "warnings": warnings,
            "ask_file": not described,
        }

    return len(dataset), read_record


def _name_classes(row: dict, classes: dict) -> dict:
    """Numbers of classes as their names; a class `label` of music is its genre, not its publisher."""
    row = dict(row)
    for name, feature in classes.items():
        value = row.pop(name)
        if value is not None and 0 <= value < feature.num_classes:
            row["genre" if name == "label" and not row.get("genre") else name] = feature.int2str(value)
    return row
