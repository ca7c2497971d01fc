"""The text of a track: from sidecar files or a dataset's row, as anyone writes it, to the fields of `Track`.

First the raw fields are gathered (`read_sidecars`, `text_fields`), then they are normalised (`normalise_text`).
Neither raises for what a user wrote: a value that can't be used is left out with a warning.
"""

import csv
import errno
import io
import json
import unicodedata
from pathlib import Path

from ..conditioning import INSTRUMENTAL

# What the model was trained with (`timesignature` is the number of beats in a bar).
TIME_SIGNATURES = ("2", "3", "4", "6")
BPM_RANGE = (30, 300)
# Names that a JSON sidecar or a dataset's columns may use for each text field, the first found wins.
FIELD_NAMES = {
    "tags": ("tags", "caption", "prompt"),
    "lyrics": ("lyrics",),
    "genre": ("genre",),
    "bpm": ("bpm",),
    "keyscale": ("keyscale", "key"),
    "timesignature": ("timesignature", "time_signature"),
    "language": ("language", "vocal_language"),
}
# One table for a whole folder, the first found is read; the column that names a row's audio file.
TABLE_NAMES = ("metadata.jsonl", "metadata.csv")
FILE_COLUMNS = ("file_name", "filename", "file", "path")


def read_table(folder: Path) -> tuple[dict[str, dict], list[tuple[str, str]]]:
    """What `metadata.jsonl` or `metadata.csv` in `folder` says about its tracks, a row each.

    The names are those of the `datasets` library's folders: `file_name` is the path relative to the table, the other
    columns are those of a JSON sidecar. Sidecars overrule the table.

    Returns:
        Fields by relative path with forward slashes, and (name, warning) about the table or its rows.
    """
    path = next((folder / name for name in TABLE_NAMES if (folder / name).is_file()), None)
    if path is None:
        return {}, []
    unreadable: list[str] = []
    text = _read_text(path, unreadable)
    warnings = [(path.name, warning) for warning in unreadable]
    table: dict[str, dict] = {}
    for number, row in _table_rows(path.suffix, text or ""):
        name = next((row[column] for column in FILE_COLUMNS if isinstance(row, dict) and row.get(column)), None)
        if not isinstance(name, str):
            warnings.append((path.name, f"line {number} is not a row with a {FILE_COLUMNS[0]} and is left out"))
            continue
        key = Path(name).as_posix()
        if key in table:
            warnings.append((path.name, f"line {number} names {one_line(key)} again; the first row counts"))
            continue
        found: list[str] = []
        table[key] = text_fields(row, found)
        warnings += [(one_line(key), f"{warning} ({path.name})") for warning in found]
    return table, warnings


def _table_rows(suffix: str, text: str) -> list[tuple[int, object]]:
    """(line number, row) of each row; a row that is not one is None."""
    rows: list[tuple[int, object]] = []
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            rows += [(reader.line_num, row) for row in reader]
        except csv.Error:  # a field of more than 128 KiB: a quote that is never closed
            rows.append((reader.line_num + 1, None))
        return rows
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except (ValueError, RecursionError):
                rows.append((number, None))
    return rows


def read_sidecars(file: Path) -> tuple[dict, list[str]]:
    """What the files beside `song.mp3` say about it.

    `song.json` (tags or caption, lyrics, genre, bpm, keyscale, timesignature, language) is overruled by
    `song.tags.txt` (else `song.txt`, `song.caption`) and `song.lyrics.txt`.

    Returns:
        The fields found, and warnings about sidecars that can't be read.
    """
    record: dict = {}
    warnings: list[str] = []
    sidecar = file.with_suffix(".json")
    text = _read_text(sidecar, warnings)
    if text is not None:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            record = text_fields(values, warnings)
        else:
            warnings.append(f"{one_line(sidecar.name)} is not a JSON object and is left out")
    for field, suffixes in (("tags", (".tags.txt", ".txt", ".caption")), ("lyrics", (".lyrics.txt",))):
        for suffix in suffixes:
            text = _read_text(file.with_name(file.stem + suffix), warnings)
            if text is not None:
                record[field] = text
                break
    return record, warnings


def text_fields(values: dict, warnings: list[str]) -> dict:
    """The known fields of a JSON object or a dataset's row, lists joined (tags by commas, lyrics by lines).

    What is neither text, a number nor a list of them is left out, and a sentence about it added to `warnings`.
    """
    fields = {}
    for field, names in FIELD_NAMES.items():
        value = next((values[name] for name in names if values.get(name) not in (None, "", [])), None)
        if isinstance(value, list) and all(isinstance(entry, str | int | float) for entry in value):
            value = ("\n" if field == "lyrics" else ", ").join(map(str, value))
        if isinstance(value, dict | list):
            warnings.append(f"its {field} is neither text, a number nor a list of them and is left out")
        elif value is not None:
            fields[field] = value
    return fields


def _read_text(path: Path, warnings: list[str]) -> str | None:
    """The file's text, or None where there is no such file or, with a warning, it can't be read."""
    try:
        if not path.is_file():
            return None
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            return None  # the track's own name is within the file system's limit, such a sidecar can't exist
        warnings.append(f"{one_line(path.name)} is not readable as UTF-8 text and is left out")
        return None


def normalise_tags(tags: str) -> str:
    """Comma- or line-separated descriptors, trimmed, without repeats (whatever the case), in their order."""
    seen: dict[str, str] = {}
    for tag in tags.replace("\n", ",").split(","):
        tag = " ".join(tag.split())
        if tag:
            seen.setdefault(tag.casefold(), tag)
    return ", ".join(seen.values())


def normalise_text(record: dict) -> tuple[dict, list[str]]:
    """The text fields of `Track` from a raw record, with a warning for each value that had to be left out.

    Returns:
        `tags`, `lyrics`, `language`, `genre`, `bpm`, `keyscale` and `timesignature`, and the warnings.
    """
    warnings = []

    def text(field: str) -> str:
        # JSON can hold half a surrogate pair, which no tokenizer takes.
        return str(record.get(field) or "").encode("utf-8", "replace").decode().strip()

    genre = text("genre")
    tags = normalise_tags(text("tags"))
    if not tags:
        instead = f"its genre {genre!r}" if genre else "an empty caption"
        warnings.append(f"it has no tags and trains with {instead}; describe it in a .tags.txt beside it")
        tags = genre
    bpm = record.get("bpm")
    if bpm not in (None, ""):
        try:
            value = round(float(str(bpm).lower().replace("bpm", "")))
        except (ValueError, OverflowError):
            value = 0
        bpm = value if BPM_RANGE[0] <= value <= BPM_RANGE[1] else None
        if bpm is None:
            warnings.append(f"its bpm {record['bpm']!r} is not between {BPM_RANGE[0]} and {BPM_RANGE[1]}; left empty")
    timesignature = text("timesignature").split("/")[0].strip() or None
    if timesignature is not None and timesignature not in TIME_SIGNATURES:
        warnings.append(f"its time signature {record['timesignature']!r} is not 2, 3, 4 or 6; left empty")
        timesignature = None
    return {
        "tags": tags,
        "lyrics": text("lyrics") or INSTRUMENTAL,
        "language": text("language") or "unknown",
        "genre": genre,
        "bpm": bpm or None,
        "keyscale": text("keyscale") or None,
        "timesignature": timesignature,
    }, warnings


def one_line(name: str) -> str:
    """Control characters, line ends and undecodable bytes of a file name as escapes."""
    escaped = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in escaped else c for c in name)
