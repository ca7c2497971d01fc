"""Shards of a dataset on S3 or the Hub: files of many rows, each of them fetched whole when a row is to be read."""

import contextlib
import json
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..paths import check_room
from ..progress import quiet_datasets
from ..storage.copies import file_errors
from ..storage.remote_folder import RemoteFolder
from ..storage.s3 import shown
from .dataset_rows import cause, undecoded

# So many lie on the disk. Tracks are decoded ahead of those that are encoded, which may be in the shard before.
KEPT_SHARDS = 2


@dataclass(frozen=True, eq=False)
class Shard:
    """One Parquet or Arrow file of a dataset. `read_as` is JSON, and all that decides about its rows beside the file:
    of Parquet what the columns hold, if that isn't what the file says; of Arrow `dataset_info.json` and `state.json`.
    """

    folder: RemoteFolder
    name: str
    read_as: dict | None

    @property
    def address(self) -> str:
        return f"{shown(self.folder.place)}/{self.name}"

    def key(self) -> list:
        """JSON that tells its rows from any others."""
        return [*self.folder.key(self.name), self.read_as]

    def open(self):
        """Fetch it, and give an `undecoded` dataset of its rows.

        They are on the disk, as files without a name, until the dataset is let go of or this process ends, in whatever
        way. Raises as `RemoteFolder.fetched`, and `UsageError` for a damaged file.
        """
        load = _load_arrow if self.name.endswith(".arrow") else _load_parquet
        with file_errors(Path(tempfile.gettempdir())):
            # A network's file system keeps a file that is in use under another name, in the folder.
            with tempfile.TemporaryDirectory(prefix="ace-step-", ignore_cleanup_errors=True) as scratch:
                return undecoded(load(self, Path(scratch)), self.address)


def _load_parquet(shard: Shard, scratch: Path):
    """What is kept are its rows in Arrow's format, of which any can be read alone; the file goes."""
    from datasets import Dataset, Features

    features = shard.read_as and Features.from_dict(shard.read_as)
    check_room(scratch, 2 * shard.folder.files[shard.name].size)  # sound is as large in either
    with shard.folder.fetched(shard.name) as file, loading(shard.address), quiet_datasets():
        return Dataset.from_parquet(str(file), cache_dir=str(scratch), features=features)


def _load_arrow(shard: Shard, scratch: Path):
    """As the only file of what `Dataset.save_to_disk` wrote."""
    from datasets import load_from_disk

    with shard.folder.fetched(shard.name) as file:
        os.replace(file, scratch / file.name)
    state = shard.read_as["state.json"] | {"_data_files": [{"filename": file.name}]}
    for name, content in (shard.read_as | {"state.json": state}).items():
        (scratch / name).write_text(json.dumps(content), encoding="utf-8")
    with reading(shard.address):
        return load_from_disk(str(scratch))


class Shelf:
    """The shards that lie on the disk: the `KEPT_SHARDS` that were read last, of whatever datasets.

    One thread at a time reads or fetches: so none is let go of while it is read, and none fetched by two threads.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kept: OrderedDict[str, object] = OrderedDict()

    @contextlib.contextmanager
    def reading(self, shard: Shard) -> Iterator:
        """The rows of a shard, an `undecoded` dataset to be used within the context. Raises as `Shard.open`."""
        key = json.dumps(shard.key())
        with self._lock:
            if key not in self._kept:
                while len(self._kept) >= KEPT_SHARDS:
                    self._kept.popitem(last=False)
                self._kept[key] = shard.open()
            self._kept.move_to_end(key)
            yield self._kept[key]

    def close(self) -> None:
        """Let go of all of them; those that are read again are fetched again."""
        with self._lock:
            self._kept.clear()


# This process's.
SHELF = Shelf()


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """Name what lies at `source` as damaged, where `datasets` can't read it as what `save_to_disk` wrote."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # datasets raises many types
        raise UsageError(f"{source} is a damaged dataset ({cause(error)}); build it again.") from error


@contextlib.contextmanager
def loading(source: str, folder: Path | None = None) -> Iterator[None]:
    """Name what lies at `source`, of which `folder` is a likeness, where `datasets` can't load it."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # datasets raises many types
        reason = cause(error).replace(str(folder), source) if folder else cause(error)
        raise UsageError(f"the dataset {source} can't be loaded: {reason}") from error
