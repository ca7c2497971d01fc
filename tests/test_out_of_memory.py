"""Memory that runs out in the middle of an update: the update is repeated in smaller forward passes."""

import functools
import json
import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from acestep_pipeline.errors import RunError
from acestep_pipeline.training import base_model
from acestep_pipeline.training.compilation import CompiledBlocks
from tests.training_runs import ROOT, metrics, start, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
SETTINGS = {"max_train_steps": 3, "lora_dropout": 0, "effective_batch_size": 4, "checkpointing_steps": 1}


@pytest.fixture(scope="module")
def unlimited(demo_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("unlimited")
    train_here(demo_dir, output, **SETTINGS)
    return output


def check_same_training(output, unlimited):
    assert len(metrics(output)) == 3
    for limited, whole in zip(metrics(output), metrics(unlimited), strict=True):
        assert limited["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    expected = load_file(unlimited / WEIGHTS)
    for name, tensor in load_file(output / WEIGHTS).items():
        assert (tensor - expected[name]).abs().max() < 2e-5, name


@pytest.fixture
def small_memory(monkeypatch):
    """A device that takes so many windows at a time, with the error that CUDA's allocator raises beyond."""
    import train_ace_step_lora

    squared_error = train_ace_step_lora.squared_error

    def set_size(windows: int | Callable[[], int]) -> None:
        def limited(model, batch, *rest, **named):
            result = squared_error(model, batch, *rest, **named)
            if len(batch["sigmas"]) > (windows() if callable(windows) else windows):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return result

        monkeypatch.setattr(train_ace_step_lora, "squared_error", limited)

    return set_size


@pytest.mark.parametrize("windows", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_an_update_is_repeated_in_halves_and_a_resumed_run_remembers(
    demo_dir, tmp_path, unlimited, small_memory, windows, capsys
):
    small_memory(windows)
    output = tmp_path / "limited"
    train_here(demo_dir, output, **SETTINGS)
    printed = capsys.readouterr().out
    assert printed.count("did not fit into memory; it is repeated, now with at most") == {1: 2, 3: 1}[windows]
    check_same_training(output, unlimited)
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["parts"]["planner"]["frames_in_pass"] == {1: 100, 3: 200}[windows], "a window has 100 frames"

    again = tmp_path / "again"
    (output / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    train_here(demo_dir, again, resume_from_checkpoint=tmp_path / "checkpoint-2", **SETTINGS)
    assert "did not fit" not in capsys.readouterr().out
    assert (again / WEIGHTS).read_bytes() == (output / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_with_compiled_blocks_the_halves_are_compiled_too(
    demo_dir, tmp_path, unlimited, monkeypatch, small_memory, capsys
):
    torch.compiler.reset()
    monkeypatch.setattr(base_model, "CompiledBlocks", functools.partial(CompiledBlocks, backend="aot_eager"))
    output = tmp_path / "limited"
    small_memory(lambda: (4, 2, 1, 1)[len(metrics(output))])  # after each update less
    train_here(demo_dir, output, torch_compile=True, **SETTINGS)
    printed = capsys.readouterr().out
    assert re.findall(r"Compiled 1 shapes .* s \((\d) × 4 s with .*: 100% of all", printed) == ["4", "2", "1"]
    assert printed.count("did not fit into memory; it is repeated, now with at most") == 2
    assert ", 0 recompilations" in printed
    check_same_training(output, unlimited)


@pytest.mark.slow
def test_what_never_fitted_is_not_compiled_before_it_is_halved(demo_dir, tmp_path, unlimited, small_memory, capsys):
    torch.compiler.reset()
    small_memory(2)
    train_here(demo_dir, tmp_path / "limited", torch_compile=True, **SETTINGS)
    printed = capsys.readouterr().out
    assert "Compiled nothing: memory did not suffice, so all run as they are.\n" in printed
    assert re.findall(r"Compiled 1 shapes .* s \((\d) × 4 s with .*: 100% of all", printed) == ["2"]
    check_same_training(tmp_path / "limited", unlimited)


def test_one_window_that_does_not_fit_ends_the_run_with_what_helps(demo_dir, tmp_path, small_memory):
    small_memory(0)
    with pytest.raises(RunError, match="memory ran out in a forward pass of one window.*--gradient_checkpointing"):
        train_here(demo_dir, tmp_path / "out", **SETTINGS)


@pytest.mark.slow
def test_a_process_that_really_runs_out_of_memory_makes_both_divide_the_update_anew(
    demo_dir, tmp_path, unlimited, monkeypatch
):
    """The limit is the kernel's, and on the second process alone."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")  # what is freed goes back to the system at once
    monkeypatch.setenv("LIMITED_RANK", "1")
    output = tmp_path / "limited"
    process = start(demo_dir, output, script=ROOT / "tests" / "memory_limit_probe.py", config="ddp.yaml",
                    dataloader_num_workers=0, **SETTINGS)  # fmt: skip
    log, _ = process.communicate(timeout=180)
    assert process.returncode == 0, log
    assert "warning: update 1 did not fit into memory; it is repeated, now with at most" in log
    check_same_training(output, unlimited)
