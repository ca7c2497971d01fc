"""Tracks: audio with its text, from a folder of whatever people have or from a `datasets` directory.

Where the text is looked for, and which source is believed first, is in `sidecars`.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..engines import map_in_order
from ..errors import UsageError
from ..progress import progress_bar
from ..storage.remote_folder import RemoteFolder
from .audio import AUDIO_SUFFIXES, AudioError
from .dataset_rows import EmbeddedAudio
from .remote_audio import AudioFacts, RemoteAudio, read_facts, remote_facts
from .remote_rows import RemoteRow
from .text.fields import fill_missing
from .text.folder_listing import list_folder
from .text.normalisation import normalise_rights, normalise_tags, normalise_text
from .text.text_files import one_line
from .text.variants import TextOptions, describe_wordings
from .track_sources import open_source


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
    of the file. It adds `repeats` visits to an epoch, and its `sampling_weight` says what share of all visits one of
    them is (`batching.Visits`). `trigger_word` and `trigger_position` are its own, each empty where the run's hold
    (`text.variants`); the tags are without it. `machine_made` names the text fields that a program filled in and no
    person.
    """

    id: str
    audio: Path | EmbeddedAudio | RemoteAudio | RemoteRow
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
    repeats: int = 1
    trigger_word: str = ""
    trigger_position: str = ""
    machine_made: tuple[str, ...] = ()
    rights: Rights = Rights()

    @property
    def source(self) -> Path | bytes:
        """The path, or the bytes of the encoded file, read anew each time: a dataset need not fit in memory.

        Of audio that lies elsewhere (`RemoteAudio`) each reading is a download, or of a `RemoteRow` of the shard that
        it is in, unless that is here still. Raises as its `read`.
        """
        return _source(self.audio)


def _source(audio: Path | EmbeddedAudio | RemoteAudio | RemoteRow) -> Path | bytes:
    return audio if isinstance(audio, Path) else audio.read()


@dataclass(frozen=True)
class Problem:
    """Something about one track that the user must know; `skipped` if the track is left out for it."""

    track: str
    reason: str
    skipped: bool


@dataclass(frozen=True)
class _Examined:
    """A raw record, and what its audio is or why it can't be used."""

    record: dict
    facts: AudioFacts | None = None
    refusal: str = ""


def load_tracks(
    train_data_dir: str | Path | RemoteFolder | None = None,
    *,
    dataset_name: str | None = None,
    split: str = "train",
    min_duration_s: float = 0.0,
    max_train_samples: int | None = None,
    seed: int = 0,
    genre_from_folder: bool = False,
    judge_tags: bool = True,
    show_progress: bool = True,
) -> tuple[list[Track], list[Problem]]:
    """Read the tracks of a folder, a `datasets` directory or a Hub dataset, in a fixed order.

    Args:
        train_data_dir: a folder of audio with sidecars, a directory written by `Dataset.save_to_disk`, or one of
            Parquet files; of an `s3://bucket/prefix` or `hf://datasets/user/name` the copy in the cache is brought up
            to date and read. Of a `RemoteFolder` (`track_sources.locate`) text alone is fetched, and audio
            (`RemoteAudio`, `RemoteRow`) when it is read; the tracks are the same.
        dataset_name: instead of the folder, a Hub id or anything `datasets.load_dataset` takes.
        split: which rows of a dataset; a folder of audio, and a dataset on disk without splits, have no others.
        min_duration_s: shorter tracks are skipped.
        max_train_samples: only so many usable tracks, drawn from all of them by `seed`.
        seed: for `max_train_samples`.
        genre_from_folder: a track whose genre no sidecar or table gives takes the name of its folder.
        judge_tags: name tracks that have no tags.
        show_progress: draw a progress bar.

    Returns:
        The usable tracks, and the problems found (skipped tracks and warnings).

    Raises:
        UsageError: there is no such folder, or no track in it is usable.
        RunError: a file that is streamed changed meanwhile, or the connection broke.
    """
    source = open_source(train_data_dir, dataset_name=dataset_name, split=split, show_progress=show_progress)
    problems = [Problem(name, reason, skipped=True) for name, reason in source.unreadable]
    problems += [Problem(name, warning, skipped=False) for name, warning in source.warnings]
    order = list(range(source.total))
    if max_train_samples is not None:
        random.Random(seed).shuffle(order)
    tracks, ids = {}, set()

    def examine(index: int) -> _Examined:
        record = source.read_record(index)
        if genre_from_folder:
            above = PurePosixPath(record["id"]).parent.name or Path(source.name).absolute().name
            fill_missing(record, {"genre": above})
        return _examine(record)

    examined = map_in_order(examine, order, num_workers=source.num_readers)
    with progress_bar(total=source.total, desc="Reading tracks", unit="track", disable=not show_progress) as bar:
        for index in order:
            if max_train_samples is not None and len(tracks) >= max_train_samples:
                break
            result = next(examined)
            track, found = _to_track(result, _unique_id(result.record["id"] or str(index), ids), min_duration_s)
            problems += found
            if track is not None:
                tracks[index] = track
                if judge_tags:
                    problems += [Problem(track.id, reason, skipped=False) for reason in describe_missing_tags(track)]
            bar.update()
    examined.close()
    if not tracks:
        raise UsageError(_nothing_usable(source.name, source.total, problems))
    return [tracks[index] for index in sorted(tracks)], problems


