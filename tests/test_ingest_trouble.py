"""A folder of everything that goes wrong: nothing crashes the build, and nothing is lost without a line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import load_from_disk

from acestep_pipeline.data.audio import SAMPLE_RATE
from acestep_pipeline.data.building import ingest
from acestep_pipeline.data.building.build_report import BuildOptions
from acestep_pipeline.data.building.ingest import build_dataset
from acestep_pipeline.errors import UsageError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "build_multi_style_dataset.py"
LYRICS = "[verse]\nÉté à la plage, le cœur léger et la mer qui danse\n[chorus]\nOh là là, où vas-tu donc sans moi\n"


def noise(seconds: float, seed: int, channels: int = 2, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal((int(seconds * sample_rate), channels))
    return np.float32(0.1 * samples)


def write(path: Path, seed: int, *, seconds: float = 3.0, channels=2, sample_rate=SAMPLE_RATE, **options) -> Path:
    soundfile.write(os.fsencode(path), noise(seconds, seed, channels, sample_rate), sample_rate, **options)
    return path


def break_md5(path: Path) -> None:
    """Change one byte of the MD5 in a FLAC file's STREAMINFO (RFC 9639, section 8.2: bytes 26 to 41 of the file)."""
    content = bytearray(path.read_bytes())
    content[26] ^= 0xFF
    path.write_bytes(content)


@pytest.fixture(scope="module")
def trouble(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trouble") / "music"
    folder.mkdir()
    mp3 = {"format": "MP3", "subtype": "MPEG_LAYER_III"}
    # What can be used, however odd.
    write(folder / "good.flac", 1)
    (folder / "good.tags.txt").write_text(", ".join(f"tag {number}" for number in range(10_000)))
    write(folder / "an mp3.wav", 2, **mp3)
    write(folder / "hires.wav", 3, sample_rate=192_000, subtype="PCM_24")
    write(folder / "8bit.wav", 4, channels=1, subtype="PCM_U8")
    write(folder / "six.wav", 5, channels=6)
    write(folder / "日本語の歌 🎵.ogg", 6, format="OGG", subtype="VORBIS")
    write(folder / "two\nlines.flac", 7, format="FLAC")
    for number, (name, encoding) in enumerate((("latin", "latin-1"), ("utf16", "utf-16"), ("bom", "utf-8-sig"))):
        write(folder / f"{name}.flac", 10 + number)
        (folder / f"{name}.lyrics.txt").write_bytes(LYRICS.replace("œ", "oe").encode(encoding))
        (folder / f"{name}.tags.txt").write_text("chanson, french, acoustic, warm, slow")
    write(folder / "bomb.flac", 20)
    (folder / "bomb.json").write_text("[" * 200_000)
    write(folder / "deep.flac", 21)
    (folder / "deep.json").write_text('{"tags": ' + '{"a": ' * 5_000 + "1" + "}" * 5_000 + "}")
    write(folder / "table.flac", 22)
    (folder / "metadata.csv").write_text(
        "file_name,tags,bpm\ntable.flac,from the table,90\ntable.flac,again,91\n,nothing,1\nabsent.flac,gone\nonly"
    )
    (folder / "nobody.tags.txt").write_text("the tags of no track")
    os.symlink(folder, folder / "loop")
    # What can't.
    whole = write(folder / "cut.mp3", 30, **mp3).read_bytes()
    (folder / "cut.mp3").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp3").write_text("not music at all, but a letter to the editor\n")
    (folder / "zero.wav").write_bytes(b"")
    soundfile.write(folder / "silent.wav", np.zeros((3 * SAMPLE_RATE, 2)), SAMPLE_RATE)
    broken = noise(3, 31)
    broken[1000, 0] = np.nan
    soundfile.write(folder / "nan.wav", broken, SAMPLE_RATE, subtype="FLOAT")
    write(folder / "short.wav", 32, seconds=0.2)
    break_md5(write(folder / "md5.flac", 33))
    shutil.copy(folder / "good.flac", folder / "the same.flac")
    return folder


USABLE = {"good.flac", "an mp3.wav", "hires.wav", "8bit.wav", "six.wav", "日本語の歌 🎵.ogg", "two\\nlines.flac",
          "latin.flac", "utf16.flac", "bom.flac", "bomb.flac", "deep.flac", "table.flac"}  # fmt: skip
REJECTED = {
    "cut.mp3": "truncated",
    "text.mp3": "text",
    "zero.wav": "empty",
    "silent.wav": "silent",
    "nan.wav": "NaN",
    "short.wav": "0.2 s",
    "md5.flac": "MD5",
    "the same.flac": "exact copy of good.flac",
}


def run_script(*argv, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=dict(os.environ), **options)


@pytest.fixture(scope="module")
def built(trouble, tmp_path_factory) -> tuple[Path, dict, str]:
    output = tmp_path_factory.mktemp("built") / "dataset"
    done = run_script("--data-dir", trouble, "--output-dir", output, "--validate-audio")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return output, json.loads((output / "report.json").read_text(encoding="utf-8")), done.stdout


def test_every_file_is_a_track_or_has_its_reason(built):
    output, report, stdout = built
    assert {row["id"] for row in report["tracks"]} == USABLE == set(load_from_disk(str(output))["id"])
    errors = {finding["track"]: finding["reason"] for finding in report["findings"] if finding["severity"] == "error"}
    assert set(errors) == set(REJECTED)
    for name, word in REJECTED.items():
        assert word in errors[name] and f"rejected {name}: " in stdout, errors[name]


def test_text_in_any_encoding_is_read(built):
    rows = {row["id"]: row for row in load_from_disk(str(built[0])).remove_columns("audio")}
    assert {rows[f"{name}.flac"]["lyrics"] for name in ("latin", "utf16", "bom")} == {
        LYRICS.replace("œ", "oe").strip()
    }
    assert {rows[f"{name}.flac"]["language"] for name in ("latin", "utf16", "bom")} == {"fr"}
    assert rows["table.flac"]["tags"] == "from the table" and rows["table.flac"]["bpm"] == 90


def test_what_is_wrong_with_the_text_is_named(built):
    warnings = " ".join(f"{f['track']}: {f['reason']}" for f in built[1]["findings"] if f["severity"] != "error")
    for name in ("nobody.tags.txt", "absent.flac", "bomb.flac", "deep.flac", "metadata.csv", "table.flac again"):
        assert name in warnings, name
    assert "good.flac: it has 10000 tags" in warnings


def test_the_page_and_the_card_name_every_rejection(built):
    page = (built[0] / "report.html").read_text(encoding="utf-8")
    card = (built[0] / "dataset_card.md").read_text(encoding="utf-8")
    assert all(name in page for name in REJECTED)
    assert "13" in card


def test_without_a_usable_track_every_file_is_named(trouble, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("cut.mp3", "text.mp3", "zero.wav", "nan.wav"):
        shutil.copy(trouble / name, folder)
    done = run_script("--data-dir", folder, "--output-dir", tmp_path / "d", "--validate-audio")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert all(f"{name}: " in done.stderr for name in ("cut.mp3", "text.mp3", "zero.wav", "nan.wav"))
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".partial*"))


