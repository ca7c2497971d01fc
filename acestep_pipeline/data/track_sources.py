"""Where tracks are read from: a folder of audio or a dataset, on this machine, on S3 or the Hub."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..storage.copies import local_copy
from ..storage.remote_folder import RemoteFolder, can_stream, open_remote_folder
from .dataset_rows import are_dataset, disk_records, hub_records, is_dataset
from .folder_records import FolderRecords, local_records, remote_records
from .remote_rows import remote_rows

# Hashing and probing wait for the disk and release the interpreter's lock.
MAX_READERS = 4


@dataclass(frozen=True)
class TrackSource:
    """The number of raw records at a place that messages call `name`, and a function that reads one, for so many
    threads at a time; what can't be listed, and what is wrong with the text of a folder, each as (name, reason)."""

    name: str
    total: int
    read_record: Callable[[int], dict]
    num_readers: int = 1  # a dataset's rows are read from one file
    unreadable: tuple[tuple[str, str], ...] = ()
    warnings: tuple[tuple[str, str], ...] = ()


def locate(place: str | Path, *, streaming: bool, show_progress: bool = True) -> Path | RemoteFolder:
    """Where data is read: the folder itself; of an address a copy in the cache, which is brought up to date, or with
    `streaming` the address, of which `MAX_READERS` files are fetched at a time.

    Raises as `local_copy` and `open_remote_folder`.
    """
    if streaming and can_stream(place):
        return open_remote_folder(str(place), num_workers=MAX_READERS)
    return local_copy(str(place), show_progress=show_progress).expanduser()


def open_source(
    place: str | Path | RemoteFolder | None, *, dataset_name: str | None, split: str, show_progress: bool
) -> TrackSource:
    """The records of a folder, a dataset on disk, one on the Hub (`dataset_name`, if it is not None) or a
    `RemoteFolder`.

    Raises:
        UsageError: there is no such folder, it is damaged, or has no such split.
        RunError: a file that is streamed changed meanwhile, or the connection broke.
    """
    if dataset_name is not None:
        return TrackSource(dataset_name, *hub_records(dataset_name, split))
    if isinstance(place, RemoteFolder):
        if are_dataset(place.files):
            return TrackSource(place.place, *remote_rows(place, split, show_progress=show_progress))
        return _folder_source(place.place, remote_records(place), num_readers=MAX_READERS)
    folder = locate(place, streaming=False, show_progress=show_progress)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; name one that holds audio.")
    if is_dataset(folder):
        return TrackSource(str(folder), *disk_records(folder, split))
    return _folder_source(str(folder), local_records(folder), num_readers=min(MAX_READERS, os.cpu_count() or 1))


def _folder_source(name: str, records: FolderRecords, *, num_readers: int) -> TrackSource:
    return TrackSource(
        name, records.total, records.read_record, num_readers, tuple(records.unreadable), tuple(records.warnings)
    )