def describe_missing_tags(track: Track) -> list[str]:
    """A sentence about a track that nobody described, or none."""
    if track.trigger_word or (track.tags and track.tags != normalise_tags(track.genre)):
        return []
    instead = "its genre alone" if track.tags else "an empty caption"
    return [f"it has no tags and trains with {instead}; describe it in a .tags.txt beside it"]


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
    reasons = "; ".join(f"{problem.track}: {problem.reason}" for problem in problems if problem.skipped)
    if total:
        return f"none of the {total} audio files in {source} is usable: {reasons[:2000]}"
    suffixes = ", ".join(sorted(suffix.lstrip(".") for suffix in AUDIO_SUFFIXES))
    unread = f" ({reasons[:2000]})" if reasons else ""
    return f"{source} has no audio files{unread} ({suffixes}); put your tracks there, with a .tags.txt beside each."


def find_audio_files(folder: Path) -> list[Path]:
    """Audio files under `folder`, sorted by their path as text, as `list_folder` finds them."""
    return list_folder(folder).files


def _examine(record: dict) -> _Examined:
    """Probe and hash the audio of a record, and ask the tags inside it for what is still missing."""
    audio = record["audio"]
    try:
        if isinstance(audio, RemoteRow):
            facts = audio.facts()
        elif isinstance(audio, RemoteAudio):
            facts = remote_facts(audio)
        else:
            facts = read_facts(_source(audio), with_tags=record["ask_file"])
    except (AudioError, OSError) as error:
        return _Examined(record, refusal=str(error))
    if record["ask_file"]:
        record["warnings"] += facts.warnings
        fill_missing(record, facts.tags)
    return _Examined(record, facts)


def _to_track(examined: _Examined, name: str, min_duration_s: float) -> tuple[Track | None, list[Problem]]:
    """Normalise the text of a record whose audio can be used."""
    record, facts = examined.record, examined.facts
    problems = [Problem(name, warning, skipped=False) for warning in record["warnings"]]
    if facts is None:
        return None, [*problems, Problem(name, examined.refusal, skipped=True)]
    info = facts.info
    if info.duration_s < min_duration_s:
        reason = f"it is {info.duration_s:.1f} s long, shorter than the {min_duration_s:g} s asked for"
        return None, [*problems, Problem(name, reason, skipped=True)]
    text, warnings = normalise_text(record)
    rights, more = normalise_rights(record)
    problems += [Problem(name, warning, skipped=False) for warning in warnings + more]
    track = Track(
        id=name,
        audio=record["audio"],
        **text,
        rights=Rights(**rights),
        duration_s=info.duration_s,
        sample_rate=info.sample_rate,
        channels=info.channels,
        sha256=facts.sha256,
    )
    return track, problems


def doubts_about_text(tracks: list[Track], text: TextOptions) -> list[Problem]:
    """What a run's text options won't do as hoped for these tracks."""
    described = [(track.tags, track.genre, track.trigger_word) for track in tracks]
    return [Problem(flag, reason, skipped=False) for flag, reason in describe_wordings(described, text)]


def count_triggers(tracks: list[Track], text: TextOptions) -> list[dict]:
    """Each `trigger_word` in use with its `trigger_position` and the number of `tracks` told it, most used first."""
    counts = Counter(text.trigger_of(track.trigger_word, track.trigger_position) for track in tracks)
    return [
        {"trigger_word": word, "trigger_position": position, "tracks": count}
        for (word, position), count in counts.most_common()
        if word
    ]


def dataset_fingerprint(tracks: list[Track]) -> str:
    """SHA-256 over all of every track that training looks at: equal for equal data, wherever it lies."""
    digest = hashlib.sha256()
    unseen, unless_given = (
        {"audio", "machine_made", "rights"},
        {"repeats": 1, "trigger_word": "", "trigger_position": ""},
    )
    for track in sorted(tracks, key=lambda track: track.id):
        fields = {
            name: value
            for name, value in vars(track).items()
            if name not in unseen and (name not in unless_given or value != unless_given[name])
        }
        digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()


def describe_problems(problems: list[Problem], *, limit: int = 40) -> list[str]:
    """The problems as lines for a person, skipped tracks first."""
    lines = [f"  skipped  {problem.track}: {problem.reason}" for problem in problems if problem.skipped]
    lines += [f"  warning  {problem.track}: {problem.reason}" for problem in problems if not problem.skipped]
    return lines if len(lines) <= limit else [*lines[:limit], f"  … and {len(lines) - limit} more"]
