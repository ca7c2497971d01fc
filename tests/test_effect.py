"""The verdict: on curves that real runs recorded, on made-up ones at the borders, and at the end of real runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from acestep_pipeline.training import effect
from acestep_pipeline.training.comparison import Comparison
from tests.training_runs import train_here

RECORDED = Path(__file__).with_name("recorded_runs.json")
SHORT = {"max_duration_s": 2, "num_validation_draws": 4, "cfg_dropout": 0}
HALF = SHORT | {"max_train_samples": 6, "validation_fraction": 0.5, "max_validation_samples": 3}
# Flags of the runs whose curves are in RECORDED (record_runs.py makes it); without a validation_fraction they train on
# one track and validate on the others.
REAL_RUNS = {
    "overfits": SHORT
    | {"max_train_samples": None, "max_validation_samples": 4, "effective_batch_size": 8, "validation_steps": 20}
    | {"rank": 64, "lora_alpha": 64, "use_rslora": True, "lora_layers": "attention+mlp", "max_train_steps": 160}
    | {"learning_rate": 2e-3, "max_grad_norm": 1},
    "learns": HALF | {"learning_rate": 2e-3, "max_train_steps": 60, "validation_steps": 6},
    "levels off": HALF
    | {"rank": 64, "lora_alpha": 64, "lora_layers": "attention+mlp", "max_train_steps": 400, "validation_steps": 20}
    | {"learning_rate": 5e-3, "effective_batch_size": 4},
    "does nothing": HALF | {"learning_rate": 1e-9, "max_train_steps": 12, "validation_steps": 3},
}


def one_track(demo_dir: Path, directory: Path) -> Path:
    """A folder of one of the demo's tracks that is heard eight times an epoch."""
    directory.mkdir()
    for file in demo_dir.glob("02_techno.*"):
        shutil.copy(file, directory)
    sidecar = directory / "02_techno.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"repeats": 8}))
    return directory


# ---------------------------------------------------------------------------------------------------------------------
# Recorded curves


def recorded(name: str) -> dict:
    """What `effect.judge` takes, of one of the recorded runs."""
    run = json.loads(RECORDED.read_text())[name]
    for which in ("held_out", "trained_on"):
        arrays = {key: np.array(run[which][key]) for key in ("without", "with_adapter", "bins")}
        run[which] = Comparison(tuple(run[which]["tracks"]), timesteps=tuple(run[which]["timesteps"]), **arrays)
    return run


def judge_recorded(name: str, **changes) -> effect.Verdict:
    return effect.judge(**recorded(name) | changes, update_size=0.01)


def test_the_run_that_overfitted_did_so_at_its_lowest_validation_loss():
    verdict = judge_recorded("overfits")
    lowest = min(recorded("overfits")["validations"], key=lambda line: line["loss"])["update"]
    assert (verdict.verdict, verdict.since_update, verdict.use) == (effect.OVERFITTED, lowest, effect.BEST)
    assert lowest == 40 and verdict.headline == "overfitted since update 40 (held-out tracks)"
    assert f"best/ is the adapter of update {lowest}" in verdict.next and "-73" in verdict.why


def test_the_run_that_learned_shall_go_on_while_the_loss_falls():
    verdict = judge_recorded("learns")
    assert (verdict.verdict, verdict.since_update, verdict.use) == (effect.LEARNED, None, effect.FINAL)
    shortened = recorded("learns")["validations"][:3]
    assert "still falling" in judge_recorded("learns", validations=shortened).next


def test_a_level_but_noisy_curve_is_no_overfitting():
    validations = recorded("levels off")["validations"]
    lowest = min(validations, key=lambda line: line["loss"])
    assert lowest["update"] <= 300 and validations[-1]["loss"] > lowest["loss"], "its lowest is not its last"
    verdict = judge_recorded("levels off")
    assert verdict.verdict == effect.LEARNED
    assert f"not fallen since update {lowest['update']}" in verdict.next


def test_the_run_at_a_negligible_rate_had_no_effect():
    verdict = judge_recorded("does nothing")
    assert (verdict.verdict, verdict.use) == (effect.NO_EFFECT, effect.BASE)
    assert "--learning_rate" in verdict.next and "the update is 1 % of" in verdict.why


