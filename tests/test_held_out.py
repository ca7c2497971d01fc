"""Held-out tracks: where they come from, and that training never hears them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict

from acestep_pipeline.data.held_out import hold_out, load_train_and_held_out
from acestep_pipeline.data.tracks import Track
from acestep_pipeline.errors import UsageError

TRACK = Track("", Path(), "", "", "en", "", None, None, None, 10.0, 48000, 2, "")


def tracks(genres):
    return [replace(TRACK, id=f"{i}.wav", genre=genre, sha256=f"sha {i}") for i, genre in enumerate(genres)]


def names(chosen):
    return [track.id for track in chosen]


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Ten seconds of other noise in each of twenty files of two genres, by folder of the genre's name."""
    folder = tmp_path_factory.mktemp("music")
    for number in range(20):
        noise = np.random.default_rng(number).normal(0, 0.1, 8000 * 2)
        soundfile.write(folder / f"{number:02}.wav", noise, 8000)
        (folder / f"{number:02}.json").write_text('{"genre": "%s"}' % ("rock" if number < 15 else "jazz"))
        (folder / f"{number:02}.tags.txt").write_text("noise")
    return folder


def load(source, **changes):
    settings = {"dataset_name": None, "validation_data_dir": None, "validation_fraction": 0.0, "seed": 42}
    settings |= {"max_validation_samples": 32, "validation_seed": 0, "min_duration_s": 1, "max_train_samples": None}
    return load_train_and_held_out(str(source), **settings | changes, show_progress=False)


def test_a_fraction_is_taken_of_every_genre_and_depends_on_seed_and_audio_alone():
    chosen = tracks(["rock"] * 20 + ["jazz"] * 10)
    train, held = hold_out(chosen, 0.2, seed=0)
    assert Counter(track.genre for track in held) == {"rock": 4, "jazz": 2}
    assert sorted(names(train + held)) == sorted(names(chosen)) and not set(names(train)) & set(names(held))
    assert set(names(hold_out(chosen[::-1], 0.2, seed=0)[1])) == set(names(held))
    assert set(names(hold_out(chosen, 0.2, seed=1)[1])) != set(names(held))


def test_copies_stay_together_and_lone_genres_share():
    copies = [replace(track, sha256="same") if i in (3, 7) else track for i, track in enumerate(tracks(["x"] * 10))]
    for seed in range(5):
        held = set(names(hold_out(copies, 0.3, seed=seed)[1]))
        assert len(held) == 3 and len(held & {"3.wav", "7.wav"}) in (0, 2)
    assert len(hold_out(tracks("abcdef"), 0.34, seed=0)[1]) == 2
    with pytest.raises(UsageError, match="--validation_fraction 0.9 of 1 tracks holds none out"):
        hold_out(tracks("a"), 0.9, seed=0)


def test_sources_of_held_out_tracks(music, tmp_path):
    train, held, problems = load(music)
    assert len(train) == 20 and not held and not problems
    train, held, _ = load(music, validation_fraction=0.2)
    assert Counter(track.genre for track in held) == {"rock": 3, "jazz": 1} and len(train) == 16
    assert names(load(music, validation_fraction=0.2, seed=1)[1]) == names(held), "--seed does not move them"
    limited = names(load(music, validation_fraction=0.2, max_validation_samples=2)[1])
    assert len(limited) == 2 and set(limited) < set(names(held))
    assert len(load(music, validation_fraction=0.2, max_validation_samples=2)[0]) == 16

    other = tmp_path / "other"
    other.mkdir()
    for name, source in (("copy", music / "00.wav"), ("new", None)):
        if source:
            (other / f"{name}.wav").write_bytes(source.read_bytes())
        else:
            soundfile.write(other / f"{name}.wav", np.random.default_rng(99).normal(0, 0.1, 16000), 8000)
        (other / f"{name}.tags.txt").write_text("noise")
    train, held, problems = load(music, validation_data_dir=str(other))
    assert len(train) == 20 and names(held) == ["new.wav"]
    (problem,) = problems
    assert (
        problem.skipped and problem.track == "copy.wav (held out)" and "the same audio is trained on" in problem.reason
    )
    (other / "new.wav").unlink()
    with pytest.raises(UsageError, match="every held-out track is also trained on"):
        load(music, validation_data_dir=str(other))


@pytest.mark.parametrize("kind", ["disk", "parquet"])
def test_a_datasets_split_test_is_held_out(music, tmp_path, kind):
    rows = [{"id": f"{i:02}", "audio": str(music / f"{i:02}.wav"), "tags": "noise"} for i in range(20)]
    splits = {"train": Dataset.from_list(rows[:15]), "test": Dataset.from_list(rows[15:])}
    splits = {name: split.cast_column("audio", Audio(decode=False)) for name, split in splits.items()}
    saved, hub = tmp_path / "dataset", {}
    if kind == "disk":
        DatasetDict(splits).save_to_disk(saved)
    else:
        saved.mkdir()
        for name, split in splits.items():
            split.to_parquet(saved / f"{name}.parquet")
        hub = {"dataset_name": str(saved)}
    train, held, problems = load(saved, **hub)
    assert (len(train), names(held), problems) == (15, ["15", "16", "17", "18", "19"], [])
    with pytest.raises(UsageError, match="leave --validation_fraction away"):
        load(saved, **hub, validation_fraction=0.1)
    if kind == "disk":
        assert names(load(music, validation_data_dir=str(saved), max_train_samples=1)[1])[0] >= "15"
