"""Automatic tags: right where they are given, absent where nobody could know, never in place of a person's word."""

import json
from pathlib import Path

import numpy as np
import pytest

from acestep_pipeline.data.building.auto_tags import (
    ANALYSIS_RATE,
    BPM_THRESHOLD,
    KEY_THRESHOLD,
    SECTION_S,
    AutoTags,
    Estimate,
    MiddleSection,
    estimate_bpm,
    estimate_key,
    estimate_tags,
    fill_missing,
)
from acestep_pipeline.data.building.captioners import apply_captioner, load_captioner
from acestep_pipeline.data.tracks import Track
from acestep_pipeline.errors import RunError, UsageError

SILENCE = np.zeros((2, 48_000), np.float32)


def drums(bpm: float, seconds: float = 40.0) -> np.ndarray:
    """Four on the floor: a kick on each beat, a hi-hat between, both of uneven strength."""
    rng = np.random.default_rng(0)
    time = np.arange(int(0.2 * ANALYSIS_RATE)) / ANALYSIS_RATE
    decay = np.exp(-time * 30)
    kick, noise = np.sin(2 * np.pi * 60 * time) * decay, rng.standard_normal(len(time)) * decay
    sound = 0.001 * rng.standard_normal(int(seconds * ANALYSIS_RATE))
    for half_beat in range(int(seconds * bpm / 60 * 2) - 2):
        start = round(half_beat * 30 / bpm * ANALYSIS_RATE)
        hit = (0.1 * noise if half_beat % 2 else kick) * rng.uniform(0.3, 1)
        sound[start : start + len(time)] += 0.5 * hit
    return np.float32(sound)


def chords(tonic: int, mode: str, bars: int = 16) -> np.ndarray:
    """I IV V I, or i iv V i, `tonic` semitones above C, with four harmonics a note, 1.5 s a chord."""
    time = np.arange(int(1.5 * ANALYSIS_RATE)) / ANALYSIS_RATE
    third = 4 if mode == "major" else 3
    sound = []
    for bar in range(bars):
        root, middle = ((0, third), (5, third), (7, 4), (0, third))[bar % 4]
        notes = [48 + tonic + root + step for step in (0, middle, 7)]
        pitches = [440 * 2 ** ((note - 69) / 12) for note in notes]
        sound.append(sum(np.sin(2 * np.pi * p * n * time) / n**2 for p in pitches for n in (1, 2, 3, 4)))
    return np.float32(0.1 * np.concatenate(sound))


def track(**known) -> Track:
    values = {"tags": "", "lyrics": "", "language": "unknown", "genre": "", "bpm": None, "keyscale": None,
              "timesignature": None, "duration_s": 60.0, "sample_rate": 48_000, "channels": 2,
              "sha256": ""}  # fmt: skip
    return Track(id="song", audio=Path("song.wav"), **{**values, **known})


@pytest.mark.parametrize("bpm", [97, 110, 120, 128])
def test_the_tempo_of_a_drum_pattern_is_accepted_and_right(bpm):
    estimate = estimate_bpm(drums(bpm), ANALYSIS_RATE)
    assert estimate.confidence >= BPM_THRESHOLD and abs(estimate.value - bpm) <= 1


@pytest.mark.parametrize(
    ("tonic", "mode", "name"),
    [(0, "major", "C major"), (6, "major", "F# major"), (1, "minor", "C# minor"), (9, "minor", "A minor"),
     (10, "major", "Bb major"), (3, "minor", "Eb minor")],
)  # fmt: skip
def test_the_key_of_a_cadence_is_accepted_and_right(tonic, mode, name):
    estimate = estimate_key(chords(tonic, mode), ANALYSIS_RATE)
    assert estimate.value == name and estimate.confidence >= KEY_THRESHOLD


def unmusical(name: str) -> np.ndarray:
    rng, count = np.random.default_rng(0), 30 * ANALYSIS_RATE
    if name == "tone":
        return np.float32(0.2 * np.sin(2 * np.pi * 440 * np.arange(count) / ANALYSIS_RATE))
    if name == "random clicks":
        sound = np.zeros(count, np.float32)
        sound[rng.integers(0, count, 90)] = 0.9
        return sound
    return np.float32((0.1 if name == "noise" else 0.0) * rng.standard_normal(count))


@pytest.mark.parametrize("name", ["silence", "noise", "tone", "random clicks"])
def test_what_is_not_music_gets_neither_tempo_nor_key(name):
    tags = estimate_tags(unmusical(name))
    assert tags.bpm.confidence < BPM_THRESHOLD and tags.keyscale.confidence < KEY_THRESHOLD
    filled, record = fill_missing(track(), tags)
    assert filled == track() and not record["bpm"]["accepted"] and not record["keyscale"]["accepted"]


def test_a_sound_too_short_to_measure_gets_nothing():
    for sound in (np.zeros(0, np.float32), drums(120, seconds=3)):
        tags = estimate_tags(sound)
        assert tags.bpm == tags.keyscale == Estimate(None, 0.0)


