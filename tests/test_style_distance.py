"""The style distance: the formula, what its features hear and don't, when it is refused, and a real run's."""

import importlib.util
import json

import numpy as np
import pytest
from scipy.linalg import sqrtm

from acestep_pipeline.data.demo_music import render_demo_dataset
from acestep_pipeline.errors import UsageError
from acestep_pipeline.training import arguments, style_distance
from acestep_pipeline.training.argument_checks import check_args
from acestep_pipeline.training.style_distance import (
    MIN_CLIPS,
    NUM_FEATURES,
    compare_styles,
    describe_style,
    frechet_distance,
    style_features,
    too_small,
)
from tests.training_runs import flags, train_here

RATE = 48_000


def points(clips: int, *, shift: float = 0.0, seed: int = 0) -> list[np.ndarray]:
    """Clips of ten seconds about one point, each with a place of its own."""
    generator = np.random.default_rng(seed)
    places = generator.normal(size=(clips, 1, NUM_FEATURES)) + shift
    return list(places + generator.normal(size=(clips, 10, NUM_FEATURES)))


def test_the_distance_is_that_of_two_normal_distributions():
    generator = np.random.default_rng(0)
    a, b = (generator.normal(size=(50, 4)) @ generator.normal(size=(4, 4)) for _ in range(2))
    b += [1.0, 0.0, -2.0, 0.0]
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-6)


def test_features_hear_timbre_but_not_loudness():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(2, 3 * RATE)).astype(np.float32)
    tone = np.sin(2 * np.pi * 440 * np.arange(3 * RATE, dtype=np.float32) / RATE)[None] + 0.01 * noise
    heard = style_features(noise, RATE)
    assert heard.shape == (3, NUM_FEATURES) and np.isfinite(heard).all()
    assert np.allclose(style_features(0.1 * noise, RATE), heard, atol=1e-3)
    assert np.abs(style_features(tone, RATE) - heard).max() > 20
    assert np.isfinite(style_features(np.zeros((2, RATE), np.float32), RATE)).all()


def test_nearer_and_farther_are_told_from_chance():
    training = points(12)
    near, far = points(MIN_CLIPS, shift=0.1, seed=1), points(MIN_CLIPS, shift=1.5, seed=1)
    nearer, farther = (compare_styles(training, *pair, seed=0) for pair in ((far, near), (near, far)))
    assert nearer.with_adapter < nearer.without and nearer.high < 0 and nearer.p < 0.05
    assert farther.low > 0 and farther.p < 0.05 and farther.change == pytest.approx(-nearer.change)
    assert describe_style(nearer).startswith("nearer") and describe_style(farther).startswith("farther")
    assert compare_styles(training, far, near, seed=0) == nearer, "the resamples are keyed"
    other = compare_styles(training, near, points(MIN_CLIPS, shift=0.1, seed=2), seed=0)
    assert other.p > 0.05 and describe_style(other).startswith("not clearly")


@pytest.mark.slow
def test_one_in_twenty_changes_by_chance_is_called_one(monkeypatch):
    """Both sets are of one kind: p is below 0.05 as often as it says."""
    monkeypatch.setattr(style_distance, "NUM_RESAMPLES", 99)
    training = points(8)
    pairs = [(points(MIN_CLIPS, seed=2 * i + 1), points(MIN_CLIPS, seed=2 * i + 2)) for i in range(40)]
    called = sum(compare_styles(training, *pair, seed=i).p <= 0.05 for i, pair in enumerate(pairs))
    assert called <= 6


def test_sets_that_are_too_small_are_refused_in_words():
    assert too_small([30.0] * 8) is None and too_small([8.0] * 8) is None
    assert "makes 7 clips and 210 s" in too_small([30.9] * 7)
    assert "makes 12 clips and 24 s" in too_small([2.0] * 12)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"style_distance": 4}, "takes 8 clips or more, not 4"),
        ({"style_distance": 8, "validation_duration_s": 5}, "needs 57 s of music, not 8 clips of 5 s"),
    ],
)
def test_too_few_generated_clips_are_refused_before_training(demo_dir, tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        check_args(arguments.parse_args(flags(demo_dir, tmp_path, **changes)))


def test_a_missing_librosa_is_named(demo_dir, tmp_path, monkeypatch):
    args = arguments.parse_args([*flags(demo_dir, tmp_path), "--style_distance"])
    assert args.style_distance == 16
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "librosa" and find_spec(name) or None)
    with pytest.raises(UsageError, match=r"ace-step-lora\[style-distance\]"):
        check_args(args)


@pytest.mark.slow
def test_a_run_measures_it_and_an_adapter_that_does_nothing_changes_nothing(tmp_path, capsys):
    data, output = tmp_path / "clips", tmp_path / "out"
    render_demo_dataset(data, duration_s=12.0)
    changes = {"max_duration_s": 6, "max_train_samples": 6, "max_train_steps": 2, "learning_rate": 1e-12}
    changes |= {"style_distance": 8, "validation_duration_s": 8, "validation_inference_steps": 2}
    train_here(data, output, **changes)
    style = json.loads((output / "effect.json").read_text())["style_distance"]
    assert (style["clips"], style["training_clips"]) == (8, 12)
    assert style["without"] > style["within_training"] > 0, "the toy model makes noise"
    assert style["change"] == pytest.approx(0, abs=1e-3 * style["without"])
    assert "  style          " in capsys.readouterr().out
    assert "Style (timbre and density, not melody)" in (output / "README.md").read_text()