def one_genre(demo_dir: Path, folder: Path) -> Path:
    """The demo clips without what says their genre, so that one of them can be held out."""
    return shutil.copytree(demo_dir, folder, ignore=shutil.ignore_patterns("*.json"))


def vanishing(monkeypatch, name: str, file: Path) -> None:
    """Let a file vanish before the build's step `name`."""
    step = getattr(ingest, name)

    def vanish_first(*args, **kwargs):
        file.unlink(missing_ok=True)
        return step(*args, **kwargs)

    monkeypatch.setattr(ingest, name, vanish_first)


@pytest.mark.parametrize("step", ["examine_tracks", "write_splits"])
def test_a_file_that_vanishes_while_it_is_read_costs_that_file_only(demo_dir, tmp_path, monkeypatch, step):
    folder = one_genre(demo_dir, tmp_path / "music")
    vanishing(monkeypatch, step, folder / "02_techno.flac")
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path / "cache"))
    options = BuildOptions(validate_audio=True, holdout=0.2)
    report = build_dataset([folder], tmp_path / "d", options, num_workers=1, show_progress=False)
    assert [finding.track for finding in report.rejected] == ["02_techno.flac"]
    assert len(report.tracks) + len(report.held_out) == 5
    assert list(load_from_disk(str(tmp_path / "d"))) == ["train", "test"]


def test_killed_anywhere_a_build_continues_to_the_same_dataset(demo_dir, tmp_path):
    """Kill -9 at moments spread over a whole build; the next one yields what an undisturbed one does."""
    folder = one_genre(demo_dir, tmp_path / "music")
    argv = [sys.executable, str(SCRIPT), "--data-dir", str(folder), "--validate-audio", "--holdout", "0.2"]
    environment = {**os.environ, "ACESTEP_CACHE_DIR": str(tmp_path / "cache")}
    started = time.monotonic()
    subprocess.run([*argv, "--output-dir", tmp_path / "whole"], check=True, capture_output=True, env=environment)
    whole_s = time.monotonic() - started
    shutil.rmtree(tmp_path / "cache")
    kills = 0
    for share in (0.2, 0.5, 0.7, 0.85, 0.95):
        killed = subprocess.Popen(
            [*argv, "--output-dir", tmp_path / "cut"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            killed.communicate(timeout=share * whole_s)
        except subprocess.TimeoutExpired:
            killed.send_signal(signal.SIGKILL)
            killed.communicate()
            kills += 1
    assert kills
    subprocess.run([*argv, "--output-dir", tmp_path / "cut"], check=True, capture_output=True, env=environment)
    assert not list(tmp_path.glob(".partial*"))
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert len(files) == 10
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"balance": 1.5}, "--balance"),
        ({"holdout": 1.0}, "--holdout"),
        ({"min_duration_s": -1}, "--min-duration-s"),
        ({"drop_near_duplicates": True}, "--validate-audio"),
        ({"captioner": "no_such_module:function"}, "--captioner"),
    ],
)
def test_wrong_options_are_refused_before_any_work(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        build_dataset([tmp_path / "not looked at"], tmp_path / "d", BuildOptions(**options))
