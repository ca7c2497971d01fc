"""The files beside a track that say what it is, and the order in which they are believed.

A track's text comes from four kinds of sources. Each field (tags, lyrics, bpm, …) is taken from the first that has it:

1. sidecars of the track, matched whatever their case, by `song` or by `song.mp3`:
   - tags: `song.tags.txt`, then `song.txt`, then `song.caption` or `song.caption.txt`;
   - lyrics: `song.lyrics.txt`, then `song.lrc` (timestamps are kept);
   - `song.txt` may also be lines of `caption: …`, `genre: …`, `bpm: …`, `key: …`, `signature: …` and, last, `lyrics:`
     with the lines that follow, as Side-Step writes; where it has structure tags or timestamps it holds the lyrics, as
     the official trainer's may; else all of it is tags;
   - everything: `song.json`, under our names, the official trainer's or Side-Step's (`fields.FIELD_NAMES`);
2. a table in the data folder's top (`tables`): `metadata.jsonl`, `metadata.csv`, any other csv with a column that
   names files, the official trainer's dataset JSON under any name;
3. the folder's name as genre, where the dataset builder is told so;
4. the tags inside the audio file (`file_tags`).

An empty `.lyrics.txt` says that nobody sings; empty tags say nothing. What can't be read or used is left out with a
warning, and the next source is asked.
"""

import fnmatch
import json
import os
import re
from pathlib import Path

from .fields import FIELD_NAMES, KNOWN_NAMES, canonical_name, fill_missing, text_fields
from .text_files import fold, one_line, read_text

# What a file is by its end, the longest end first, since `song.tags.txt` ends in `.txt` as well.
_KINDS = {
    ".caption.txt": "caption",
    ".lyrics.txt": "lyrics",
    ".tags.txt": "tags",
    ".caption": "caption",
    ".json": "json",
    ".lrc": "lrc",
    ".txt": "text",
}
# The order of belief.
_ORDER = ("tags", "lyrics", "lrc", "text", "caption", "json")
# Text files that are nobody's sidecar and no mistake either.
_OTHERS = (
    "readme*", "license*", "licence*", "copying*", "copyright*", "credits*", "notice*", "authors*", "changelog*",
    "*.license.txt", "*.licence.txt", "metadata.*", "requirements*.txt", "report.json", "dataset_info*.json",
    "dataset_dict.json", "state.json", "demo.json",
)  # fmt: skip
_KEY_LINE = re.compile(r"\s*([A-Za-z][A-Za-z _-]{0,30}?)\s*:\s*(.*)")
_SUNG = re.compile(
    r"^\s*\[\s*(?:verse|chorus|pre-?chorus|intro|outro|bridge|hook|refrain|interlude|break|drop|inst|\d+:\d\d)",
    re.I | re.M,
)
# A comma after one of these means that the line is tags which happen to begin with `bpm: 90`.
_SINGLE_VALUES = {"bpm", "keyscale", "timesignature", "language"}

Sidecars = dict[str, list[str]]


def match_sidecars(names: list[str], audio_names: list[str]) -> tuple[dict[str, Sidecars], list[str]]:
    """Which files of one directory belong to which audio file of it.

    A sidecar belongs to the files whose name, with or without its ending, it has before its own ending: exactly where
    there is such a file, else whatever the case. So `song.txt` describes both `song.mp3` and `song.flac`.

    Args:
        names: all file names in the directory.
        audio_names: those that are audio.

    Returns:
        For each audio file its sidecars' names by kind, the closest first; and the names that belong to none.
    """
    stems = {name: os.path.splitext(name)[0] for name in audio_names}
    exact = {*stems, *stems.values()}
    owners: dict[str, list[str]] = {}
    for name, stem in stems.items():
        for key in {fold(name), fold(stem)}:
            owners.setdefault(key, []).append(name)
    found: dict[str, dict[str, list[tuple]]] = {name: {} for name in audio_names}
    unmatched = []
    for name in sorted(set(names) - stems.keys()):
        folded = fold(name)
        options = [(kind, len(end)) for end, kind in _KINDS.items() if folded.endswith(end)]
        matched = False
        for kind, length in options:
            base, folded_base = name[:-length], folded[:-length]
            tracks = owners.get(folded_base, [])
            if base in exact:
                tracks = [track for track in tracks if base in (track, stems[track])]
            for track in tracks:
                rank = (folded_base != fold(track), base not in (track, stems[track]), name)
                found[track].setdefault(kind, []).append((rank, name))
            if tracks:
                matched = True
                break
        if options and not matched and not name.startswith("."):
            unmatched.append(name)
    return {
        track: {kind: [name for _, name in sorted(ranked)] for kind, ranked in kinds.items()}
        for track, kinds in found.items()
    }, unmatched


def is_other_text(name: str) -> bool:
    """A read-me, a licence, a table or a report: text that is no track's sidecar."""
    return any(fnmatch.fnmatchcase(fold(name), pattern) for pattern in _OTHERS)


def read_sidecars(directory: Path, sidecars: Sidecars) -> tuple[dict, list[str]]:
    """What a track's sidecars say about it, the most believed first for each field.

    Args:
        directory: where they lie.
        sidecars: their names by kind, as `match_sidecars` gives them.

    Returns:
        The raw fields found, and warnings about sidecars that can't be used.
    """
    record: dict = {}
    warnings: list[str] = []
    for kind in _ORDER:
        for name in sidecars.get(kind, ()):
            text = read_text(directory / name, warnings)
            if text is not None:
                fill_missing(record, _sidecar_fields(kind, text, one_line(name), warnings))
                break
    return record, warnings


def _sidecar_fields(kind: str, text: str, name: str, warnings: list[str]) -> dict:
    if kind == "json":
        values = parse_json(text)
        if isinstance(values, dict):
            return text_fields(values, warnings)
        warnings.append(f"{name} is not a JSON object and is left out")
        return {}
    if kind == "text":
        pairs = _key_values(text)
        if pairs is not None:
            return text_fields(pairs, warnings)
    if kind in ("lyrics", "lrc") or (kind == "text" and _SUNG.search(text)):
        return {"lyrics": text}
    return {"tags": text} if text.strip() else {}


def parse_json(text: str) -> object:
    """The value of a JSON text, None where it is none, or is nested or has numbers beyond what Python reads."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _key_values(text: str) -> dict[str, str] | None:
    """The fields of a text whose first line is `name: value` with a known name, else None.

    A line without a known name continues the value before it; after `lyrics:` all lines are lyrics.
    """
    lines = text.strip().splitlines()
    first = _KEY_LINE.fullmatch(lines[0]) if lines else None
    if first is None or canonical_name(first[1]) not in KNOWN_NAMES:
        return None
    if "," in first[2] and any(canonical_name(first[1]) in FIELD_NAMES[field] for field in _SINGLE_VALUES):
        return None
    values: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        pair = _KEY_LINE.fullmatch(line) if name not in FIELD_NAMES["lyrics"] else None
        if pair and canonical_name(pair[1]) in KNOWN_NAMES:
            name, line = canonical_name(pair[1]), pair[2]
        values.setdefault(name, []).append(line)
    return {name: "\n".join(lines).strip() for name, lines in values.items()}
