"""Writing a `datasets` directory row by row: memory stays flat, audio is embedded or referenced, bytes are stable.

`Dataset.save_to_disk` writes everything twice, embeds referenced files, and gives equal data another fingerprint each
time. What it leaves is simple (Arrow streams, `dataset_info.json`, `state.json`), so that is written here;
`load_from_disk` reads it, and the tests say when that changes.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow
from datasets import Audio, DatasetInfo, Features, Value
from datasets import List as ListOf

from ..tracks import Track

SHARD_BYTES = 500_000_000
# Arrow's binary values have 32-bit offsets.
MAX_EMBEDDED_BYTES = 2**31 - 1
_KINDS = {
    "bpm": "int32",
    "duration_s": "float64",
    "sample_rate": "int32",
    "channels": "int32",
    "sampling_weight": "float64",
    "repeats": "int32",
}
TRACK_COLUMNS = ("id", "tags", "lyrics", "language", "genre", "bpm", "keyscale", "timesignature", "duration_s",
                 "sample_rate", "channels", "sha256", "sampling_weight", "repeats", "trigger_word", "trigger_position",
                 "machine_made")  # fmt: skip
RIGHTS_COLUMNS = ("title", "artist", "rights_holder", "isrc", "license", "source")
COLUMNS = TRACK_COLUMNS + RIGHTS_COLUMNS


class TrackChanged(Exception):
    """A file that is no longer what it was when it was examined; `index` is its track's place, the message why."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


def columns_of(track: Track) -> dict:
    """The dataset's columns of a track, without its audio."""
    return {name: getattr(track, name) for name in TRACK_COLUMNS if name != "machine_made"} | {
        "machine_made": list(track.machine_made),
        **{name: getattr(track.rights, name) for name in RIGHTS_COLUMNS},
    }


def write_splits(directory: Path, splits: dict[str, Sequence[tuple[int, Track]]], *, link: bool, advance) -> None:
    """Write one dataset, or, where there are several splits, a `DatasetDict` of them.

    Args:
        directory: a new folder.
        splits: of each split (index, track); the index is for `TrackChanged`.
        link: reference the audio files by their absolute paths instead of embedding them.
        advance: called with the bytes of audio after each track.

    Raises:
        TrackChanged: a file vanished, or has other content than its track's hash says.
    """
    if list(splits) == ["train"]:
        _write_split(directory, "train", splits["train"], link=link, advance=advance)
        return
    for name, tracks in splits.items():
        _write_split(directory / name, name, tracks, link=link, advance=advance)
    (directory / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}), encoding="utf-8")


def _features() -> Features:
    columns = {name: Value(_KINDS.get(name, "string")) for name in COLUMNS} | {"machine_made": ListOf(Value("string"))}
    return Features({"audio": Audio(decode=False)} | columns)


def _write_split(directory: Path, split: str, tracks: Sequence[tuple[int, Track]], *, link: bool, advance) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    features = _features()
    schema = features.arrow_schema
    shards = _plan_shards(tracks, link)
    digest = hashlib.sha256()
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with pyarrow.OSFile(str(directory / name), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
            for index, track in shard:
                columns = columns_of(track)
                digest.update(json.dumps(columns, sort_keys=True).encode())
                row = pyarrow.Table.from_pylist([columns | {"audio": None}], schema=schema)
                audio, size = _audio(index, track, link, schema.field("audio").type)
                writer.write_table(row.set_column(0, schema.field(0), audio))
                advance(size)
    DatasetInfo(features=features).write_to_directory(str(directory))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": digest.hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (directory / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")


def _plan_shards(tracks: Iterable[tuple[int, Track]], link: bool) -> list[list[tuple[int, Track]]]:
    """Cut the tracks, in order, into shards of about `SHARD_BYTES` of audio; at least one, if empty."""
    shards: list[list[tuple[int, Track]]] = [[]]
    size = 0
    for index, track in tracks:
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((index, track))
        size += 0 if link else _size(index, track)
    return shards


def _size(index: int, track: Track) -> int:
    try:
        return track.audio.stat().st_size if isinstance(track.audio, Path) else len(track.source)
    except OSError as error:
        raise _unreadable(index, error) from error


def _audio(index: int, track: Track, link: bool, kind: pyarrow.StructType) -> tuple[pyarrow.StructArray, int]:
    """The one value of the audio column, and the size of the file in bytes."""
    if link and isinstance(track.audio, Path):
        return pyarrow.array([{"bytes": None, "path": str(track.audio.absolute())}], kind), _size(index, track)
    content = _content(index, track)
    if hashlib.sha256(content).hexdigest() != track.sha256:
        raise TrackChanged(index, "it changed while the dataset was built; build again")
    offsets = pyarrow.array([0, content.size], pyarrow.int32()).buffers()[1]
    embedded = pyarrow.Array.from_buffers(pyarrow.binary(), 1, [None, offsets, content])
    name = pyarrow.array([Path(track.id).name])
    return pyarrow.StructArray.from_arrays([embedded, name], fields=list(kind)), content.size


def _content(index: int, track: Track) -> pyarrow.Buffer:
    """The bytes of an encoded file, in memory once."""
    embedded = None if isinstance(track.audio, Path) else pyarrow.py_buffer(track.source)
    size = _size(index, track) if embedded is None else embedded.size
    if size > MAX_EMBEDDED_BYTES:
        raise TrackChanged(index, "it is larger than 2 GiB and can't be embedded; build with --link")
    if embedded is not None:
        return embedded
    content = pyarrow.allocate_buffer(size)
    try:
        with track.audio.open("rb") as file:
            read = file.readinto(content)
    except OSError as error:
        raise _unreadable(index, error) from error
    return content.slice(0, read)


def _unreadable(index: int, error: OSError) -> TrackChanged:
    return TrackChanged(index, f"it can't be read any more: {(error.strerror or str(error)).lower()}")
