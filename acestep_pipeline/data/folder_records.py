"""Reading a folder of audio with sidecars and tables as raw records of tracks: one of this machine, or one on S3 or
the Hub whose text alone is fetched."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..storage.remote_folder import RemoteFolder
from .remote_audio import RemoteAudio
from .text.fields import fill_missing
from .text.folder_listing import FolderListing, dataset_json_names, describe_unmatched, list_folder, list_names
from .text.sidecars import read_sidecars
from .text.tables import is_table, read_tables


@dataclass(frozen=True)
class FolderRecords:
    """The number of audio files, and a function that reads one's text; what can't be listed, and what is wrong with
    the text of the folder, each as (name, reason)."""

    total: int
    read_record: Callable[[int], dict]
    unreadable: list[tuple[str, str]]
    warnings: list[tuple[str, str]]


def local_records(folder: Path) -> FolderRecords:
    """The records of a folder of this machine."""
    listing = list_folder(folder)
    return _records(listing, folder, lambda name: folder / name)


def remote_records(remote: RemoteFolder) -> FolderRecords:
    """The records of a folder that lies elsewhere: sidecars and tables are fetched, audio is not."""
    listing = list_names(remote.files)
    wanted = [name for name in listing.top_names if is_table(name)] + dataset_json_names(listing)
    for file, sidecars in listing.sidecars.items():
        wanted += [(file.parent / name).as_posix() for names in sidecars.values() for name in names]
    return _records(listing, remote.keep(wanted), lambda name: RemoteAudio(remote, name))


def _records(listing: FolderListing, texts: Path, open_audio: Callable[[str], object]) -> FolderRecords:
    """The records of a listing whose text lies in the folder `texts`."""
    names = [listing.relative(file) for file in listing.files]
    table, warnings, used = read_tables(texts, listing.top_names, dataset_json_names(listing), names)
    warnings += describe_unmatched([name for name in listing.unmatched if name not in used])

    def read_record(index: int) -> dict:
        name, file = names[index], listing.files[index]
        record, found = read_sidecars(texts / PurePosixPath(name).parent, listing.sidecars[file])
        fill_missing(record, table.get(name, {}))
        return record | {"id": name, "audio": open_audio(name), "warnings": found, "ask_file": True}

    return FolderRecords(len(names), read_record, listing.unreadable, sorted(warnings))
