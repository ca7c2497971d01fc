"""serverless/skypilot_*.yaml as SkyPilot reads them, and what they run: `make serverless-test`."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from acestep_pipeline.errors import UsageError
from acestep_pipeline.jobs.gpu_names import check_gpu
from acestep_pipeline.storage.release_pull import pull_release
from tests.test_interruption import wait_for
from tests.test_uploading import published
from tests.training_runs import metrics

ROOT = Path(__file__).resolve().parents[1]
TASKS = sorted((ROOT / "serverless").glob("skypilot_*.yaml"))
READ = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
print(json.dumps([{
    "secrets": list(task.secrets),
    "cloud": str(one.cloud), "accelerators": one.accelerators, "spot": one.use_spot, "recovery": one.job_recovery,
    "idle_minutes": one.autostop_config.idle_minutes, "down": one.autostop_config.down,
    "mounts": {path: [storage.source, storage.mode.name] for path, storage in task.storage_mounts.items()},
} for one in task.resources]))
"""


def gpus(task: dict) -> list[str]:
    return [f"{name}:{count}" for name, count in task["resources"]["accelerators"].items()]


def check_gpus(task: dict) -> None:
    for gpu in gpus(task):
        check_gpu(task["resources"]["infra"].split("/")[0], gpu)


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_the_gpus_of_the_task_files_are_ones(path):
    task = yaml.safe_load(path.read_text("utf-8"))
    check_gpus(task)
    first = next(iter(task["resources"]["accelerators"]))
    task["resources"]["accelerators"] = {first.replace("0", "O") + "O": 1}
    with pytest.raises(UsageError, match="has no GPU"):
        check_gpus(task)
    assert None not in [*task["envs"].values(), *task["secrets"].values()], "SkyPilot takes no null"
    assert task["secrets"].keys() == {"HF_TOKEN"} and "HF_TOKEN" not in task["envs"]


@pytest.mark.slow
@pytest.mark.vendors
@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_skypilot_takes_the_task_files(path, tmp_path):
    python = os.environ.get("SKYPILOT_PYTHON")
    assert python, "run this with `make serverless-test`, which installs SkyPilot"
    home = os.environ | {"HOME": str(tmp_path)}
    result = subprocess.run([python, "-c", READ, path], env=home, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    resources = json.loads(result.stdout.splitlines()[-1])
    for one in resources:
        assert one["secrets"] == ["HF_TOKEN"], "not among the envs, which SkyPilot shows"
        assert one["recovery"]["strategy"] == "EAGER_NEXT_REGION" and one["down"] and one["idle_minutes"] == 10
        assert one["spot"] == (one["cloud"] == "RunPod"), "Lambda Cloud has no spot price"
        assert one["mounts"] == {
            "/data": ["s3://my-bucket/datasets/jazz", "COPY" if one["cloud"] == "RunPod" else "MOUNT"]
        }
    assert {one["cloud"].lower() for one in resources} == {path.stem.removeprefix("skypilot_")}
    broken = tmp_path / "broken.yaml"
    broken.write_text(path.read_text("utf-8").replace("use_spot", "use_spots"))
    refused = subprocess.run([python, "-c", READ, broken], env=home, capture_output=True, timeout=300)
    assert refused.returncode != 0


@pytest.mark.slow
def test_what_the_task_files_run_goes_on_where_a_machine_was_taken_away(demo_dir, s3_folder, tmp_path):
    """Their `run` as it is written, on two machines: folders that share nothing but the bucket."""
    task, *others = (yaml.safe_load(path.read_text("utf-8")) for path in TASKS)
    assert others and all(other["run"] == task["run"] for other in others)
    result = f"{s3_folder.url}/lora/jazz"
    flags = "--min_duration_s 1 --max_duration_s 2 --max_train_samples 2 --rank 4 --num_validation_samples 0"
    flags += " --mixed_precision no --max_train_steps 400 --checkpointing_steps 20"
    environment = os.environ | task["envs"] | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "ACESTEP_DATA": str(demo_dir),  # in the place of /data
        "RESULT": result,
        "MODEL": "tiny",
        "PRESET": "smoke",
        "FLAGS": flags,
    }  # fmt: skip

    def start(name: str, **more: str) -> subprocess.Popen:
        here = environment | {"ACESTEP_CACHE_DIR": str(tmp_path / name)} | more
        return subprocess.Popen(
            ["bash", "-c", task["run"]],
            cwd=ROOT,
            env=here,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    first = start("first")
    wait_for(lambda: published(result), first)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 143, said
    stopped_at = int(published(result)[-1].removeprefix("checkpoint-"))
    assert f"stopped by SIGTERM after update {stopped_at} of 400." in said
    shutil.rmtree(tmp_path / "first")  # that machine is gone

    second = start("second")
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0, said
    assert f"{stopped_at} of 400 updates are done" in said
    pull_release(result, tmp_path / "adapter")
    assert [line["update"] for line in metrics(tmp_path / "adapter")] == list(range(1, 401))
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()

    wrong = start("third", AWS_SECRET_ACCESS_KEY="wrong")
    said, _ = wrong.communicate(timeout=300)
    assert wrong.returncode == 2 and "credentials are wrong" in said, said
