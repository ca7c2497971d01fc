"""Tables that describe a whole folder: metadata.jsonl, csv files, and the official trainer's dataset JSON."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from .fields import canonical_name, fill_missing, text_fields
from .sidecars import parse_json
from .text_files import MAX_TABLE_BYTES, fold, one_line, read_text

# The columns that may name a row's audio file, the first found is taken.
FILE_COLUMNS = ("file_name", "audio_path", "filename", "file", "path")
_DELIMITERS = (",", ";", "\t")
# Lines of one table that are complained about one by one.
_MAX_COMPLAINTS = 20


class _Fault(str):
    """A sentence about the table itself, among its rows."""


# (place in the table, what stands there).
Rows = Iterator[tuple[str, object]]
Warnings = list[tuple[str, str]]


def is_table(name: str) -> bool:
    """Whether a file of this name, in a folder's top, is a table."""
    return fold(name) == "metadata.jsonl" or fold(name).endswith(".csv")


def read_tables(
    folder: Path, names: list[str], json_names: list[str], tracks: list[str]
) -> tuple[dict[str, dict], Warnings, set[str]]:
    """What the tables in a folder say about its tracks, field by field from the first table that has it.

    In this order: `metadata.jsonl`, `metadata.csv` (one row a track, as in the `datasets` library's folders), other
    csv files (such as Key-BPM-Finder's export), JSON files with a list `samples` (the official ACE-Step trainer's
    dataset). A row names its file by a path relative to the table, by a path that ends so, or by a file name that
    only one track has.

    Args:
        folder: where the tables lie.
        names: the names of all files in it.
        json_names: those of them that may be a dataset JSON.
        tracks: the audio files' paths relative to the folder, with forward slashes.

    Returns:
        Raw fields by track, (name, warning) about tables, rows or tracks, and the names of the JSON files used.
    """
    table: dict[str, dict] = {}
    warnings: Warnings = []
    used: set[str] = set()
    locate = _Locator(tracks)
    metadata = sorted(
        filter(is_table, names), key=lambda n: (not fold(n).endswith(".jsonl"), fold(n) != "metadata.csv")
    )
    for name in [*metadata, *sorted(json_names)]:
        unreadable: list[str] = []
        text = read_text(folder / name, unreadable, max_bytes=MAX_TABLE_BYTES)
        if name in json_names:
            rows = _json_rows(text)
            if rows is None:
                continue
            used.add(name)
        elif text is None:
            rows = iter(())
        else:
            rows = _line_rows(text) if fold(name).endswith(".jsonl") else _csv_rows(text)
        warnings += [(one_line(name), warning) for warning in unreadable]
        found, complaints = _read_rows(rows, locate, one_line(name))
        warnings += complaints
        for track, fields in found.items():
            fill_missing(table.setdefault(track, {}), fields)
    return table, warnings, used


class _Locator:
    """Finds the track that a row of a table names; makers of tables write paths in many ways."""

    def __init__(self, tracks: list[str]):
        self.exact = set(tracks)
        self.folded = {fold(track): track for track in tracks}
        self.by_name: dict[str, list[str]] = {}
        for track in tracks:
            self.by_name.setdefault(fold(track.rpartition("/")[2]), []).append(track)

    def __call__(self, name: str) -> tuple[str | None, str]:
        """The track, or None and why not."""
        if name in self.exact:
            return name, ""
        parts = [part for part in fold(name.strip().replace("\\", "/")).split("/") if part not in ("", ".")]
        same_name = self.by_name.get(parts[-1], []) if parts else []
        for start in range(len(parts)):
            track = self.folded.get("/".join(parts[start:]))
            if track is not None and (start == 0 or len(parts) - start > 1 or len(same_name) == 1):
                return track, ""
        if len(same_name) == 1:
            return same_name[0], ""
        if same_name:
            return None, f"it is in the folder's table, and {len(same_name)} files have that name: give the path"
        return None, "it is in the folder's table but not there"


