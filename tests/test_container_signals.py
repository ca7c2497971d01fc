"""The entrypoint, for real: signals, statuses, the same command again, the smoke test, a run for the Hub."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from acestep_pipeline.container.log_lines import log_line
from tests.hub_server import serve_hub
from tests.training_runs import ROOT, metrics

WEIGHTS = "pytorch_lora_weights.safetensors"
# The entrypoint with volumes of the test's own.
ENTRYPOINT = (
    "import os, sys, pathlib; from acestep_pipeline.container.command import *\n"
    "from acestep_pipeline.errors import one_sentence_errors\n"
    "with one_sentence_errors(): run(choose_command(os.environ, sys.argv[4:], folders=Folders(*map(pathlib.Path, "
    "sys.argv[1:4]))))"
)
FLAGS = ["--min_duration_s", "1", "--max_train_samples", "4", "--lr_scheduler", "constant", "--lr_warmup_steps", "0",
         "--num_validation_samples", "0"]  # fmt: skip
SETTINGS = {"PRESET": "smoke", "RANK": "4", "MAX_DURATION_S": "2", "MIXED_PRECISION": "no", "ACESTEP_MODEL": "tiny",
            "NUM_GPUS": "0", "EXP_NAME": "run", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip


def start(tmp_path, data, *flags, prefix=(), **environment):
    """The entrypoint's process, with its output in a file."""
    for name in ("lora-cfg", "output"):
        (tmp_path / name).mkdir(exist_ok=True)
    command = [*prefix, sys.executable, "-c", ENTRYPOINT, data, tmp_path / "output", tmp_path / "lora-cfg", *FLAGS]
    with (tmp_path / "log").open("w") as log:
        return subprocess.Popen(
            [*map(str, command), *flags], stdout=log, stderr=log, env={**os.environ, **SETTINGS, **environment}
        )


def wait_for_updates(process, output, number=2, timeout_s=240):
    deadline = time.monotonic() + timeout_s
    while not (output / "metrics.jsonl").exists() or len(metrics(output)) < number:
        assert time.monotonic() < deadline and process.poll() is None, (output.parents[1] / "log").read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("log_format", [pytest.param("plain", marks=pytest.mark.slow), "json"])
def test_sigterm_gives_143_and_the_same_command_goes_on(demo_dir, tmp_path, log_format):
    output = tmp_path / "output" / "run"
    settings = {"MAX_TRAIN_STEPS": "5000", "LOG_FORMAT": log_format}
    process = start(tmp_path, demo_dir, **settings)
    wait_for_updates(process, output)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    done = len(metrics(output))
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{done}"]
    log = (tmp_path / "log").read_text().splitlines()
    if log_format == "json":
        lines = [json.loads(line) for line in log]
        assert {"stdout", "stderr"} == {line["stream"] for line in lines}
        log = [line["message"] for line in lines]
    assert any(line.startswith(f"stopped by SIGTERM after update {done} of 5000.") for line in log)

    process = start(tmp_path, demo_dir, **settings)  # the same command
    wait_for_updates(process, output, number=done + 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert f"Resuming from {output / f'checkpoint-{done}'}: {done} of 5000 updates are done." in (
        tmp_path / "log").read_text()  # fmt: skip


def launch_two(data, tmp_path, *flags):
    """Two processes on the CPU, as on two GPUs."""
    command = [sys.executable, "-m", "acestep_pipeline.container.processes", "2", str(ROOT / "train_ace_step_lora.py")]
    command += ["--preset", "smoke", "--pretrained_model_name_or_path", "tiny", "--train_data_dir", str(data)]
    command += ["--output_dir", str(tmp_path / "output" / "run"), "--max_duration_s", "2", *FLAGS, *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = (tmp_path / "log").open("w")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


@pytest.mark.slow
def test_two_processes_stop_together_with_143(demo_dir, tmp_path):
    output = tmp_path / "output" / "run"
    process = launch_two(demo_dir, tmp_path, "--max_train_steps", "5000")
    wait_for_updates(process, output)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    done = len(metrics(output))
    assert (output / f"checkpoint-{done}").is_dir()
    log = (tmp_path / "log").read_text()
    assert f"stopped by SIGTERM after update {done} of 5000." in log and "Traceback" not in log


def test_two_processes_end_with_the_status_of_the_one_that_fails(tmp_path):
    process = launch_two(tmp_path / "nowhere", tmp_path)
    assert process.wait(timeout=120) == 2
    log = (tmp_path / "log").read_text()
    assert log.count("error: ") == 1 and "Traceback" not in log, log


def test_a_line_of_the_log_is_an_object_with_its_level():
    assert json.loads(log_line("stderr", "warning: ü")) | {"time": ""} == {
        "time": "", "stream": "stderr", "level": "warning", "message": "warning: ü",
    }  # fmt: skip
    assert json.loads(log_line("stdout", "error: x"))["level"] == "error"
    assert json.loads(log_line("stdout", "errors are rare"))["level"] == "info"


@pytest.mark.slow
def test_the_smoke_test_passes_on_embedded_model_and_music(tmp_path):
    """Nothing is mounted: five updates, of which two after a resume, and a second of music."""
    empty = tmp_path / "data"
    empty.mkdir()
    process = start(tmp_path, empty, MODE="smoke", PRESET="", EXP_NAME="", RANK="4", ACESTEP_MODEL="")
    assert process.wait(timeout=500) == 0, (tmp_path / "log").read_text()
    lines = (tmp_path / "log").read_text().splitlines()
    summary = lines[lines.index("Smoke test passed:") + 1 :]
    assert [line.split()[1] for line in summary] == ["device:", "audio:", "loop:", "checkpoint:", "adapter:"]
    assert "NUM_GPUS=0 asks for no GPU" in summary[0] and "updates of tiny" in summary[2]
    assert (tmp_path / "output" / "smoke" / "checkpoint-5").is_dir()
    assert (tmp_path / "output" / "smoke" / "smoke.wav").is_file()


@pytest.mark.slow
def test_variables_publish_a_run_on_the_hub_and_its_token_is_no_argument(demo_dir, tmp_path):
    (tmp_path / "hub").mkdir()
    settings = {"PUSH_TO_HUB": "yes", "HUB_MODEL_ID": "tester/night", "HUB_PRIVATE_REPO": "yes", "HUB_TAG": "v1"}
    settings |= {"HF_TOKEN": "hf_write", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "MAX_TRAIN_STEPS": "2"}
    arguments = set()
    with serve_hub({}, tmp_path / "hub") as hub:
        process = start(tmp_path, demo_dir, HF_ENDPOINT=hub.url, **settings)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                    arguments |= set(each.cmdline())
            time.sleep(0.2)
        log = (tmp_path / "log").read_text()
        assert process.returncode == 0, log
        assert WEIGHTS in hub.files("tester/night", "v1") and hub.repositories["tester/night"].private
    assert "--push_to_hub" in arguments and "hf_write" not in " ".join(arguments) + log
