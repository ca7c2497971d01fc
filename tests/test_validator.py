"""Validation during real runs: it disturbs nothing, keeps the best adapter, stops early, and survives kill -9."""

import json
import signal
import time

import psutil
import pytest

from acestep_pipeline.errors import UsageError
from acestep_pipeline.training.validator import Progress, default_validation_steps
from tests.training_runs import metrics, start, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
SETTINGS = {"max_train_samples": 6, "validation_fraction": 0.34, "mixed_precision": "no", "max_duration_s": 2}


def validations(output):
    return [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]


def ended_as(output):
    """All that must be the same for two runs to have ended the same."""
    best = output / "best" / WEIGHTS
    effect = (output / "effect.json").read_bytes()
    return (output / WEIGHTS).read_bytes(), best.read_bytes(), metrics(output), validations(output), effect


def test_progress_counts_validations_without_gain():
    progress = Progress()
    for update, (loss, expected) in enumerate(
        [(2.0, (2.0, 0, 0)), (1.0, (1.0, 1, 0)), (1.0, (1.0, 1, 1)), (float("nan"), (1.0, 1, 2)), (0.5, (0.5, 4, 0))]
    ):
        progress = progress.after(loss, update)
        assert (progress.best_loss, progress.best_update, progress.without_gain) == expected


@pytest.mark.parametrize(
    "num_updates, items, passes, expected",
    [(2500, 4, 80, 125), (1000, 1, 32, 112), (5, 1, 8, 5), (20, 64, 8, 1), (600, 1, 1, 30)],
)
def test_validation_costs_at_most_a_tenth_and_comes_at_most_twenty_times(num_updates, items, passes, expected):
    steps = default_validation_steps(num_updates, items_per_update=items, num_passes=passes)
    assert steps == expected
    times = num_updates // steps
    assert times <= 20 and (times <= 1 or times * passes <= 0.1 * 3 * num_updates * items)


def test_validation_changes_nothing_and_is_the_same_at_any_cadence(demo_dir, tmp_path):
    """Every update, every third or never: the same adapter to the bit, and the same values where both looked."""
    often, seldom, without, alone = (tmp_path / name for name in ("often", "seldom", "without", "alone"))
    settings = SETTINGS | {"max_train_steps": 7, "lora_dropout": 0.2}
    train_here(demo_dir, often, validation_steps=1, **settings)
    train_here(demo_dir, seldom, validation_steps=3, gradient_checkpointing=True, **settings)
    lines = validations(often)
    assert [line["update"] for line in lines] == list(range(8))
    assert [line["update"] for line in validations(seldom)] == [0, 3, 6, 7]
    held = lines[0]["tracks"].keys()
    assert len(held) == 2 and lines[0]["loss"] == pytest.approx(sum(lines[0]["tracks"].values()) / 2)
    assert lines[0]["loss"] == pytest.approx(sum(lines[0]["bins"]) / 4), "smoke's four draws are a bin each"
    for line in validations(seldom):
        assert line["loss"] == pytest.approx(lines[line["update"]]["loss"], rel=1e-6), "checkpointing is for training"
    trained_on = json.loads((often / "checkpoint-7" / "trainer_state.json").read_text())["settings"]["tracks"]
    assert len(trained_on) == 4 and not held & set(trained_on)

    alone.mkdir()
    for name in trained_on:
        for file in demo_dir.glob(f"{name.split('.')[0]}.*"):
            (alone / file.name).write_bytes(file.read_bytes())
    train_here(alone, without, **settings | {"validation_fraction": 0})
    assert not (without / "validation.jsonl").exists() and not (without / "best").exists()
    assert (without / WEIGHTS).read_bytes() == (often / WEIGHTS).read_bytes()
    assert metrics(without) == metrics(often)


