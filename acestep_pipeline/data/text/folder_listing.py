"""What lies in a data folder: audio, its sidecars, what can't be listed. Each directory is listed once."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..audio import AUDIO_SUFFIXES, AV_SUFFIXES
from .sidecars import Sidecars, is_other_text, match_sidecars
from .text_files import fold, one_line


@dataclass(frozen=True)
class FolderListing:
    """A folder's audio files, sorted by their path as text, and what lies beside them.

    `unmatched` are text files that belong to no audio file, relative to the folder; `top_names` are the names of all
    files directly in it; `unreadable` are directories that can't be listed, each with the reason.
    """

    folder: Path
    files: list[Path]
    sidecars: dict[Path, Sidecars]
    unmatched: list[str]
    top_names: list[str]
    unreadable: list[tuple[str, str]]

    def relative(self, file: Path) -> str:
        """A file's path relative to the folder, with forward slashes."""
        return file.relative_to(self.folder).as_posix()


def list_folder(folder: Path) -> FolderListing:
    """List a folder and all below it; hidden files and folders are left out.

    Links to folders are followed, each folder being read once.
    """
    directories: list[tuple[Path, list[str]]] = []
    unreadable: list[tuple[str, str]] = []
    seen = set()

    def name_unreadable(error: OSError) -> None:
        path = Path(error.filename).relative_to(folder).as_posix()
        unreadable.append((one_line(path), f"the directory can't be read ({error.strerror})"))

    for directory, folders, names in os.walk(folder, followlinks=True, onerror=name_unreadable):
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        directories.append((Path(directory), names))
    return _describe(folder, directories, unreadable)


def list_names(names: Iterable[str]) -> FolderListing:
    """The listing that `list_folder` would make of a folder with files of these names (relative to it, with /). Its
    paths are relative, too."""
    directories: dict[str, list[str]] = {}
    for name in names:
        above, _, last = name.rpartition("/")
        if not any(part.startswith(".") for part in above.split("/")):
            directories.setdefault(above, []).append(last)
    return _describe(Path(), [(Path(above), found) for above, found in directories.items()], [])


def _describe(
    folder: Path, directories: list[tuple[Path, list[str]]], unreadable: list[tuple[str, str]]
) -> FolderListing:
    """The listing of a folder, given the names of the files in each directory of it."""
    known = AUDIO_SUFFIXES | AV_SUFFIXES
    files: list[Path] = []
    sidecars: dict[Path, Sidecars] = {}
    unmatched: list[str] = []
    top_names: list[str] = []
    for here, names in directories:
        names = sorted(name for name in names if not name.startswith("."))
        if here == folder:
            top_names = names
        audio = [name for name in names if Path(name).suffix.lower() in known]
        matched, strays = match_sidecars(names, audio)
        sidecars |= {here / name: kinds for name, kinds in matched.items()}
        files += [here / name for name in audio]
        unmatched += [(here / name).relative_to(folder).as_posix() for name in strays if not is_other_text(name)]
    return FolderListing(
        folder=folder,
        files=sorted(files, key=lambda path: path.as_posix()),
        sidecars=sidecars,
        unmatched=sorted(unmatched),
        top_names=top_names,
        unreadable=sorted(unreadable),
    )


def describe_unmatched(unmatched: list[str]) -> list[tuple[str, str]]:
    """(name, warning) for text that belongs to no audio file; many in one directory share a sentence."""
    by_directory: dict[str, list[str]] = {}
    for name in unmatched:
        by_directory.setdefault(name.rpartition("/")[0], []).append(name)
    said = []
    for directory, names in by_directory.items():
        said += [(one_line(name), "it belongs to no audio file here; is it misspelt?") for name in names[:10]]
        if len(names) > 10:
            said.append(
                (one_line(directory) or ".", f"{len(names) - 10} more text files here belong to no audio file")
            )
    return said


def dataset_json_names(listing: FolderListing) -> list[str]:
    """Files in the folder's top that may be the official trainer's dataset JSON: those that are no track's sidecar."""
    return [name for name in listing.unmatched if "/" not in name and fold(name).endswith(".json")]
