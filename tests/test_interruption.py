"""Real signals to real processes, however they were started: a checkpoint, the status, and the same end after it."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from acestep_pipeline.training import interruption
from acestep_pipeline.training.run_directory import find_checkpoint
from tests.training_runs import ROOT, SCRIPT, flags, metrics, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
# Longer than any of these runs is left alone; the schedule is constant, so that a shorter end is the same run.
SETTINGS = {"max_train_steps": 5000, "checkpointing_steps": 5000, "lora_dropout": 0.1, "max_duration_s": 2,
            "lr_scheduler": "constant", "lr_warmup_steps": 0, "mixed_precision": "no"}  # fmt: skip
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


@pytest.fixture
def started():
    """Start the script in a session of its own and wait for its first updates; all of it is gone at the end."""
    processes = []

    def start(launcher, data, output, **changes):
        process = subprocess.Popen(
            [*launcher, str(SCRIPT), *flags(data, output, **SETTINGS | changes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        )
        processes.append(process)
        wait_for(lambda: (output / "metrics.jsonl").exists() and len(metrics(output)) >= 2, process)
        return process

    yield start
    for process in processes:
        for group in {os.getpgid(child.pid) for child in family(process.pid)}:
            os.killpg(group, signal.SIGKILL)
        process.wait()


def family(pid):
    """A process and all below it."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def trainers(process):
    """The processes that run the script itself."""
    return [child for child in family(process.pid) if child.cmdline()[1:2] in ([str(SCRIPT)], ["-u"])]


def wait_for(condition, process=None, timeout_s=240):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None), process.communicate()[0]
        time.sleep(0.05)


def assert_goes_on_to_the_same_end(data, output, log, tmp_path, **changes):
    """What is left is a checkpoint of the last update; two more updates are those of a run left alone."""
    done = len(metrics(output))
    checkpoint = output / f"checkpoint-{done}"
    assert find_checkpoint(output, "latest") == checkpoint and not list(output.glob(".partial*"))
    assert f"after update {done} of 5000. Kept: {checkpoint}. Continue with the same launcher and: {SCRIPT} " in log
    assert "--resume_from_checkpoint latest" in log and "Traceback (most recent call last)" not in log
    settings = SETTINGS | {"max_train_steps": done + 2} | changes
    train_here(data, output, resume_from_checkpoint="latest", **settings)
    train_here(data, tmp_path / "alone", **settings)
    assert (output / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()
    assert metrics(output) == metrics(tmp_path / "alone")


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow)]
)
def test_one_process_stops_after_its_update(demo_dir, tmp_path, started, number, workers):
    """To the whole group, as a terminal, `timeout` or a supervisor sends it: the data's workers outlive it."""
    output = tmp_path / "run"
    process = started(PYTHON, demo_dir, output, dataloader_num_workers=workers)
    os.killpg(process.pid, number)
    log, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, log
    assert f"{number.name}: stopping after this update; a second signal stops at once." in log
    assert_goes_on_to_the_same_end(demo_dir, output, log, tmp_path)


def test_a_signal_to_one_of_two_ranks_stops_both_after_the_same_update(demo_dir, tmp_path, started):
    output = tmp_path / "run"
    process = started(TORCHRUN, demo_dir, output)
    (rank_1,) = (child for child in trainers(process) if child.environ()["RANK"] == "1")
    rank_1.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and re.search(r"exitcode *: 143", log), log
    done = len(metrics(output))
    assert f"stopped by SIGTERM after update {done} of 5000. Kept: {output / f'checkpoint-{done}'}." in log
    assert find_checkpoint(output, "latest") == output / f"checkpoint-{done}"


@pytest.mark.slow
def test_torchrun_passes_a_signal_on(demo_dir, tmp_path, started):
    output = tmp_path / "run"
    process = started(TORCHRUN, demo_dir, output, dataloader_num_workers=1)
    process.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=120)
    done = len(metrics(output))
    assert f"stopped by SIGTERM after update {done} of 5000. Kept: {output / f'checkpoint-{done}'}." in log
    assert find_checkpoint(output, "latest") == output / f"checkpoint-{done}"


def test_accelerate_launch_dies_and_the_trainer_follows_in_order(demo_dir, tmp_path, started):
    output = tmp_path / "run"
    process = started(ACCELERATE, demo_dir, output)
    (trainer,) = trainers(process)
    process.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=120)  # the pipe closes with the trainer
    assert process.returncode == -signal.SIGTERM
    wait_for(lambda: not trainer.is_running())
    assert_goes_on_to_the_same_end(demo_dir, output, log, tmp_path)


def test_a_second_signal_stops_at_once(tmp_path):
    """In an update that never ends."""
    code = (
        "import time\nfrom acestep_pipeline.training.interruption import Interruption\n"
        "noted = Interruption()\nprint('ready', flush=True)\nwhile True: time.sleep(0.01)"
    )
    process = subprocess.Popen([*PYTHON, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):  # a terminal and a launcher, both with the same request
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.poll() is None
    time.sleep(interruption.SAME_REQUEST_S)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM
    assert process.stderr.read() == "\nSIGINT: stopping after this update; a second signal stops at once.\n"


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    interruption.Interruption().release()
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before


def test_the_command_to_continue_is_the_one_that_was_given(monkeypatch, tmp_path):
    for given in ("--resume_from_checkpoint latest", "--resume_from_checkpoint=x", "--overwrite_output_dir", ""):
        monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "c", *given.split(), "--train_data_dir", "my music"])
        told = str(interruption.interrupted(signal.SIGTERM, done=1, num_updates=2, output_dir=tmp_path))
        assert told.endswith(": train.py --preset c --train_data_dir 'my music' --resume_from_checkpoint latest")
