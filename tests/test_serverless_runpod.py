"""MODE=runpod, RunPod's own worker with our handler, against a queue on loopback: `make serverless-test`."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.runpod_queue import KEY, running_queue
from tests.test_serverless_jobs import ARGUMENTS, GENERATE, trainings

pytestmark = [pytest.mark.slow, pytest.mark.vendors]
ROOT = Path(__file__).resolve().parents[1]
ENTRYPOINT = (sys.executable, "-m", "acestep_pipeline.container")


@pytest.fixture
def environment(s3_folder, demo_dir, adapter_dir, tmp_path) -> dict[str, str]:
    """A worker's environment, whose S3 root is the test's own."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "loud").symlink_to(adapter_dir)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")},
        "PYTHONPATH": str(ROOT),
        "MODE": "runpod",
        "NUM_GPUS": "0",
        "ACESTEP_MODEL": "tiny",
        "ACESTEP_JOBS_DATA": str(demo_dir),
        "ACESTEP_JOBS_OUTPUT": str(tmp_path / "output"),
        "ACESTEP_ADAPTERS": str(tmp_path / "lora"),
        "ACESTEP_S3_ROOT": s3_folder.url,
    }


@contextmanager
def running_worker(environment: dict[str, str], log: Path):
    with log.open("wb") as file:
        process = subprocess.Popen(ENTRYPOINT, env=environment, stdout=file, stderr=file)
    try:
        yield process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()


def test_the_worker_takes_jobs_streams_them_cancels_one_and_ends_in_order(environment, s3_folder, tmp_path):
    training = {
        "task": "train",
        "name": "jazz",
        "data": ".",
        "arguments": ARGUMENTS | {"max_train_steps": 3000},
        "upload": f"{s3_folder.url}/lora/jazz",
    }
    output, log = tmp_path / "output" / "jazz", tmp_path / "log.txt"
    with running_queue() as jobs, running_worker(environment | jobs.environment, log) as process:
        # What it can't take, it says in one sentence.
        jobs.put("bad", {"task": "train", "data": "file:///etc/passwd"})
        assert "can't be read by a job" in jobs.wait(lambda: jobs.results.get("bad"))["error"]
        assert "Traceback" not in jobs.results["bad"]["error"]

        jobs.put("music", GENERATE | {"adapters": {"loud": 0.8}, "upload": f"{s3_folder.url}/results/music"})
        events = jobs.wait(lambda: jobs.results.get("music"))["output"]
        assert events == jobs.streams["music"] and [event["event"] for event in events][-2:] == ["uploading", "result"]
        assert 0 < events[-1]["load_s"] <= events[-1]["cold_start_s"]
        clip = next(file for file in events[-1]["results"]["files"] if file["file"].endswith(".wav"))
        with urllib.request.urlopen(clip["url"]) as answer:
            assert len(answer.read()) == clip["size"]

        # Cancelled while it trains: the training ends with a checkpoint, and the worker takes the next job.
        jobs.put("first", training)
        progress = jobs.wait(lambda: [event for event in jobs.streams["first"] if event["event"] == "progress"])[0]
        assert progress["of"] == 3000 and progress["loss"] > 0
        assert len(trainings(process.pid)) == 1
        assert KEY not in str(trainings(process.pid)[0].environ()), "the worker's key is no business of the training's"
        jobs.stop("first")
        jobs.wait(lambda: not trainings(process.pid))
        (checkpoint,) = output.glob("checkpoint-*")
        assert "first" not in jobs.results, "whoever cancelled it waits for no answer"
        done = int(checkpoint.name.removeprefix("checkpoint-"))

        # The same job goes on, and SIGTERM, by which RunPod takes the worker away, stops it and the worker.
        jobs.put("again", training)
        progress = jobs.wait(lambda: [event for event in jobs.streams["again"] if event["event"] == "progress"])
        assert progress[-1]["update"] > done
        process.send_signal(signal.SIGTERM)
        result = jobs.wait(lambda: jobs.results.get("again"))["output"][-1]
        assert result["status"] == "stopped" and (output / result["checkpoint"]).is_dir()
        assert process.wait(60) == 0
        assert jobs.pings, "it told RunPod that it was alive"
    said = log.read_text() + (tmp_path / "output" / ".jobs" / "jazz" / "log.txt").read_text()
    assert "X-Amz-Signature" in clip["url"] and "X-Amz-Signature" not in said and KEY not in said


def test_a_training_from_the_queue_ends_with_links(environment, s3_folder, tmp_path):
    job = {"task": "train", "data": ".", "arguments": ARGUMENTS, "upload": f"{s3_folder.url}/lora/x"}
    with running_queue() as jobs, running_worker(environment | jobs.environment, tmp_path / "log.txt"):
        jobs.put("u1-e2", job)
        result = jobs.wait(lambda: jobs.results.get("u1-e2"))["output"][-1]
    assert result["status"] == "done" and result["name"] == "u1-e2" and result["update"] == 60
    assert "pytorch_lora_weights.safetensors" in [file["file"] for file in result["results"]["files"]]


def test_test_input_does_one_job_and_writes_no_link(environment, s3_folder):
    def run(job: dict, *more: str) -> subprocess.CompletedProcess:
        command = [*ENTRYPOINT, "--test_input", json.dumps({"input": job}), *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    done = run(GENERATE | {"upload": f"{s3_folder.url}/results/x"})
    assert done.returncode == 0 and "'status': 'done'" in done.stdout and "0.wav" in done.stdout, done.stderr
    assert "X-Amz-Signature" not in done.stdout + done.stderr
    refused = run(GENERATE | {"prompt": ""})
    telling = run(GENERATE, "--rp_log_level", "debug")
    assert telling.returncode == 1 and "use INFO" in telling.stderr and "Started" not in telling.stdout
    assert refused.returncode == 1 and "prompt string should have at least 1 character" in refused.stdout


def test_the_local_api_answers(environment, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*ENTRYPOINT, "--rp_serve_api", "--rp_api_port", str(port), "--rp_api_host", "127.0.0.1"]
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        answer = None
        for _ in range(300):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/runsync",
                json.dumps({"input": GENERATE}).encode(),
                {"Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=300) as reply:
                    answer = json.load(reply)
                break
            except ConnectionError:
                time.sleep(0.5)
            except urllib.error.URLError as error:
                if not isinstance(error.reason, ConnectionError):
                    raise
                time.sleep(0.5)
        assert answer is not None, (tmp_path / "log.txt").read_text()
        assert answer["status"] == "COMPLETED" and answer["output"][-1]["status"] == "done", answer
    finally:
        process.terminate()
        process.wait(30)
