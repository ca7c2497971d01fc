"""The verdict on recorded curves, and its line at the end of a real run."""

import pytest

from acestep_pipeline.training.effect import describe_effect, paired_change
from tests.training_runs import train_here


def curve(*losses, spread=0.01):
    """Validations of three tracks about each loss, ten updates apart."""
    return [
        {"update": 10 * i, "loss": loss, "tracks": {"a": loss - spread, "b": loss, "c": loss + spread}}
        for i, loss in enumerate(losses)
    ]


def test_the_interval_is_the_t_interval_of_paired_differences():
    mean, low, high = paired_change({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 0.8, "b": 1.7, "c": 2.6})
    assert mean == pytest.approx(-0.3)
    assert (high - mean, mean - low) == pytest.approx([4.302653 * 0.1 / 3**0.5] * 2, rel=1e-6)


@pytest.mark.parametrize(
    "losses, expected",
    [
        ((2.0, 1.5, 1.2, 1.1), "Learned:"),
        ((2.0, 1.5, 1.5005), "Learned:"),
        ((2.0, 2.0, 1.9995), "No measurable effect"),
        ((2.0, 1.5, 1.4, 1.7), "Overfitted since update 20 (1.4000; use best/):"),
        ((2.0, 2.2, 2.4), "Overfitted since update 0"),
    ],
)
def test_verdicts_on_recorded_curves(losses, expected):
    assert describe_effect(curve(*losses)).startswith(expected)


def test_what_cannot_be_judged_is_said():
    assert "--validation_fraction" in describe_effect([])
    one = [{"update": 0, "loss": 2.0, "tracks": {"a": 2.0}}, {"update": 9, "loss": 1.0, "tracks": {"a": 1.0}}]
    assert describe_effect(one).startswith("One held-out track gives no interval")


@pytest.mark.parametrize("rate, expected", [(1e-9, "No measurable effect"), (5e-3, "Learned:")])
def test_real_runs_say_what_they_did(demo_dir, tmp_path, capsys, rate, expected):
    settings = {"max_train_samples": 6, "validation_fraction": 0.5, "max_validation_samples": 3, "max_duration_s": 2}
    train_here(demo_dir, tmp_path / "out", max_train_steps=30, learning_rate=rate, **settings)
    assert f"\n{expected}" in capsys.readouterr().out
    assert expected in (tmp_path / "out" / "README.md").read_text()