def _read_rows(rows: Rows, locate: _Locator, table_name: str) -> tuple[dict[str, dict], Warnings]:
    found: dict[str, dict] = {}
    warnings: Warnings = []
    complaints: Warnings = []
    for place, row in rows:
        if isinstance(row, _Fault):
            warnings.append((table_name, f"{place} {row}".strip()))
            continue
        row = _canonical(row) if isinstance(row, dict) else {}
        name = next((row[column] for column in FILE_COLUMNS if row.get(column)), None)
        if not isinstance(name, str) or not name.strip():
            complaints.append((table_name, f"{place} is not a row with a {FILE_COLUMNS[0]} and is left out"))
            continue
        track, reason = locate(name)
        if track is None:
            complaints.append((one_line(name), reason))
        elif track in found:
            complaints.append((table_name, f"{place} names {one_line(track)} again; the first row counts"))
        else:
            unusable: list[str] = []
            found[track] = text_fields(row, unusable)
            warnings += [(one_line(track), f"{warning} ({table_name})") for warning in unusable]
    if len(complaints) > _MAX_COMPLAINTS:
        left = len(complaints) - _MAX_COMPLAINTS
        complaints[_MAX_COMPLAINTS:] = [(table_name, f"{left} more of its rows are left out for such reasons")]
    return found, warnings + complaints


def _canonical(row: dict) -> dict:
    return {canonical_name(name): value for name, value in row.items() if isinstance(name, str)}


def _line_rows(text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", parse_json(line)


def _json_rows(text: str | None) -> Rows | None:
    """The samples of an official trainer's dataset, each with the trigger word of the whole; None of another text."""
    values = parse_json(text) if text is not None else None
    samples = values.get("samples") if isinstance(values, dict) else None
    if not isinstance(samples, list) or not any(
        isinstance(sample, dict) and any(canonical_name(str(name)) in FILE_COLUMNS for name in sample)
        for sample in samples
    ):
        return None
    shared = values.get("metadata") if isinstance(values.get("metadata"), dict) else {}
    defaults = {name: shared[name] for name in ("custom_tag", "tag_position") if shared.get(name)}
    return _samples(samples, defaults, instrumental=shared.get("all_instrumental") is True)


def _samples(samples: list, defaults: dict, *, instrumental: bool) -> Rows:
    for number, sample in enumerate(samples, start=1):
        if isinstance(sample, dict):
            sample = defaults | {name: value for name, value in sample.items() if value not in (None, "")}
            if instrumental and "is_instrumental" not in sample:
                sample["is_instrumental"] = True
        yield f"sample {number}", sample


def _csv_rows(text: str) -> Rows:
    """The rows of a table with a header; commas, semicolons or tabs, whichever makes a column that names files."""
    lines = io.StringIO(text.lstrip("\r\n"), newline="").readlines()
    header = lines[0].rstrip("\r\n") if lines else ""
    for delimiter in _DELIMITERS:
        columns = [canonical_name(cell) for cell in header.replace('"', "").split(delimiter)]
        if any(column in FILE_COLUMNS for column in columns):
            break
    else:
        shown = ", ".join(header.split(",")[:8])[:200] or "nothing"
        columns = ", ".join(FILE_COLUMNS)
        yield "", _Fault(f"has no column that names files ({columns}), only {one_line(shown)}; it is left out")
        return
    reader = csv.reader(lines, delimiter=delimiter)
    unclosed = _Fault("opens a quote that is never closed; this row and what follows are left out")
    before = 0
    try:
        for cells in reader:
            place, number, before = f"line {before + 1}", before, reader.line_num
            rest = "".join(lines[number:]) if before == len(lines) and before > number + 1 else ""
            if rest.count('"') % 2 or (number == 0 and before > 1):
                yield place, unclosed
                return
            if number == 0 or not any(map(str.strip, cells)):
                continue
            if len(cells) > len(columns):
                yield place, _Fault(f"has {len(cells)} cells, more than the header's {len(columns)}; the first count")
            yield f"line {before}", dict(zip(columns, cells, strict=False))
    except csv.Error:  # a field of more than 128 KiB
        yield f"line {before + 1}", unclosed