def test_early_stopping_keeps_the_best_and_survives_kill_9(demo_dir, tmp_path):
    """A rate so high that the loss turns: it stops, `best/` is of the turn; killed and resumed, it ends the same."""
    settings = SETTINGS | {"max_train_steps": 400, "validation_steps": 2, "early_stopping_patience": 4}
    settings |= {"learning_rate": 0.05, "checkpointing_steps": 7, "lora_dropout": 0.1}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(demo_dir, whole, **settings)
    log, _ = uninterrupted.communicate(timeout=240)
    assert uninterrupted.returncode == 0, log
    lines = validations(whole)
    best = min(lines, key=lambda line: line["loss"])
    assert [line["update"] for line in lines] == list(range(0, best["update"] + 9, 2)), "four more, and no better"
    last = lines[-1]["update"]
    assert len(metrics(whole)) == last < 400 and (whole / f"checkpoint-{last}").is_dir()
    assert best["update"] > 0 and (whole / "best" / WEIGHTS).read_bytes() != (whole / WEIGHTS).read_bytes()

    process = start(demo_dir, killed, **settings)
    deadline = time.monotonic() + 120
    # Killed when the best adapter is written, and as a rule not yet in a checkpoint.
    while not ((killed / "validation.jsonl").exists() and len(validations_so_far(killed)) > best["update"] // 2 + 1):
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (killed / WEIGHTS).exists()
    resumed = start(demo_dir, killed, resume_from_checkpoint="latest", **settings)
    log, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, log
    assert ended_as(killed) == ended_as(whole)
    train_here(demo_dir, killed, resume_from_checkpoint="latest", **settings)
    assert ended_as(killed) == ended_as(whole), "the run was over, and ends the same again"


def validations_so_far(output):
    """The lines that are complete."""
    return [line for line in (output / "validation.jsonl").read_text().split("\n")[:-1]]


def test_a_resume_brings_back_the_best_adapter_of_its_checkpoint(demo_dir, tmp_path):
    settings = SETTINGS | {"validation_steps": 2, "checkpointing_steps": 2}
    output = tmp_path / "run"
    train_here(demo_dir, output, max_train_steps=6, **settings)
    second = output / "checkpoint-2" / WEIGHTS
    assert second.read_bytes() != (output / "best" / WEIGHTS).read_bytes(), "the later one is better"
    ended = ended_as(output)
    train_here(demo_dir, output, max_train_steps=4, resume_from_checkpoint=output / "checkpoint-2", **settings)
    assert [line["update"] for line in validations(output)] == [0, 2, 4]
    fourth = output / "checkpoint-4" / WEIGHTS
    assert (output / "best" / WEIGHTS).read_bytes() == fourth.read_bytes(), "and no longer that of update 6"
    train_here(demo_dir, output, max_train_steps=6, resume_from_checkpoint=output / "checkpoint-4", **settings)
    assert ended_as(output) == ended


@pytest.mark.parametrize("flag", ["validation_steps", "validation_epochs", "early_stopping_patience"])
def test_flags_that_need_held_out_tracks_say_so(demo_dir, tmp_path, flag, capfd):
    with pytest.raises(UsageError, match=f"--{flag} needs held-out tracks: --validation_fraction 0.1"):
        train_here(demo_dir, tmp_path / "out", max_train_samples=1, **{flag: 2})
    assert "Reading tracks" not in capfd.readouterr().err  # nor is any encoded


@pytest.mark.slow
def test_two_processes_measure_what_one_does(demo_dir, tmp_path):
    settings = SETTINGS | {
        "max_train_steps": 2,
        "validation_steps": 1,
        "num_validation_draws": 3,
        "lora_dropout": 0,
        "effective_batch_size": 2,
    }
    process = start(demo_dir, tmp_path / "two", config="ddp.yaml", **settings)
    log, _ = process.communicate(timeout=180)
    assert process.returncode == 0, log
    train_here(demo_dir, tmp_path / "one", **settings)
    two, one = (validations(tmp_path / name) for name in ("two", "one"))
    assert [line["update"] for line in two] == [0, 1, 2]
    for a, b in zip(two, one, strict=True):
        assert a["tracks"] == pytest.approx(b["tracks"], rel=1e-5)
    two, one = (json.loads((tmp_path / name / "effect.json").read_text()) for name in ("two", "one"))
    for tracks in ("held_out", "training"):
        for loss in ("loss_without", "loss_with"):
            assert two[tracks][loss] == pytest.approx(one[tracks][loss], rel=1e-5)
