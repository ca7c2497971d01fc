"""Several processes: the shipped configurations, shared work, and ends that are not waited for."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from acestep_pipeline.training.processes import gather_lists, local_place, share
from tests.training_runs import CONFIGS, ROOT, start

SHORT = {"max_train_steps": 3, "lora_dropout": 0, "max_duration_s": 2, "mixed_precision": "no"}


def launch_arguments(config, *more):
    """What `accelerate launch --config_file` makes of a file, through accelerate's own classes."""
    parser = launch_command_parser()
    args, defaults, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(CONFIGS / config), *more, "train_ace_step_lora.py"])
    )
    return args, defaults


def finish(process, timeout_s=240):
    """The log of a run that ends by itself."""
    log, _ = process.communicate(timeout=timeout_s)
    return log


def test_every_shipped_configuration_loads_and_says_how_it_is_used():
    for path in CONFIGS.glob("*.yaml"):
        args, defaults = launch_arguments(path.name)
        assert args.num_processes == defaults.num_processes > 1 and args.mixed_precision == "no"
        assert f"--config_file examples/accelerate_configs/{path.name}" in path.read_text()
    args, _ = launch_arguments("ddp_2_nodes.yaml", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    assert args.multi_gpu and (args.num_machines, args.machine_rank, args.main_process_ip) == (2, 1, "10.0.0.1")


def test_shares_are_disjoint_and_complete(monkeypatch):
    assert local_place() == (0, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    shares = {False: [], True: []}
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        for neighbours, found in shares.items():
            found.append(share(list(range(10)), *local_place(), neighbours=neighbours))
    assert shares[False] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert shares[True] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert gather_lists([1, 2]) == [1, 2], "alone, without a process group"


def test_a_killed_process_ends_the_job(demo_dir, tmp_path):
    output = tmp_path / "out"
    process = start(demo_dir, output, config="ddp.yaml", **SHORT | {"max_train_steps": 5000, "checkpointing_steps": 2})
    deadline = time.monotonic() + 240
    while not list(output.glob("checkpoint-*")):
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    (second,) = [worker for worker in workers if worker.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGKILL)
    log = finish(process, timeout_s=60)
    assert process.returncode == 1 and "Signal 9 (SIGKILL) received by PID" in log
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert list(output.glob("checkpoint-*/trainer_state.json")), "what was saved is kept"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("loop", "ZeroDivisionError: of process 1"),
        ("caching", "error (process 1): process 1 can't go on."),
        ("usage", "error (process 1): process 1 can't go on."),
    ],
)
def test_a_failing_process_ends_the_job_with_its_error(demo_dir, tmp_path, monkeypatch, where, said):
    monkeypatch.setenv("FAIL_WHERE", where)
    settings = SHORT | {"max_train_steps": 5000, "latent_cache_dir": tmp_path / "cache"}
    process = start(
        demo_dir, tmp_path / "out", script=ROOT / "tests" / "failing_probe.py", config="ddp.yaml", **settings
    )
    log = finish(process)
    assert process.returncode == 1 and said in log, log


@pytest.mark.slow
def test_two_machines_without_a_common_cache_each_encode_every_file_once(demo_dir, tmp_path):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    machines = []
    for number in ("0", "1"):
        where = tmp_path / f"machine-{number}"
        flags = ["--machine_rank", number, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        flags += ["--num_processes", "2"]
        machines.append(start(demo_dir, where / "out", script=ROOT / "tests" / "two_process_probe.py",
                              config="ddp_2_nodes.yaml", launch_flags=flags, latent_cache_dir=where / "cache",
                              **SHORT))  # fmt: skip
    logs = [finish(machine) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(logs)
    seen = [json.loads((tmp_path / f"machine-{n}" / f"seen-{n}.json").read_text()) for n in (0, 1)]
    for own in seen:
        assert len(own["encoded"]) == len(set(own["encoded"])) == 4
    assert seen[0]["written"] and not seen[1]["written"]
    first, second = (load_file(tmp_path / f"machine-{n}" / f"adapter-{n}.safetensors") for n in (0, 1))
    assert all((first[name] == second[name]).all() for name in first)
    assert not (tmp_path / "machine-1" / "out").exists(), "only the first process writes"


def test_machines_with_other_data_are_told_so(demo_dir, tmp_path):
    """The comparison itself, between two real processes."""
    code = (
        "import os, torch.distributed as dist; from acestep_pipeline.training.processes import *\n"
        "dist.init_process_group('gloo'); check_same_everywhere({'the model': 'a'})\n"
        "try: check_same_everywhere({'the model': 'a', 'the training data': os.environ['RANK']})\n"
        "except UsageError as error: os.write(1, f'{error}\\n'.encode())\n"  # in one piece, for both write at once
        "dist.destroy_process_group()"
    )
    script = tmp_path / "compare.py"
    script.write_text(code)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    assert len(said) == 2 and said[0] == said[1], "every process stops"
    assert "the training data is not the same everywhere: 1 for process 1 on" in said[0]
