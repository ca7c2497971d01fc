"""NaN never reaches the adapter; what made it is named; and the average of the adapter, exact on resume."""

import math

import pytest
import torch
from safetensors.torch import load_file

from acestep_pipeline.data import batching
from acestep_pipeline.errors import RunError
from acestep_pipeline.training.ema import AdapterAverage
from acestep_pipeline.training.health import NanGuard
from tests.training_runs import metrics, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
SETTINGS = {"max_train_steps": 5, "checkpointing_steps": 2, "max_duration_s": 2, "ema_decay": 0.9}


@pytest.fixture
def damaged(monkeypatch):
    """Make the latents of the n-th draws of a run NaN."""

    def damage(*numbers):
        drawn, original = [], batching.load_latents

        def load(track, *args):
            drawn.append(track.id)
            tensors = original(track, *args)
            return {name: t * (math.nan if len(drawn) in numbers else 1) for name, t in tensors.items()}

        monkeypatch.setattr(batching, "load_latents", load)
        return drawn

    return damage


def test_a_nan_update_is_left_out_and_named(demo_dir, tmp_path, damaged, capsys):
    drawn = damaged(2, 3, 5)
    train_here(demo_dir, tmp_path / "run", **SETTINGS)
    said = capsys.readouterr().out
    for update in (2, 3, 5):
        assert f"warning: the loss of update {update} is not finite ({drawn[update - 1]} at t = 0." in said
    assert [line["loss"] is None for line in metrics(tmp_path / "run")] == [False, True, True, False, True]
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / WEIGHTS).values())


def test_three_in_a_row_end_the_run_unless_told_otherwise(demo_dir, tmp_path, damaged):
    damaged(3, 4, 5)
    with pytest.raises(RunError, match="update 5 is not finite .*third update in a row.*checkpoint-2") as stopped:
        train_here(demo_dir, tmp_path / "run", **SETTINGS)
    assert "--learning_rate or --max_grad_norm" in str(stopped.value) and "--on_nan skip" in str(stopped.value)
    damaged(2)
    train_here(demo_dir, tmp_path / "run", resume_from_checkpoint="latest", on_nan="skip", **SETTINGS)
    assert len(metrics(tmp_path / "run")) == 5


def test_the_last_good_checkpoint_outlives_updates_that_are_left_out(demo_dir, tmp_path, damaged, capsys):
    """None is made while they last, but the one at the end, so that those before are not pruned for them."""
    damaged(2, 3, 4, 5)
    often = SETTINGS | {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "on_nan": "skip"}
    train_here(demo_dir, tmp_path / "run", **often)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-5"]
    warnings = [line for line in capsys.readouterr().out.splitlines() if "left out." in line]
    assert ["a lower --learning_rate or --max_grad_norm" in line for line in warnings] == [False, False, True, True]


def test_fp16_may_look_for_its_scale():
    parameter = torch.nn.Parameter(torch.ones(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum())  # the scale is made at first use
    guard = NanGuard(stops=True, scaler=scaler)
    assert not guard.refuses(1.0, math.inf) and guard.in_a_row == 0
    assert guard.refuses(math.nan, math.inf) and scaler.get_scale() == 4.0
    scaler.update(0.5)
    assert guard.refuses(1.0, math.nan), "no scale makes this finite"
    assert NanGuard(stops=True, scaler=None).refuses(1.0, math.inf)


def test_the_average_is_saved_and_resumed_to_the_bit(demo_dir, tmp_path):
    output = tmp_path / "run"
    train_here(demo_dir, output, **SETTINGS)
    average, raw = load_file(output / WEIGHTS), load_file(output / "checkpoint-5" / WEIGHTS)
    assert any(not torch.equal(average[name], raw[name]) for name in raw)
    adapter = (output / WEIGHTS).read_bytes()
    train_here(demo_dir, output, resume_from_checkpoint="checkpoint-2", **SETTINGS)
    assert (output / WEIGHTS).read_bytes() == adapter


def test_the_average_follows_its_formula():
    parameter = torch.nn.Parameter(torch.zeros(1))
    average = AdapterAverage([parameter], 0.2)
    expected = 0.0
    for update, value in enumerate((1.0, 2.0, 4.0, 8.0)):
        parameter.data.fill_(value)
        average.update()
        decay = min(0.2, (1 + update) / (10 + update)) if update else 0.0
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        assert parameter.item() == pytest.approx(expected)
    assert parameter.item() == 8.0
