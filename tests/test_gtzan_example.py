"""The example that reads GTZAN's layout: folders named by genre, double extensions, one file that is no audio."""

import json
import subprocess
import sys
from pathlib import Path

import soundfile
import soxr

from acestep_pipeline.data.audio import read_audio
from acestep_pipeline.data.building.build_report import BuildOptions
from acestep_pipeline.data.building.ingest import build_dataset

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "gtzan_subset.py"


def lay_out(demo_dir: Path, folder: Path) -> None:
    """The demo clips as GTZAN has its own: <genre>/<genre>.<number>.wav, 22,050 Hz, mono, 16 bits; four of each."""
    for clip in sorted(demo_dir.glob("0[1-3]_*.*")):
        if clip.suffix not in {".wav", ".flac", ".ogg"}:
            continue
        genre = clip.stem[3:]
        (folder / genre).mkdir(parents=True)
        mono = soxr.resample(read_audio(clip).mean(axis=0), 48_000, 22_050)
        for number in range(4):
            file = folder / genre / f"{genre}.{number:05d}.wav"
            soundfile.write(file, mono[number * 100 :], 22_050, subtype="PCM_16")
    (folder / "techno" / "techno.00001.wav").write_bytes(bytes(1000))


def test_folders_named_by_genre_become_an_even_dataset(demo_dir, tmp_path):
    lay_out(demo_dir, tmp_path / "genres")
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path / "genres", tmp_path / "even", "--per-genre", "3"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "techno.00001.wav: it is not audio" in done.stdout and "Linked 9 clips of 3 genres" in done.stdout
    report = build_dataset(
        [tmp_path / "even"], tmp_path / "d", BuildOptions(genre_from_folder=True), show_progress=False
    )
    assert {track.genre: track.id for track in report.tracks}.keys() == {"lofi_hip_hop", "techno", "synthwave"}
    assert "techno/techno.00003.wav" in {track.id for track in report.tracks}
    genres = json.loads((tmp_path / "d" / "report.json").read_text())["genres"]
    assert {genre: counts["tracks"] for genre, counts in genres.items()} == dict.fromkeys(genres, 3)


def test_too_few_clips_are_one_sentence(demo_dir, tmp_path):
    lay_out(demo_dir, tmp_path / "genres")
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path / "genres", tmp_path / "even", "--per-genre", "4"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "techno has only 3 readable clips" in done.stderr
    assert not (tmp_path / "even").exists()
