"""serverless/skypilot_*.yaml as SkyPilot reads them, and what they run: `make serverless-test`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from acestep_pipeline.errors import UsageError
from acestep_pipeline.jobs.gpu_names import check_gpu
from tests.training_runs import metrics

ROOT = Path(__file__).resolve().parents[1]
TASKS = sorted((ROOT / "serverless").glob("skypilot_*.yaml"))
READ = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
print(json.dumps([{
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
    assert None not in task["envs"].values(), "SkyPilot takes no null"


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
    flags = "--min_duration_s 1 --max_duration_s 4 --rank 4 --num_validation_samples 0 --mixed_precision no"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RESULT": f"{s3_folder.url}/runs/jazz",
        "DATA": str(demo_dir),
        "MODEL": "tiny",
        "PRESET": "smoke",
        "FLAGS": f"{flags} --max_train_steps 400 --checkpointing_steps 20",
        "SYNC_S": "2",
    }

    def start(name: str, **more: str) -> subprocess.Popen:
        command = ["bash", ROOT / "serverless" / "train_and_sync.sh"]
        here = environment | {"OUTPUT": str(tmp_path / name)} | more
        return subprocess.Popen(command, env=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def sent() -> list[str]:
        listed = s3_folder.client.list_objects_v2(
            Bucket=s3_folder.server.bucket, Prefix=f"{s3_folder.name}/runs/jazz/"
        )
        return [entry["Key"] for entry in listed.get("Contents", [])]

    first = start("first")
    end = time.monotonic() + 300
    while not any("checkpoint-" in key for key in sent()):
        assert first.poll() is None and time.monotonic() < end, first.communicate()[0]
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 143, said
    stopped_at = metrics(tmp_path / "first")[-1]["update"]
    assert any(f"/checkpoint-{stopped_at}/" in key for key in sent())
    shutil.rmtree(tmp_path / "first")  # that machine is gone

    second = start("second")
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0, said
    assert f"{stopped_at} of 400 updates are done" in said
    assert [line["update"] for line in metrics(tmp_path / "second")] == list(range(1, 401))
    assert any(key.endswith("/pytorch_lora_weights.safetensors") for key in sent())

    wrong = start("third", AWS_SECRET_ACCESS_KEY="wrong")
    said, _ = wrong.communicate(timeout=300)
    assert wrong.returncode != 0 and not any((tmp_path / "third").iterdir()), said