def test_without_held_out_tracks_learning_is_called_memory():
    verdict = judge_recorded("overfits", held_out=None, validations=[])
    assert verdict.headline == "learned (training tracks)" and "That is memory" in verdict.why
    assert "--validation_fraction 0.1" in verdict.next
    assert judge_recorded("does nothing", held_out=None, validations=[]).headline == (
        "no measurable effect (training tracks)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Made-up ones, at the borders


def compared(*changes: float, base: float = 2.0) -> Comparison:
    """Tracks of two draws whose loss changes by so much each."""
    without = base + np.array([[0.1, -0.1]] * len(changes))
    names = tuple(f"track {number}" for number in range(len(changes)))
    timesteps = ({"t_min": 0.2, "t_max": 0.2}, {"t_min": 0.7, "t_max": 0.7})
    return Comparison(names, without, without + np.array(changes)[:, None], np.array([0, 1]), timesteps)


def curve(*losses: float | None, tracks: int = 3, only: int | None = None) -> list[dict]:
    """Validations of these losses, ten updates apart; with `only`, one track alone moves after the lowest."""
    lowest = min(loss for loss in losses if loss is not None)
    lines = []
    for number, loss in enumerate(losses):
        by_track = {f"track {index}": loss for index in range(tracks)}
        if only is not None and loss is not None:
            by_track = dict.fromkeys(by_track, lowest) | {f"track {only}": lowest + tracks * (loss - lowest)}
        lines.append({"update": 10 * number, "loss": loss, "tracks": by_track})
    return lines


@pytest.mark.parametrize(
    "losses, expected",
    [
        ((2.0, 1.5, 1.2, 1.1), None),
        ((2.0, 1.5, 1.5005), None),  # below a thousandth of the base's
        ((2.0, 1.5, 1.54), None),  # below a tenth of the gain
        ((2.0, 1.5, 1.4, 1.7), 20),
        ((2.0, None, 1.4, 1.7), 20),  # a validation that was no number
        ((2.0, 2.2, 2.4), 0),
        ((2.0, 1.5, 1.4, 1.6, 1.3, 1.7, 1.2, 1.6, 1.3, 1.45), None),  # it jumps about
    ],
)
def test_overfitting_is_a_rise_above_noise(losses, expected):
    verdict = effect.judge(compared(-0.3, -0.2, -0.4), compared(-0.9, -0.8), curve(*losses), update_size=0.01)
    assert verdict.since_update == expected
    assert verdict.verdict == (effect.LEARNED if expected is None else effect.OVERFITTED)
    assert verdict.use == (effect.FINAL if expected is None else effect.BEST if expected else effect.BASE)


def test_one_track_that_gets_worse_is_not_overfitting():
    losses, held_out = (2.0, 1.5, 1.4, 1.7), compared(-0.3, -0.2, -0.4)
    for only, expected in ((None, effect.OVERFITTED), (1, effect.LEARNED)):
        validations = curve(*losses, only=only)
        assert effect.judge(held_out, compared(-0.9), validations, update_size=0.01).verdict == expected


def test_noise_alone_is_seldom_called_overfitting():
    """200 curves that fall and then are level but for noise, of a twentieth of the gain."""
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        losses = 1.0 + np.exp(-np.arange(21) / 3) + 0.05 * generator.normal(size=21)
        alarms += effect.read_curve(curve(2.0, *losses.tolist())).turned
    assert alarms <= 20


@pytest.mark.parametrize(
    "held_out, trained_on, expected, said",
    [
        (compared(0.3, 0.2, 0.4), compared(-0.9, -0.8), effect.WORSE, "held-out tracks rose"),
        (compared(0.3, 0.2, 0.4), compared(0.9, 0.8, 0.9), effect.WORSE, "on training tracks as well"),
        (compared(-0.3, 0.2, 0.4), compared(-0.9, -0.8), effect.NO_EFFECT, "it is memory"),
        (compared(-0.3, 0.2, -0.4), compared(-0.9, 0.8), effect.NO_EFFECT, "too few, or differ too much"),
        (compared(-0.2, -0.4), compared(-0.9, -0.8), effect.NO_EFFECT, "too few, or differ too much"),
        (compared(-0.001, -0.0011), compared(-0.001, -0.0011), effect.NO_EFFECT, "the update is 1 % of"),
        (compared(np.nan, -0.1), compared(-0.9, -0.8), effect.WORSE, "not a finite number"),
        (None, compared(0.9, 0.8), effect.WORSE, "rose"),
        (compared(-0.3), compared(-0.9), effect.LEARNED, "one track, 2 draws"),
    ],
)
def test_other_verdicts_and_their_reasons(held_out, trained_on, expected, said):
    verdict = effect.judge(held_out, trained_on, [], update_size=0.01)
    assert verdict.verdict == expected and said in verdict.why


def test_the_interval_is_over_tracks_and_paired():
    comparison = compared(-0.2, -0.3, -0.4)
    expected = 4.302653 * 0.1 / 3**0.5  # Student's t for two degrees of freedom
    for change in (comparison.change, *(of_bin for _, of_bin in comparison.change_by_bin())):
        assert change.mean == pytest.approx(-0.3)
        assert (change.high - change.mean, change.mean - change.low) == pytest.approx([expected] * 2, rel=1e-6)
    assert [without for without, _ in comparison.change_by_bin()] == pytest.approx([2.1, 1.9])
    one_value = replace(comparison, tracks=("a",), without=np.ones((1, 1)), with_adapter=np.zeros((1, 1)))
    assert one_value.change.low == -np.inf and one_value.change.high == np.inf


def test_the_nearest_falling_and_rising_curve():
    assert effect.fall_and_rise(np.array([3.0, 1.0, 2.0])).tolist() == [3.0, 1.0, 2.0]
    assert effect.fall_and_rise(np.array([1.0, 3.0, 2.0, 0.0])).tolist() == [2.0, 2.0, 2.0, 0.0]
    generator = np.random.default_rng(0)
    for number, rel in ((12, 0.2), (20, 0.2), (50, 0.4)):
        level = 1 + 0.1 * generator.normal(size=(50, number))
        noises = [effect.noise_of_curve(losses, effect.fall_and_rise(losses)) for losses in level]
        assert np.mean(noises) == pytest.approx(0.1, rel=rel)


# ---------------------------------------------------------------------------------------------------------------------
# Real runs


def report_of(output: Path) -> dict:
    return json.loads((output / "effect.json").read_text())


def test_a_run_ends_with_its_effect_and_a_resumed_one_with_the_same(demo_dir, tmp_path, capsys):
    """Lines, `effect.json`, pictures and card; `effect.json` to the byte the same for a run that was resumed."""
    flags = HALF | {"learning_rate": 2e-3, "max_train_steps": 20, "validation_steps": 5, "checkpointing_steps": 10}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_here(demo_dir, whole, **flags)
    printed = capsys.readouterr().out
    report = report_of(whole)
    assert report["verdict"] == "learned" and report["judged_on"] == "held-out tracks"
    assert f"\nLearned (held-out tracks): {report['why']}.\n" in printed
    for name in ("by timestep", "update", "use", "advice"):
        assert f"\n  {name:<15}" in printed
    last = json.loads((whole / "validation.jsonl").read_text().splitlines()[-1])
    held_out = report["held_out"]
    assert held_out["loss_with"] == pytest.approx(last["loss"], rel=1e-5), "the last validation's"
    assert (len(held_out["tracks"]), held_out["draws"], len(held_out["bins"])) == (3, 4, 4)
    assert np.mean([of_bin["loss_with"] for of_bin in held_out["bins"]]) == pytest.approx(last["loss"], rel=1e-5)
    assert not set(held_out["tracks"]) & set(report["training"]["tracks"])
    norms = report["update_norms"]
    assert len(norms["modules"]) == 4 * 8 and list(norms["blocks"]) == list("0123") and norms["all"] > 0.001
    card = (whole / "README.md").read_text()
    assert report["why"] in card and "![norm of the update of each layer](update_norms.png)" in card
    for picture in ("loss.png", "update_norms.png"):
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")

    train_here(demo_dir, resumed, **flags)
    for name in ("effect.json", "update_norms.png", "README.md", "finished.json"):
        (resumed / name).unlink()
    shutil.rmtree(resumed / "checkpoint-20")
    train_here(demo_dir, resumed, resume_from_checkpoint="latest", **flags)
    assert "Resuming from" in capsys.readouterr().out
    assert (resumed / "effect.json").read_bytes() == (whole / "effect.json").read_bytes()


def test_a_real_run_at_a_negligible_rate_does_nothing(demo_dir, tmp_path, capsys):
    """Without held-out tracks, too: the training tracks tell. And they are too few for a style distance."""
    flags = REAL_RUNS["does nothing"] | {
        "validation_fraction": 0,
        "validation_steps": None,
        "max_validation_samples": 2,
        "style_distance": 8,
        "validation_duration_s": 8,
    }
    train_here(demo_dir, tmp_path / "out", **flags)
    report = report_of(tmp_path / "out")
    assert (report["verdict"], report["judged_on"]) == (effect.NO_EFFECT, "training tracks")
    assert report["held_out"] is None and len(report["training"]["tracks"]) == 2
    printed = capsys.readouterr().out
    assert "No measurable effect (training tracks)" in printed
    assert "12 clips and 24 s" in report["style_distance"] and report["style_distance"] in printed


@pytest.mark.slow
def test_a_run_that_overfits_says_since_when(demo_dir, tmp_path, capsys):
    """High rank and rate on one track: the verdict names the lowest validation, and best/ is of that update."""
    data = one_track(demo_dir, tmp_path / "one")
    output = tmp_path / "out"
    train_here(data, output, validation_data_dir=demo_dir, checkpointing_steps=20, **REAL_RUNS["overfits"])
    report = report_of(output)
    lines = [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]
    lowest = min(lines, key=lambda line: line["loss"])["update"]
    assert report["verdict"] == effect.OVERFITTED and report["use"] == "best/"
    assert 20 <= report["since_update"] == lowest <= 80
    assert f"Overfitted since update {lowest} (held-out tracks)" in capsys.readouterr().out
    assert report["training"]["loss_with"] < 0.6 * report["held_out"]["loss_with"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learns", "levels off", "does nothing"])
def test_real_runs_are_judged_as_the_recorded_ones(demo_dir, tmp_path, name):
    train_here(demo_dir, tmp_path / "out", **REAL_RUNS[name])
    assert report_of(tmp_path / "out")["verdict"] == judge_recorded(name).verdict
