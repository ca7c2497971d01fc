"""The directory that `load_from_disk` reads: written once, with stable bytes, audio inside or referenced."""

from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Audio, DatasetDict, load_from_disk

from acestep_pipeline.data.building import dataset_files
from acestep_pipeline.data.building.dataset_files import COLUMNS, TrackChanged, columns_of, write_splits
from acestep_pipeline.data.tracks import Rights, Track, dataset_fingerprint, load_tracks


@pytest.fixture
def demo_tracks(demo_dir) -> list[Track]:
    tracks = load_tracks(demo_dir, show_progress=False)[0]
    marked = replace(
        tracks[0], machine_made=("bpm", "keyscale"), rights=Rights(isrc="DEA620800001", license="CC0-1.0")
    )
    return [marked, *tracks[1:]]


def write(directory: Path, tracks: list[Track], *, link: bool = False, **splits) -> list[int]:
    sizes: list[int] = []
    write_splits(directory, splits or {"train": list(enumerate(tracks))}, link=link, advance=sizes.append)
    return sizes


def test_datasets_reads_what_was_written(demo_tracks, tmp_path):
    sizes = write(tmp_path / "d", demo_tracks)
    dataset = load_from_disk(str(tmp_path / "d"))
    assert dataset.features["audio"] == Audio(decode=False) and set(dataset.column_names) == {"audio", *COLUMNS}
    for row, track, size in zip(dataset, demo_tracks, sizes, strict=True):
        assert row.pop("audio") == {"bytes": track.audio.read_bytes(), "path": track.audio.name}
        assert row == columns_of(track) and size == track.audio.stat().st_size
    assert dataset.filter(lambda genre: genre == "techno", input_columns="genre", keep_in_memory=True).num_rows == 1
    dataset.save_to_disk(str(tmp_path / "again"))
    assert load_from_disk(str(tmp_path / "again"))[0] == dataset[0], "the library can write it again"


def test_the_same_tracks_make_the_same_bytes(demo_tracks, tmp_path):
    for name in "ab":
        write(tmp_path / name, demo_tracks)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_many_tracks_are_cut_into_shards(demo_tracks, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_files, "SHARD_BYTES", 1)
    write(tmp_path / "d", demo_tracks)
    assert len(list((tmp_path / "d").glob("*.arrow"))) == len(demo_tracks)
    assert [row["id"] for row in load_from_disk(str(tmp_path / "d"))] == [track.id for track in demo_tracks]


def test_linked_audio_stays_where_it_is(demo_tracks, tmp_path):
    write(tmp_path / "d", demo_tracks, link=True)
    assert sum(path.stat().st_size for path in (tmp_path / "d").iterdir()) < 50_000
    row = load_from_disk(str(tmp_path / "d"))[0]
    assert row["audio"] == {"bytes": None, "path": str(demo_tracks[0].audio)}
    linked = load_tracks(tmp_path / "d", show_progress=False)[0]
    assert dataset_fingerprint(linked) == dataset_fingerprint(demo_tracks)


def test_two_splits_are_a_dataset_dict(demo_tracks, tmp_path):
    numbered = list(enumerate(demo_tracks))
    write(tmp_path / "d", demo_tracks, train=numbered[:4], test=numbered[4:])
    splits = load_from_disk(str(tmp_path / "d"))
    assert isinstance(splits, DatasetDict) and {name: len(split) for name, split in splits.items()} == {
        "train": 4,
        "test": 2,
    }
    assert [track.id for track in load_tracks(tmp_path / "d", show_progress=False)[0]] == splits["train"]["id"][:]


def test_a_file_that_changed_or_vanished_is_named(demo_tracks, tmp_path):
    changed = tmp_path / "changed.flac"
    changed.write_bytes(demo_tracks[0].audio.read_bytes())
    tracks = [demo_tracks[1], replace(demo_tracks[0], audio=changed)]
    changed.write_bytes(changed.read_bytes()[:-1])
    with pytest.raises(TrackChanged, match="it changed while") as caught:
        write(tmp_path / "a", tracks)
    assert caught.value.index == 1
    changed.unlink()
    for number, link in enumerate((False, True)):
        with pytest.raises(TrackChanged, match="can't be read any more: no such file"):
            write(tmp_path / f"b{number}", tracks, link=link)
