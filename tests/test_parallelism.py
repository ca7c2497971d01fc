"""Processes that share one model train what one process trains, from and to the same checkpoints."""

import json
import shutil
import signal
import socket
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from acestep_pipeline.errors import RunError
from acestep_pipeline.paths import LORA_WEIGHTS_NAME
from acestep_pipeline.training.parallelism import FSDP2, Parallelism
from tests.test_processes import finish
from tests.training_runs import ROOT, metrics, start, train_here

CONFIGURATIONS = ("fsdp2.yaml", "deepspeed_zero2.yaml")
PROBE = ROOT / "tests" / "two_process_probe.py"
# Three windows on two processes: one of them repeats a forward pass to keep step.
SETTINGS = {
    "max_train_steps": 4,
    "effective_batch_size": 3,
    "train_batch_size": 1,
    "max_train_samples": None,
    "max_duration_s": 2,
    "lora_dropout": 0,
    "lr_scheduler": "cosine",
    "checkpointing_steps": 2,
    "ema_decay": 0.9,
    "gradient_checkpointing": True,
    "gradient_checkpointing_ratio": 0.5,
}
VALIDATED = SETTINGS | {"validation_fraction": 0.3, "validation_steps": 1, "num_validation_draws": 2}


def seen(directory, rank: int) -> dict:
    return json.loads((directory / f"seen-{rank}.json").read_text())


def assert_close(run, expected, file: str, atol: float) -> None:
    ours, theirs = load_file(run / file), load_file(expected / file)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=atol), (
            file,
            name,
            (tensor - theirs[name]).abs().max(),
        )


