"""Building a dataset: what goes in comes out, what is wrong is named, a second run does nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import load_from_disk

from acestep_pipeline.data.audio import SAMPLE_RATE, read_audio, write_audio
from acestep_pipeline.data.building.analysis import judge, measure
from acestep_pipeline.data.building.build_report import BuildOptions
from acestep_pipeline.data.building.dataset_files import COLUMNS, columns_of
from acestep_pipeline.data.building.ingest import build_dataset
from acestep_pipeline.data.tracks import dataset_fingerprint, load_tracks
from acestep_pipeline.errors import UsageError
from tests.training_runs import metrics, train_here

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "build_multi_style_dataset.py"


def noise(seconds: float = 2.0, level: float = 0.1, seed: int = 0) -> np.ndarray:
    return np.float32(level * np.random.default_rng(seed).standard_normal((2, int(seconds * SAMPLE_RATE))))


def build(folders, output, **options):
    return build_dataset(folders, output, BuildOptions(**options), show_progress=False, num_workers=2)


def reasons(waveform, sample_rate=SAMPLE_RATE, channels=2) -> list[str]:
    return [
        f"{f.severity}: {f.reason}" for f in judge("x", measure(waveform), sample_rate=sample_rate, channels=channels)
    ]


@pytest.fixture
def music(demo_dir, tmp_path) -> Path:
    """The demo clips in folders named by style, with one of each kind of trouble among them."""
    folder = tmp_path / "music"
    for clip in demo_dir.iterdir():
        if clip.name[:2].isdigit():
            (folder / clip.name[3:].split(".")[0]).mkdir(parents=True, exist_ok=True)
            shutil.copy(clip, folder / clip.name[3:].split(".")[0] / clip.name)
    techno = folder / "techno"
    shutil.copy(techno / "02_techno.flac", techno / "copy.flac")
    write_audio(techno / "silent.wav", np.zeros((2, 3 * SAMPLE_RATE), np.float32))
    (techno / "text.mp3").write_text("this is a shopping list, not music\n")
    whole = (techno / "02_techno.flac").read_bytes()
    (techno / "cut.flac").write_bytes(whole[: len(whole) // 2])
    return folder


def test_the_dataset_holds_what_the_folder_does(demo_dir, tmp_path):
    output = tmp_path / "dataset"
    report = build([demo_dir], output, validate_audio=True)
    dataset = load_from_disk(str(output))
    assert set(dataset.column_names) == {"audio", *COLUMNS} and len(dataset) == 6
    for row, track in zip(dataset, load_tracks(demo_dir, show_progress=False)[0], strict=True):
        assert row["audio"]["bytes"] == track.source.read_bytes()
        assert {name: row[name] for name in COLUMNS} == columns_of(track)
    from_disk, problems = load_tracks(output, show_progress=False)
    assert not problems and dataset_fingerprint(from_disk) == report.fingerprint
    assert np.array_equal(read_audio(from_disk[0].source), read_audio(report.tracks[0].source))


def test_training_takes_what_was_built_as_it_takes_the_folder(demo_dir, tmp_path):
    build([demo_dir], tmp_path / "dataset")
    for name, data in (("a", demo_dir), ("b", tmp_path / "dataset")):
        train_here(data, tmp_path / name, max_train_steps=2, max_train_samples=None)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_trouble_is_rejected_and_named(music, tmp_path):
    report = build([music], tmp_path / "dataset", validate_audio=True, genre_from_folder=True)
    rejected = {finding.track: finding.reason for finding in report.rejected}
    assert set(rejected) == {"techno/copy.flac", "techno/silent.wav", "techno/text.mp3", "techno/cut.flac"}
    assert rejected["techno/copy.flac"] == "it is an exact copy of techno/02_techno.flac"
    assert "silent" in rejected["techno/silent.wav"] and "text" in rejected["techno/text.mp3"]
    assert "truncated" in rejected["techno/cut.flac"]
    saved = json.loads((tmp_path / "dataset" / "report.json").read_text())
    assert {f["track"] for f in saved["findings"] if f["severity"] == "error"} == set(rejected)
    assert sum(genre["tracks"] for genre in saved["genres"].values()) == len(report.tracks) == 6
    assert all(row["measured"]["peak_db"] < 0 for row in saved["tracks"])


def test_the_folder_gives_a_missing_genre_only(music, tmp_path):
    (music / "ambient" / "05_ambient.json").unlink()
    (music / "ambient" / "05_ambient.tags.txt").unlink()
    genres = {track.id: track.genre for track in build([music], tmp_path / "d", genre_from_folder=True).tracks}
    assert genres["ambient/05_ambient.wav"] == "ambient"
    assert genres["lofi_hip_hop/01_lofi_hip_hop.wav"] == "lo-fi hip hop", "the sidecar's word stands"


def test_a_second_build_does_nothing_and_a_change_is_seen(music, tmp_path):
    output = tmp_path / "dataset"
    first = build([music], output, validate_audio=True)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    second = build([music], output, validate_audio=True)
    assert second.reused and not first.reused and second.fingerprint == first.fingerprint
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    (music / "techno" / "02_techno.tags.txt").write_text("techno, dark, fast, loud, industrial")
    third = build([music], output, validate_audio=True)
    assert not third.reused and third.fingerprint != first.fingerprint
    assert "industrial" in "".join(load_from_disk(str(output))["tags"])
    assert not list(tmp_path.glob(".partial*"))


def test_another_folder_with_the_same_content_has_the_same_fingerprint(music, tmp_path):
    moved = shutil.copytree(music, tmp_path / "elsewhere" / "music")
    assert build([music], tmp_path / "a").fingerprint == build([moved], tmp_path / "b").fingerprint


def test_several_folders_become_one_dataset(demo_dir, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_audio(other / "01_lofi_hip_hop.wav", noise())
    ids = [track.id for track in build([demo_dir, other], tmp_path / "dataset").tracks]
    assert len(ids) == 7 and {"clips/01_lofi_hip_hop.wav", "other/01_lofi_hip_hop.wav"} <= set(ids)


def test_nothing_of_the_users_is_replaced(demo_dir, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a dataset of ours"):
        build([demo_dir], tmp_path / "mine")
    (tmp_path / "mine" / "report.json").write_text('{"fingerprint": "of something else"}')
    with pytest.raises(UsageError, match="not a dataset of ours"):
        build([demo_dir], tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["report.json", "thesis.txt"]


def test_measurements_against_known_signals():
    tone = np.sin(2 * np.pi * 1000 * np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE)
    stereo = np.float32(np.stack([0.5 * tone, 0.5 * tone]))
    measured = measure(stereo)
    assert measured.peak_db == pytest.approx(-6.02, abs=0.01) and measured.rms_db == pytest.approx(-9.03, abs=0.01)
    assert measured.bandwidth_hz == pytest.approx(1000, abs=5)
    assert measured.dc_offset == pytest.approx(0, abs=1e-6) and measured.clipped == 0
    padded = np.concatenate([np.zeros((2, SAMPLE_RATE)), stereo, np.zeros((2, 4 * SAMPLE_RATE))], axis=1)
    measured = measure(np.float32(padded))
    assert measured.leading_silence_s == pytest.approx(1, abs=0.051)
    assert measured.trailing_silence_s == pytest.approx(4, abs=0.051)
    assert measure(stereo + np.float32(0.1)).dc_offset == pytest.approx(0.1, abs=1e-4)
    # A sine clipped at 1/√2 of its crest is at full scale half of the time.
    low = np.sin(2 * np.pi * 50 * np.arange(SAMPLE_RATE) / SAMPLE_RATE) * np.sqrt(2) * np.ones((2, 1))
    assert measure(np.float32(np.clip(low, -1, 1))).clipped == pytest.approx(0.5, abs=0.02)


def test_judgements_say_what_is_wrong_and_only_that():
    long = noise(12)
    assert reasons(long) == []
    assert any("clipped" in reason for reason in reasons(np.clip(noise(12, level=2), -1, 1)))
    assert any("ends with" in reason for reason in reasons(np.pad(long, ((0, 0), (0, 5 * SAMPLE_RATE)))))
    assert any("DC offset" in reason for reason in reasons(long + np.float32(0.05)))
    assert reasons(np.zeros((2, SAMPLE_RATE), np.float32)) == ["error: it is silent (peak -200 dBFS)"]


def test_a_low_bit_rate_is_found_inside_a_wav(tmp_path):
    options = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "CONSTANT", "compression_level": 0.7}
    soundfile.write(tmp_path / "song.mp3", noise(4).T, SAMPLE_RATE, **options)
    write_audio(tmp_path / "song.wav", read_audio(tmp_path / "song.mp3"))
    assert any("next to nothing above 1" in reason for reason in reasons(read_audio(tmp_path / "song.wav")))


def run_script(*argv) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))


def test_the_script_builds_and_refuses(music, tmp_path):
    output = tmp_path / "dataset"
    built = run_script("--data-dir", music, "--output-dir", output, "--validate-audio", "--genre-from-folder")
    assert built.returncode == 0, built.stderr
    assert "rejected techno/text.mp3" in built.stdout and f"--train_data_dir {output}" in built.stdout
    assert len(load_from_disk(str(output))) == 6
    (tmp_path / "empty").mkdir()
    refused = run_script("--data-dir", tmp_path / "empty", "--output-dir", tmp_path / "none")
    assert refused.returncode == 2 and refused.stderr.count("error: ") == 1 and "Traceback" not in refused.stderr
    assert not (tmp_path / "none").exists()
