"""Tracks: audio with its text, from a folder with sidecar files or from a `datasets` directory.

What the text may look like, and what becomes of it, is in `sidecars`.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..progress import progress_bar
from .audio import AUDIO_SUFFIXES, AudioError, probe_audio
from .sidecars import normalise_text, one_line, read_sidecars, read_table, text_fields

# Files that look like audio to a person but that libsndfile can't read; named in the summary, never passed over.
UNSUPPORTED_SUFFIXES = frozenset({".m4a", ".aac", ".mp4", ".wma", ".webm", ".mka", ".ape", ".ac3", ".alac"})


@dataclass(frozen=True)
class Rights:
    """Whose a recording is and where it comes from, as far as anyone said; training does not look at it."""

    title: str = ""
    artist: str = ""
    rights_holder: str = ""
    isrc: str = ""
    license: str = ""
    source: str = ""


@dataclass(frozen=True)
class Track:
    """One piece of audio and what is known about it.

    `audio` says where the encoded file is, `source` gives it; `duration_s`, `sample_rate` and `channels` are those
    of the file. `sampling_weight` is the mean number of visits in an epoch, `machine_made` names the text fields that
    a program filled in and no person.
    """

    id: str
    audio: "Path | EmbeddedAudio"
    tags: str
    lyrics: str
    language: str
    genre: str
    bpm: int | None
    keyscale: str | None
    timesignature: str | None
    duration_s: float
    sample_rate: int
    channels: int
    sha256: str
    sampling_weight: float = 1.0
    machine_made: tuple[str, ...] = ()
    rights: Rights = Rights()

    @property
    def source(self) -> Path | bytes:
        """The path, or the bytes of the encoded file, read anew each time: a dataset need not fit in memory."""
        return _source(self.audio)


@dataclass(frozen=True, eq=False)
class EmbeddedAudio:
    """The encoded file in one row of a `datasets.Dataset`."""

    dataset: object
    index: int


def _source(audio: Path | EmbeddedAudio) -> Path | bytes:
    if isinstance(audio, Path):
        return audio
    row = audio.dataset[audio.index]["audio"] or {}
    return row.get("bytes") or b""


@dataclass(frozen=True)
class Problem:
    """Something about one track that the user must know; `skipped` if the track is left out for it."""

    track: str
    reason: str
    skipped: bool


def load_tracks(
    train_data_dir: str | Path | None = None,
    *,
    dataset_name: str | None = None,
    min_duration_s: float = 0.0,
    max_train_samples: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> tuple[list[Track], list[Problem]]:
    """Read the tracks of a folder, a `datasets` directory or a Hub dataset, in a fixed order.

    Args:
        train_data_dir: a folder of audio with sidecars, or a directory written by `Dataset.save_to_disk`.
        dataset_name: instead of the folder, a Hub id (split `train`) or anything `datasets.load_dataset` takes.
        min_duration_s: shorter tracks are skipped.
        max_train_samples: only so many usable tracks, drawn from all of them by `seed`.
        seed: for `max_train_samples`.
        show_progress: draw a progress bar.

    Returns:
        The usable tracks, and the problems found (skipped tracks and warnings).

    Raises:
        UsageError: there is no such folder, or no track in it is usable.
    """
    problems: list[Problem] = []
    if dataset_name is not None:
        source, total, read_record = dataset_name, *_hub_records(dataset_name)
    else:
        source = Path(train_data_dir).expanduser()
        if str(train_data_dir).startswith("s3://"):
            raise UsageError(f"--train_data_dir {train_data_dir}: copy it to a folder first; only folders are read.")
        if not source.is_dir():
            raise UsageError(f"--train_data_dir {source} is not a folder; name one that holds audio.")
        if (source / "state.json").is_file() or (source / "dataset_dict.json").is_file():
            total, read_record = _disk_records(source)
        else:
            files = find_audio_files(source)
            table, warnings = read_table(source)
            total, read_record = len(files), lambda index: _folder_record(source, files[index], table)
            names = {file.relative_to(source).as_posix() for file in files}
            warnings += [
                (one_line(name), "it is in the folder's table but not there") for name in table.keys() - names
            ]
            problems += [Problem(name, warning, skipped=False) for name, warning in sorted(warnings)]
    order = list(range(total))
    if max_train_samples is not None:
        random.Random(seed).shuffle(order)
    tracks, ids = {}, set()
    with progress_bar(total=total, desc="Reading tracks", unit="track", disable=not show_progress) as bar:
        for index in order:
            if max_train_samples is not None and len(tracks) >= max_train_samples:
                break
            record = read_record(index)
            record["id"] = _unique_id(str(record["id"]), ids)
            track, found = _to_track(record, min_duration_s)
            problems += found
            if track is not None:
                tracks[index] = track
            bar.update()
    if not tracks:
        raise UsageError(_nothing_usable(str(source), total, problems))
    return [tracks[index] for index in sorted(tracks)], problems


def _unique_id(name: str, taken: set[str]) -> str:
    """`name` on one printable line, numbered if another track has it."""
    name = unique = one_line(name)
    number = 1
    while unique in taken:
        number += 1
        unique = f"{name} ({number})"
    taken.add(unique)
    return unique


def _nothing_usable(source: str, total: int, problems: list[Problem]) -> str:
    if not total:
        suffixes = ", ".join(sorted(suffix.lstrip(".") for suffix in AUDIO_SUFFIXES))
        return f"{source} has no audio files ({suffixes}); put your tracks there, with a .tags.txt beside each."
    reasons = "; ".join(f"{problem.track}: {problem.reason}" for problem in problems if problem.skipped)
    return f"none of the {total} audio files in {source} is usable: {reasons[:2000]}"


def find_audio_files(folder: Path) -> list[Path]:
    """Audio files under `folder`, sorted by their path as text; hidden files and folders are left out.

    Links to folders are followed, each folder being read once.

    Raises:
        UsageError: a folder can't be listed.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"the folder {error.filename} can't be read ({error.strerror}).") from error

    known = AUDIO_SUFFIXES | UNSUPPORTED_SUFFIXES
    found, seen = [], set()
    for directory, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(directory, name) for name in names if not name.startswith(".")]
    return sorted((path for path in found if path.suffix.lower() in known), key=lambda path: path.as_posix())