@pytest.fixture(scope="module")
def alone(demo_dir, tmp_path_factory):
    """What one process trains by `VALIDATED`."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train_here(demo_dir, output, **VALIDATED)
    return output


@pytest.mark.parametrize("config", ["fsdp2.yaml", pytest.param("deepspeed_zero2.yaml", marks=pytest.mark.slow)])
def test_two_processes_go_on_from_the_checkpoint_of_one_and_train_the_same(demo_dir, tmp_path, alone, config):
    shared = tmp_path / "shared"
    shutil.copytree(alone, shared)
    process = start(demo_dir, shared, script=PROBE, config=config, resume_from_checkpoint="checkpoint-2", **VALIDATED)
    log = finish(process)
    assert process.returncode == 0, log
    assert "2 of 4 updates are done" in log and log.count("the checkpoint is of 1 processes") == 1
    for ours, theirs in zip(metrics(shared), metrics(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(*(metrics(run, "validation.jsonl") for run in (shared, alone)), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    norms = [json.loads((run / "effect.json").read_text())["update_norms"]["modules"] for run in (shared, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    for file in (LORA_WEIGHTS_NAME, f"best/{LORA_WEIGHTS_NAME}", "checkpoint-4/ema.safetensors",
                 "checkpoint-4/optimizer.safetensors"):  # fmt: skip
        assert_close(shared, alone, file, atol=1e-5)
    assert seen(tmp_path, 0)["written"] and not seen(tmp_path, 1)["written"], "only the first process writes"
    held = [seen(tmp_path, rank)["held"] for rank in (0, 1)]
    assert all(own["dtypes"] == ["torch.float32 False", "torch.float32 True"] for own in held)
    if config == "fsdp2.yaml":  # the frozen model is divided in halves
        assert sum(own["local_bytes"] for own in held) == held[0]["bytes"]
        assert all(own["local_bytes"] < 0.55 * own["bytes"] for own in held)
    else:  # the optimizer works on one half each
        assert all(own["optimized"] < 0.55 * own["trained"] for own in held)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_after_a_kill_the_same_bits(demo_dir, tmp_path, config):
    settings = VALIDATED | {"checkpointing_steps": 1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(demo_dir, whole, config=config, **settings)
    assert finish(process) and process.returncode == 0
    process = start(demo_dir, cut, config=config, **settings)
    deadline = time.monotonic() + 240
    while not (cut / "checkpoint-1").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.01)
    for worker in psutil.Process(process.pid).children(recursive=True):
        worker.send_signal(signal.SIGKILL)
    finish(process)
    assert process.returncode == 1 and not (cut / "checkpoint-4").exists()
    process = start(demo_dir, cut, config=config, resume_from_checkpoint="latest", **settings)
    log = finish(process)
    assert process.returncode == 0 and "of 4 updates are done" in log, log
    assert metrics(cut) == metrics(whole) and metrics(cut, "validation.jsonl") == metrics(whole, "validation.jsonl")
    for file in (LORA_WEIGHTS_NAME, "checkpoint-4/optimizer.safetensors", "checkpoint-4/ema.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()
    # And a process alone goes on from there.
    train_here(demo_dir, cut, resume_from_checkpoint="checkpoint-3", **settings)
    assert_close(cut, whole, LORA_WEIGHTS_NAME, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_bf16_trains_a_float32_adapter_over_a_bf16_model(demo_dir, tmp_path, monkeypatch, config):
    monkeypatch.setenv("FORCE_BF16", "1")
    settings = SETTINGS | {"mixed_precision": "bf16"}
    for name, chosen in (("alone", None), ("shared", config)):
        process = start(demo_dir, tmp_path / name / "out", script=PROBE, config=chosen, **settings)
        log = finish(process)
        assert process.returncode == 0, log
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert seen(shared, 1)["held"]["dtypes"] == ["torch.bfloat16 False", "torch.float32 True"]
    assert_close(shared / "out", alone / "out", LORA_WEIGHTS_NAME, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_an_update_that_is_not_finite_is_left_out_everywhere(demo_dir, tmp_path, monkeypatch, config):
    monkeypatch.setenv("BROKEN_UPDATE", "1")
    for name, chosen in (("alone", None), ("shared", config)):
        process = start(demo_dir, tmp_path / name / "out", script=PROBE, config=chosen, **SETTINGS)
        log = finish(process)
        assert process.returncode == 0 and "of update 2 is not finite" in log, log
    alone, shared = tmp_path / "alone" / "out", tmp_path / "shared" / "out"
    assert [line.get("left_out") for line in metrics(shared)] == [None, True, None, None]
    assert_close(shared, alone, LORA_WEIGHTS_NAME, atol=1e-5)
    assert_close(shared, alone, "checkpoint-4/optimizer.safetensors", atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_a_failing_process_ends_the_job_with_its_error(demo_dir, tmp_path, monkeypatch, config):
    monkeypatch.setenv("FAIL_WHERE", "loop")
    probe = ROOT / "tests" / "failing_probe.py"
    settings = SETTINGS | {"max_train_steps": 5000}
    process = start(demo_dir, tmp_path / "out", script=probe, config=config, **settings)
    log = finish(process)
    assert process.returncode == 1 and "ZeroDivisionError: of process 1" in log, log


def test_memory_that_runs_out_ends_the_run_where_the_others_wait_for_it(tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert Parallelism(None, 1.0).can_repeat(error)
    with pytest.raises(RunError, match="memory ran out; .* smaller --train_batch_size or --gradient_checkpointing"):
        FSDP2(None, 1.0).can_repeat(error)
    assert not FSDP2(None, 1.0).can_repeat(RuntimeError("a defect"))


@pytest.mark.slow
def test_machines_that_find_other_checkpoints_are_told_so(demo_dir, tmp_path):
    """Without a common --output_dir the second machine has none."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    train_here(demo_dir, tmp_path / "machine-0", **SETTINGS)
    machines = [
        start(demo_dir, tmp_path / f"machine-{number}", config="ddp_2_nodes.yaml", resume_from_checkpoint="latest",
              launch_flags=["--machine_rank", number, "--main_process_ip", "127.0.0.1", "--main_process_port", port,
                            "--num_processes", "2"], **SETTINGS)
        for number in ("0", "1")
    ]  # fmt: skip
    logs = [finish(machine) for machine in machines]
    for machine, log in zip(machines, logs, strict=True):
        assert machine.returncode == 1 and "terminate called" not in log
        assert "the checkpoint to resume from is not the same everywhere: none for process 1" in log, log
