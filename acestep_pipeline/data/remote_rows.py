"""Rows of a dataset on S3 or the Hub as raw records of tracks, with what their audio is; both remembered.

Each shard is fetched once for that, and again when audio in it is to be decoded. A later run over the same shards,
whose latents are cached, fetches none of them.
"""

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path

from ..progress import progress_bar
from ..storage.remote_folder import RemoteFolder
from ..storage.s3 import shown
from .audio import AudioError
from .dataset_rows import EmbeddedAudio, Records, no_such_split, row_records
from .remembered import remembered
from .remote_audio import AudioFacts, read_facts
from .remote_shards import SHELF, Shard
from .remote_splits import find_splits


@dataclass(frozen=True, eq=False)
class RemoteRow:
    """The encoded file in one row of a shard; and what it is, or why it can't be used."""

    shard: Shard
    index: int
    known: AudioFacts | str

    def read(self) -> bytes:
        """The bytes of the file; its shard is fetched, if it isn't here. Raises as `Shard.open`."""
        with SHELF.reading(self.shard) as dataset:
            return EmbeddedAudio(dataset, self.index).read()

    def facts(self) -> AudioFacts:
        """What the file is. Raises `AudioError` if it can't be used."""
        if isinstance(self.known, str):
            raise AudioError(self.known)
        return self.known


def remote_splits(remote: RemoteFolder) -> tuple[str, ...]:
    """Names of the splits, as `disk_splits`; raises as `find_splits`."""
    return tuple(name for name in find_splits(remote) if name)


def remote_rows(remote: RemoteFolder, split: str, *, show_progress: bool) -> Records:
    """The rows of one split of a dataset that lies elsewhere.

    Raises:
        UsageError: it is damaged, or has no such split.
        RunError: a shard has changed since it was listed, or the connection broke.
    """
    splits = find_splits(remote)
    found = splits.get(split) or splits.get("")
    if found is None:
        raise no_such_split(shown(remote.place), split, splits)
    shards, rows = found(), []
    with progress_bar(total=len(shards), desc="Reading shards", unit="shard", disable=not show_progress) as bar:
        for shard in shards:
            # A file that only PyAV reads is refused without it.
            key = [*shard.key(), importlib.util.find_spec("av") is not None]
            read = remembered("remote-rows", key, lambda shard=shard: _read_rows(shard), _parse)
            rows += [(shard, index, *row) for index, row in enumerate(read)]
            bar.update()

    def read_record(index: int) -> dict:
        shard, position, record, known = rows[index]
        audio = known if isinstance(known, Path) else RemoteRow(shard, position, known)
        return record | {"audio": audio, "warnings": list(record["warnings"])}

    return len(rows), read_record


def _read_rows(shard: Shard) -> dict:
    """All rows of a shard, each as its text and one of `path`, `facts` and `refusal`."""
    rows = []
    with SHELF.reading(shard) as dataset:
        total, read_record = row_records(dataset, shard.address)
        for index in range(total):
            record = read_record(index)
            rows.append({"record": record, **_examine(record.pop("audio"), with_tags=record["ask_file"])})
    return {"rows": rows}


def _examine(audio: Path | EmbeddedAudio, *, with_tags: bool) -> dict:
    if isinstance(audio, Path):
        return {"path": str(audio)}
    try:
        return {"facts": asdict(read_facts(audio.read(), with_tags=with_tags))}
    except AudioError as error:
        return {"refusal": str(error)}


def _parse(content: dict) -> list[tuple[dict, Path | AudioFacts | str]]:
    def known(row: dict) -> Path | AudioFacts | str:
        if "path" in row:
            return Path(row["path"])
        return AudioFacts.from_json(row["facts"]) if "facts" in row else str(row["refusal"])

    return [(dict(row["record"]), known(row)) for row in content["rows"]]