def _folder_record(folder: Path, file: Path, table: dict[str, dict]) -> dict:
    record, warnings = read_sidecars(file)
    name = file.relative_to(folder).as_posix()
    return {**table.get(name, {}), **record, "id": name, "audio": file, "warnings": warnings}


def _disk_records(directory: Path) -> tuple[int, Callable[[int], dict]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(directory))
    except Exception as error:  # datasets raises many types for a damaged directory
        raise UsageError(
            f"--train_data_dir {directory} is a damaged dataset ({_cause(error)}); build it again."
        ) from error
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise UsageError(f"--train_data_dir {directory} has no split 'train' (it has {', '.join(dataset)}).")
        dataset = dataset["train"]
    return _dataset_records(dataset, str(directory))


def _hub_records(name: str) -> tuple[int, Callable[[int], dict]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split="train")
    except Exception as error:  # datasets raises many types for a missing or unreachable dataset
        raise UsageError(f"--dataset_name {name} can't be loaded: {_cause(error)}") from error
    return _dataset_records(dataset, name)


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _dataset_records(dataset, source: str) -> tuple[int, Callable[[int], dict]]:
    """The number of rows, and a function that reads one."""
    from datasets import Audio

    if "audio" not in dataset.column_names:
        raise UsageError(f"the dataset {source} has no column 'audio' (it has {', '.join(dataset.column_names)}).")
    try:
        dataset = dataset.cast_column("audio", Audio(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"the column 'audio' of the dataset {source} holds no audio ({_cause(error)}).") from error

    def read_record(index: int) -> dict:
        try:
            row = dataset[index]
        except Exception as error:  # pyarrow raises many types for a damaged file
            raise UsageError(f"row {index} of the dataset {source} can't be read ({_cause(error)}).") from error
        audio = row["audio"] or {"bytes": b"", "path": None}
        path = audio.get("path")
        warnings: list[str] = []
        return {
            **text_fields(row, warnings),
            "id": row.get("id") or path or str(index),
            "audio": Path(path) if path and audio.get("bytes") is None else EmbeddedAudio(dataset, index),
            "warnings": warnings,
        }

    return len(dataset), read_record


def _to_track(record: dict, min_duration_s: float) -> tuple[Track | None, list[Problem]]:
    """Probe the audio and normalise the text of one record."""
    name = record["id"]
    problems = [Problem(name, warning, skipped=False) for warning in record["warnings"]]
    try:
        source = _source(record["audio"])
        info = probe_audio(source)
        digest = _sha256(source)
    except (AudioError, OSError) as error:
        return None, [*problems, Problem(name, str(error), skipped=True)]
    if info.duration_s < min_duration_s:
        reason = f"it is {info.duration_s:.1f} s long, shorter than --min_duration_s {min_duration_s:g}"
        return None, [*problems, Problem(name, reason, skipped=True)]
    text, warnings = normalise_text(record)
    problems += [Problem(name, warning, skipped=False) for warning in warnings]
    track = Track(
        id=name,
        audio=record["audio"],
        **text,
        duration_s=info.duration_s,
        sample_rate=info.sample_rate,
        channels=info.channels,
        sha256=digest,
    )
    return track, problems


def _sha256(audio: Path | bytes) -> str:
    if isinstance(audio, bytes):
        return hashlib.sha256(audio).hexdigest()
    with audio.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dataset_fingerprint(tracks: list[Track]) -> str:
    """SHA-256 over all of every track that training looks at: equal for equal data, wherever it lies."""
    digest = hashlib.sha256()
    for track in sorted(tracks, key=lambda track: track.id):
        unseen = {"audio", "machine_made", "rights"}
        fields = {name: value for name, value in vars(track).items() if name not in unseen}
        digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()


def describe_problems(problems: list[Problem], *, limit: int = 40) -> list[str]:
    """The problems as lines for a person, skipped tracks first."""
    lines = [f"  skipped  {problem.track}: {problem.reason}" for problem in problems if problem.skipped]
    lines += [f"  warning  {problem.track}: {problem.reason}" for problem in problems if not problem.skipped]
    return lines if len(lines) <= limit else [*lines[:limit], f"  … and {len(lines) - limit} more"]
