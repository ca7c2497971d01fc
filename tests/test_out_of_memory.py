"""Memory that runs out in the middle of an update, for real: the update is repeated in smaller forward passes."""

import json

import pytest
from safetensors.torch import load_file

from tests.training_runs import ROOT, metrics, start, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
SETTINGS = {"max_train_steps": 3, "lora_dropout": 0, "effective_batch_size": 4, "checkpointing_steps": 1}


@pytest.fixture(scope="module")
def unlimited(demo_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("unlimited")
    train_here(demo_dir, output, **SETTINGS)
    return output


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_update_that_does_not_fit_is_repeated_in_halves(demo_dir, tmp_path, unlimited, monkeypatch, num_processes):
    """With two processes memory is short on the second alone, and both divide the update anew."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system at once
    monkeypatch.setenv("LIMITED_RANK", str(num_processes - 1))
    output = tmp_path / "limited"
    process = start(demo_dir, output, script=ROOT / "tests" / "memory_limit_probe.py", num_processes=num_processes,
                    dataloader_num_workers=0, **SETTINGS)  # fmt: skip
    log, _ = process.communicate(timeout=180)
    assert process.returncode == 0, log
    assert "warning: update 1 did not fit into memory; it is repeated, now with at most" in log
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["parts"]["planner"]["frames_in_pass"] in (100, 200), "a window has 100 frames"
    assert len(metrics(output)) == 3
    for limited, whole in zip(metrics(output), metrics(unlimited), strict=True):
        assert limited["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    expected = load_file(unlimited / WEIGHTS)
    for name, tensor in load_file(output / WEIGHTS).items():
        assert (tensor - expected[name]).abs().max() < 2e-5, name
