"""What a build does when it is asked to: each option from the folder to the dataset that is trained on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import load_from_disk

from acestep_pipeline.data.audio import SAMPLE_RATE, read_audio, write_audio
from acestep_pipeline.data.building import examination
from acestep_pipeline.data.building.build_report import BuildOptions, describe_build
from acestep_pipeline.data.building.ingest import build_dataset
from acestep_pipeline.data.tracks import load_tracks

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path / "cache"))


def build(folders, output: Path, engine="local", **options):
    return build_dataset(folders, output, BuildOptions(**options), engine=engine, num_workers=2, show_progress=False)


def content(output: Path) -> dict[str, bytes]:
    """Every file of a dataset, without the page, whose links to the audio depend on where it lies."""
    files = [path for path in output.rglob("*") if path.is_file() and path.name != "report.html"]
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def drums(path: Path, bpm: int, seconds: float = 30.0) -> None:
    """Four on the floor: a decaying thump on every beat, over quiet noise."""
    time_s = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    since_beat_s = time_s % (60 / bpm)
    thump = np.sin(2 * np.pi * 60 * since_beat_s) * np.exp(-since_beat_s * 20)
    hiss = 0.001 * np.random.default_rng(bpm).standard_normal(len(time_s))
    write_audio(path, np.float32(np.stack([0.7 * thump + hiss] * 2)))


def test_auto_tags_fill_what_is_empty_and_are_marked(tmp_path):
    folder = tmp_path / "music"
    folder.mkdir()
    for bpm in (100, 128):
        drums(folder / f"{bpm}.flac", bpm)
        (folder / f"{bpm}.tags.txt").write_text("drums, four on the floor, dry, electronic, loop")
    (folder / "128.json").write_text('{"bpm": 64}')
    build([folder], tmp_path / "d", auto_tag=True)
    rows = {row["id"]: row for row in load_from_disk(str(tmp_path / "d")).remove_columns("audio")}
    assert rows["100.flac"]["bpm"] == pytest.approx(100, abs=2) and "bpm" in rows["100.flac"]["machine_made"]
    assert rows["128.flac"]["bpm"] == 64 and "bpm" not in rows["128.flac"]["machine_made"], "a person's word stands"
    estimates = {
        row["id"]: row["estimates"] for row in json.loads((tmp_path / "d" / "report.json").read_text())["tracks"]
    }
    assert estimates["100.flac"]["bpm"]["accepted"] and "librosa" in estimates["100.flac"]["bpm"]["by"]
    assert "bpm" not in estimates["128.flac"]
    assert "≈100" in (tmp_path / "d" / "report.html").read_text()


def test_a_captioner_describes_what_has_no_tags_and_only_that(demo_dir, tmp_path, monkeypatch):
    folder = shutil.copytree(demo_dir, tmp_path / "music", ignore=shutil.ignore_patterns("01_*.tags.txt", "*.json"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_captioner.py").write_text(
        "calls = []\n"
        "def caption(waveform, sample_rate, fields):\n"
        "    calls.append(waveform.shape)\n"
        "    return {'tags': f'{waveform.shape[1] / sample_rate:.0f} seconds of something', 'genre': 'unheard of'}\n"
    )
    build([folder], tmp_path / "d", captioner="my_captioner:caption")
    rows = {row["id"]: row for row in load_from_disk(str(tmp_path / "d")).remove_columns("audio")}
    told = rows.pop("01_lofi_hip_hop.wav")
    assert (told["tags"], told["genre"]) == ("4 seconds of something", "unheard of")
    assert set(told["machine_made"]) == {"tags", "genre"}
    assert not any(row["machine_made"] for row in rows.values())
    import my_captioner

    build([folder], tmp_path / "again", captioner="my_captioner:caption")
    assert my_captioner.calls == [(2, 4 * SAMPLE_RATE)], "what it said is kept"


def test_the_example_captioner_works(demo_dir, tmp_path, monkeypatch):
    folder = shutil.copytree(demo_dir, tmp_path / "music", ignore=shutil.ignore_patterns("*.tags.txt", "*.json"))
    monkeypatch.chdir(EXAMPLES)
    report = build([folder], tmp_path / "d", captioner="caption_by_rules:caption")
    assert all(track.tags and "tags" in track.machine_made for track in report.tracks)
    assert len({track.tags for track in report.tracks}) > 1 and not report.rejected


def test_balance_and_holdout_reach_training(tmp_path):
    for genre, count in (("large", 10), ("small", 2)):
        (tmp_path / "music" / genre).mkdir(parents=True)
        for number in range(count):
            drums(tmp_path / "music" / genre / f"{number}.flac", 90 + 3 * number + count, seconds=2.5)
    report = build([tmp_path / "music"], tmp_path / "d", genre_from_folder=True, balance=1.0, holdout=0.2)
    assert sorted(track.genre for track in report.held_out) == ["large", "large"]
    tracks, _ = load_tracks(tmp_path / "d", show_progress=False)
    assert {(track.genre, track.sampling_weight) for track in tracks} == {("large", 10 / 16), ("small", 2.5)}
    assert len(load_from_disk(str(tmp_path / "d"))["test"]) == 2
    assert "each heard 2.50 times an epoch" in describe_build(report)


def test_linked_audio_is_read_where_it_is(demo_dir, tmp_path):
    build([demo_dir], tmp_path / "linked", link=True)
    build([demo_dir], tmp_path / "packed")
    linked, packed = (load_tracks(tmp_path / name, show_progress=False)[0] for name in ("linked", "packed"))
    for a, b in zip(linked, packed, strict=True):
        assert np.array_equal(read_audio(a.source), read_audio(b.source))
    assert sum(map(len, content(tmp_path / "linked").values())) < 100_000


def re_encoded(demo_dir: Path, folder: Path) -> Path:
    """The demo clips, six times as long, and one of them again as a quieter mp3."""
    folder.mkdir()
    for clip in load_tracks(demo_dir, show_progress=False)[0]:
        long = np.concatenate([np.roll(read_audio(clip.source), 9_999 * turn, axis=1) for turn in range(6)], axis=1)
        write_audio(folder / f"{Path(clip.id).stem}.flac", long)
    copy = 0.5 * read_audio(folder / "02_techno.flac")
    soundfile.write(folder / "the same.mp3", copy.T, SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return folder


def test_near_duplicates_are_named_and_can_be_dropped(demo_dir, tmp_path):
    folder = re_encoded(demo_dir, tmp_path / "music")
    named = build([folder], tmp_path / "d", validate_audio=True, holdout=0.5)
    (finding,) = [finding for finding in named.findings if "sounds the same" in finding.reason]
    assert (finding.track, finding.severity) == ("the same.mp3", "warning") and "02_techno.flac" in finding.reason
    sides = [{track.id for track in side} for side in (named.tracks, named.held_out)]
    assert any({"the same.mp3", "02_techno.flac"} <= side for side in sides), "a hold-out must not leak"
    dropped = build([folder], tmp_path / "e", validate_audio=True, drop_near_duplicates=True)
    assert [finding.track for finding in dropped.rejected] == ["the same.mp3"] and len(dropped.tracks) == 6


@pytest.mark.slow
def test_ray_builds_the_same_dataset(demo_dir, tmp_path, monkeypatch):
    contents = []
    for engine in ("local", "ray"):
        monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path / f"cache of {engine}"))
        build([demo_dir], tmp_path / engine / "d", engine=engine, validate_audio=True)
        contents.append(content(tmp_path / engine / "d"))
    assert contents[0] == contents[1] and len(contents[0]) == 5


def test_a_bucket_is_as_good_as_a_folder(demo_dir, tmp_path, s3_folder):
    s3_folder.put({f"music/{path.name}": path.read_bytes() for path in demo_dir.iterdir()})
    far = build([f"{s3_folder.url}/music"], tmp_path / "far" / "d", validate_audio=True)
    near = build([demo_dir], tmp_path / "near" / "d", validate_audio=True)
    assert far.fingerprint == near.fingerprint
    assert json.loads((tmp_path / "far" / "d" / "report.json").read_text())["sources"] == [f"{s3_folder.url}/music"]


def test_only_what_is_new_or_changed_is_listened_to(demo_dir, tmp_path, monkeypatch):
    folder = shutil.copytree(demo_dir, tmp_path / "music")
    heard = []
    examine = examination._examine
    monkeypatch.setattr(examination, "_examine", lambda track: heard.append(track.id) or examine(track))
    build([folder], tmp_path / "d", validate_audio=True)
    assert len(heard) == 6
    heard.clear()
    drums(folder / "new.flac", 120, seconds=3)
    drums(folder / "02_techno.flac", 140, seconds=3)
    (folder / "01_lofi_hip_hop.wav").unlink()
    (folder / "03_synthwave.tags.txt").write_text("other, words, than, those, before")
    report = build([folder], tmp_path / "d", validate_audio=True)
    assert sorted(heard) == ["02_techno.flac", "new.flac"] and len(report.tracks) == 6