def test_the_same_sound_gives_the_same_estimate_at_any_sample_rate():
    slow = drums(120)
    assert estimate_bpm(slow, ANALYSIS_RATE) == estimate_bpm(slow, ANALYSIS_RATE)
    assert estimate_bpm(np.repeat(slow, 2), 2 * ANALYSIS_RATE).value == 120


@pytest.mark.parametrize("block", [1000, 48_000, 10_000_000])
def test_the_middle_of_a_track_is_taken_whatever_the_blocks(block):
    rate, seconds = 1000, 300
    position = np.arange(rate * seconds, dtype=np.float32) / rate
    section = MiddleSection(duration_s=seconds, sample_rate=rate)
    for start in range(0, len(position), block):
        section.add(np.stack([position, position])[:, start : start + block])
    mono = section.mono()
    assert len(mono) == SECTION_S * ANALYSIS_RATE
    assert abs(mono[len(mono) // 2] - 150) < 1 and abs(mono[1000] - 90) < 1 and abs(mono[-1000] - 210) < 1


def test_only_empty_fields_are_filled_and_each_is_marked():
    tags = AutoTags(Estimate(120, 0.9), Estimate("A minor", 0.95), "librosa 0.11.0")
    filled, record = fill_missing(track(bpm=93, machine_made=("language",)), tags)
    assert filled.bpm == 93 and filled.keyscale == "A minor"
    assert filled.machine_made == ("keyscale", "language")
    assert json.loads(json.dumps(record)) == {
        "keyscale": {"value": "A minor", "confidence": 0.95, "accepted": True, "by": "librosa 0.11.0"}
    }


def test_a_field_below_its_threshold_stays_empty_but_is_reported():
    tags = AutoTags(Estimate(120, 0.5), Estimate("A minor", 0.5), "librosa 0.11.0")
    filled, record = fill_missing(track(), tags)
    assert filled == track() and record["bpm"] == {
        "value": 120, "confidence": 0.5, "accepted": False, "by": "librosa 0.11.0"
    }  # fmt: skip
    assert fill_missing(track(), tags, bpm_threshold=0.5)[0].bpm == 120


MODULE = """
number = 3
def caption(waveform, sample_rate, fields):
    assert waveform.shape[0] == 2
    return f"warm, {sample_rate} Hz, {fields['bpm']} bpm"
"""


def test_a_captioner_is_found_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "captions_here.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    function = load_captioner("captions_here:caption")
    assert apply_captioner(function, SILENCE, 48_000, {"bpm": 90}) == ({"tags": "warm, 48000 Hz, 90 bpm"}, None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("captions_bad", "write MODULE:FUNCTION"),
        ("no_such_module_at_all:caption", "No module named"),
        ("captions_bad:caption", "ZeroDivisionError: division by zero"),
        ("captions_good:nothing", "has no function nothing"),
        ("captions_good:number", "number is a int, not a function"),
    ],
)
def test_a_captioner_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch, name, reason):
    (tmp_path / "captions_bad.py").write_text("1 / 0")
    (tmp_path / "captions_good.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=reason):
        load_captioner(name)


def test_what_a_captioner_raises_is_a_problem_of_that_track():
    def broken(waveform, sample_rate, fields):
        raise ValueError("out of\nwords")

    fields, problem = apply_captioner(broken, SILENCE, 48_000, {})
    assert fields == {} and problem == "the captioner failed on it (ValueError: out of words)"


def test_a_captioners_fields_are_spelt_as_ours():
    def answer(waveform, sample_rate, fields):
        return {"tags": " warm ", "bpm": 119.6, "keyscale": "am".upper()[0] + "m", "timesignature": "4/4", "genre": ""}

    fields, problem = apply_captioner(answer, SILENCE, 48_000, {})
    assert fields == {"tags": "warm", "bpm": 120, "keyscale": "A minor", "timesignature": "4"} and problem is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(["rock"], "list"), ({"mood": "sad"}, "mood"), ({"bpm": 5}, "bpm 5"), ({"tags": 3}, "tags as int"),
     ({"keyscale": "H dur"}, "H dur"), (None, "NoneType")],
)  # fmt: skip
def test_a_captioner_that_breaks_the_contract_stops_the_run(answer, reason):
    with pytest.raises(RunError, match=reason):
        apply_captioner(lambda *_: answer, SILENCE, 48_000, {})


def test_the_example_captioner_hears_the_difference(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    caption = load_captioner("examples.caption_by_rules:caption")
    noise = np.float32(0.3 * np.random.default_rng(0).standard_normal((2, 48_000 * 2)))
    hum = np.float32(0.01 * np.sin(2 * np.pi * 60 * np.arange(96_000) / 48_000)) * np.ones((2, 1), np.float32)
    assert apply_captioner(caption, noise, 48_000, {"bpm": 170})[0]["tags"] == "loud, bright, wide stereo, fast"
    assert apply_captioner(caption, hum, 48_000, {})[0]["tags"] == "quiet, dark, dense, mono"
    assert apply_captioner(caption, SILENCE, 48_000, {}) == ({}, None)
