"""Jobs done for real on the tiny checkpoint: training as a process, generation with a warm model, files on S3."""

import asyncio
import base64
import contextlib
import io
import json
import os
import threading
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.jobs import file_jobs
from acestep_pipeline.jobs.places import Places
from acestep_pipeline.jobs.results import without_links
from acestep_pipeline.jobs.worker import Worker, sentence
from tests.test_hub import hub  # noqa: F401 - a fixture
from tests.training_runs import metrics

GENERATE = {
    "task": "generate",
    "prompt": "slow blues",
    "duration_s": 1,
    "num_inference_steps": 2,
    "format": "wav",
    "loudness_lufs": None,
}
ARGUMENTS = {
    "preset": "smoke",
    "max_train_steps": 60,
    "min_duration_s": 1,
    "max_duration_s": 4,
    "rank": 4,
    "mixed_precision": "no",
    "num_validation_samples": 0,
    "num_validation_draws": 1,
}


@pytest.fixture
def worker(demo_dir, adapter_dir, tmp_path, monkeypatch) -> Worker:
    """A worker with the demo clips as its data and one adapter, `loud`, in its library."""
    monkeypatch.setenv("ACESTEP_MODEL", "tiny")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "loud").symlink_to(adapter_dir)
    return Worker(Places(data=demo_dir, output=tmp_path / "output", adapters=str(tmp_path / "lora")))


def trainings(of: int | None = None) -> list[psutil.Process]:
    """The trainings that a process (this one) has started and that are alive."""
    found = []
    for child in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if "train_ace_step_lora.py" in " ".join(child.cmdline()):
                found.append(child)
    return found


def heard(result: dict, index: int = -1) -> np.ndarray:
    files = [file for file in result["results"]["files"] if not file["file"].endswith(".json")]
    return soundfile.read(io.BytesIO(base64.b64decode(files[index]["base64"])))[0]


def test_a_training_is_stopped_and_goes_on_and_its_links_work(worker, demo_dir, s3_folder, tmp_path, capfd):
    job = {
        "task": "train",
        "name": "jazz",
        "data": str(demo_dir),
        "model": "tiny",
        "arguments": ARGUMENTS,
        "lora_config": {"r": 2, "lora_alpha": 4},
        "upload": f"{s3_folder.url}/lora/jazz",
        "links_valid_s": 600,
    }
    stop, events = threading.Event(), []

    def emit(event: dict) -> None:
        events.append(event)
        if event["event"] == "progress" and not stop.is_set():
            assert len(trainings()) == 1
            stop.set()

    result = worker.run(job, job_id="1", emit=emit, stop=stop)
    assert not trainings()
    assert result["status"] == "stopped" and 0 < result["update"] < 60
    assert result["checkpoint"] == f"checkpoint-{result['update']}"
    assert events[0] == {"event": "started", "name": "jazz"}
    first = events[1]
    assert first["of"] == 60 and first["loss"] > 0 and {"update", "eta_s", "seconds"} <= first.keys()

    events = list(worker.stream(job, job_id="2"))
    result = events[-1]
    assert result["event"] == "result" and result["status"] == "done" and result["update"] == 60
    assert result["effect"]["verdict"] and {"event": "uploading"} in events
    assert events[-2] == {"event": "uploading"} and events[-3]["update"] == 60 and events[-3]["eta_s"] == 0
    assert [line["update"] for line in metrics(tmp_path / "output" / "jazz")] == list(range(1, 61))

    links = {file["file"]: file for file in result["results"]["files"]}
    weights = tmp_path / "output" / "jazz" / "pytorch_lora_weights.safetensors"
    with urllib.request.urlopen(links[weights.name]["url"]) as answer:
        assert answer.read() == weights.read_bytes()
        assert answer.headers["Content-Disposition"] == f'attachment; filename="{weights.name}"'
    assert "README.md" in links and not any("checkpoint" in name for name in links)
    # What can be found on disk and in the log of the worker has no link, and no key.
    said = "".join(capfd.readouterr()) + (tmp_path / "output" / ".jobs" / "jazz" / "log.txt").read_text()
    assert "X-Amz-Signature" in links["README.md"]["url"] and "X-Amz-Signature" not in said
    assert "X-Amz-Signature" not in json.dumps(without_links(result))


@pytest.mark.slow
def test_a_folder_of_music_on_the_hub_keeps_its_sidecars(worker, demo_dir, hub, tmp_path, monkeypatch):  # noqa: F811
    hub.add("datasets/tester/music", {"main": demo_dir})
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)  # for the training's process
    job = {"task": "train", "model": "tiny", "arguments": ARGUMENTS | {"max_train_steps": 1}}
    for name, data in (("here", str(demo_dir)), ("there", "hf://datasets/tester/music")):
        assert worker.run(job | {"name": name, "data": data})["status"] == "done"
    here, there = (tmp_path / "output" / name / "pytorch_lora_weights.safetensors" for name in ("here", "there"))
    assert here.read_bytes() == there.read_bytes()


def test_what_a_training_refuses_is_its_sentence(worker, tmp_path):
    job = {"task": "train", "data": ".", "model": "tiny", "arguments": {"optimizer": "adamm"}}
    with pytest.raises(UsageError, match=r"^--optimizer .*adamm"):
        worker.run(job, job_id="a/../b")
    assert (tmp_path / "output" / ".jobs" / "a-..-b" / "log.txt").is_file(), "the vendor's id is no path"


def test_a_cancelled_stream_ends_its_training(worker, demo_dir):
    async def cancel() -> None:
        stop = threading.Event()
        job = {"task": "train", "data": str(demo_dir), "model": "tiny", "arguments": ARGUMENTS}

        async def consume() -> None:
            async for event in worker.stream_async(job, job_id="1", stop=stop):
                if event["event"] == "started":
                    begun.set()

        begun = asyncio.Event()
        task = asyncio.create_task(consume())
        await begun.wait()
        while not trainings():
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stop.is_set() and not trainings()

    asyncio.run(cancel())


def test_the_base_model_stays_and_adapters_come_and_go(worker):
    events: list[dict] = []
    plain = worker.run(GENERATE, emit=events.append)
    assert plain["status"] == "done" and plain["load_s"] > 0 and plain["cold_start_s"] >= plain["load_s"]
    assert events[0]["event"] == "loaded" and events[-1]["step"] == events[-1]["of"] == 2
    pipeline = worker.generator().pipeline
    loud = worker.run(GENERATE | {"adapters": {"loud": 1.0}})
    again = worker.run(GENERATE)
    assert worker.generator().pipeline is pipeline and "load_s" not in loud
    assert np.abs(heard(plain) - heard(loud)).max() > 0.01, "the adapter is heard"
    assert np.array_equal(heard(plain), heard(again)), "and gone afterwards"
    two = worker.run(GENERATE | {"variations": 2, "seed": 5})
    assert [file["file"] for file in two["results"]["files"]] == ["5.json", "5.wav", "6.json", "6.wav"]
    assert heard(two).shape == (48000, 2)
    with pytest.raises(UsageError, match="has no adapter 'quiet'"):
        worker.run(GENERATE | {"adapters": {"quiet": 1.0}})
    with pytest.raises(UsageError, match="no key"):
        worker.run(GENERATE | {"keyscale": "H"})
    assert not list((worker.places.output / ".jobs").iterdir()), "what was handed back is not kept"
    worker.release()
    assert worker._generator is None


def test_a_generation_is_cancelled_between_two_steps(worker):
    stop = threading.Event()
    with pytest.raises(RunError, match="cancelled"):
        for event in worker.stream(GENERATE | {"num_inference_steps": 200, "duration_s": 10}, stop=stop):
            if event["event"] in ("loaded", "progress"):
                stop.set()
    assert worker.run(GENERATE)["status"] == "done", "the next job is none the wiser"


def test_results_too_large_for_an_answer_ask_for_an_upload(worker):
    with pytest.raises(UsageError, match="name an upload"):
        worker.run(GENERATE | {"duration_s": 30, "num_inference_steps": 1})


def test_clips_are_published(worker, s3_folder):
    result = worker.run(GENERATE | {"upload": f"{s3_folder.url}/results/a"})
    (clip,) = [file for file in result["results"]["files"] if file["file"].endswith(".wav")]
    with urllib.request.urlopen(clip["url"]) as answer:
        assert len(answer.read()) == clip["size"]


def test_an_upload_that_can_not_be_is_refused_before_the_work(worker, s3_folder, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UsageError, match="credentials are wrong"):
        worker.run(GENERATE | {"upload": f"{s3_folder.url}/x"})
    assert worker._generator is None


def test_a_dataset_on_the_hub_is_examined_if_it_fits(demo_dir, hub, tmp_path, monkeypatch):  # noqa: F811
    hub.add("datasets/tester/music", {"main": demo_dir})
    worker = Worker(Places(output=tmp_path), tasks=("validate_dataset",))
    job = {"task": "validate_dataset", "data": "hf://datasets/tester/music"}
    assert worker.run(job | {"name": "one"})["tracks"] == 6
    monkeypatch.setattr(file_jobs, "free_space_bytes", lambda disk: 1000)
    with pytest.raises(UsageError, match="hf://datasets/tester/music has 0.00 GB, and this worker takes"):
        worker.run(job | {"name": "two"})


def test_a_dataset_is_examined_and_its_card_and_report_are_linked(demo_dir, s3_folder, tmp_path):
    for path in sorted(demo_dir.iterdir()):
        s3_folder.put({f"music/{path.name}": path.read_bytes()})
    s3_folder.put({"music/broken.wav": b"RIFF" + bytes(100)})
    worker = Worker(Places(output=tmp_path, s3_root=s3_folder.url), tasks=("validate_dataset",))
    job = {"task": "validate_dataset", "data": f"{s3_folder.url}/music", "upload": f"{s3_folder.url}/results/x"}
    result = worker.run(job)
    assert result["tracks"] == 6 and result["rejected"] == 1
    assert any(finding["track"].startswith("broken") for finding in result["findings"])
    assert [file["file"] for file in result["results"]["files"]] == ["dataset_card.md", "report.html", "report.json"]
    with pytest.raises(UsageError, match='task must be one of validate_dataset, not "generate"'):
        worker.run(GENERATE)


def test_an_adapter_is_converted_and_described(adapter_dir, tmp_path):
    worker = Worker(Places(data=adapter_dir.parent, output=tmp_path))
    converted = worker.run({"task": "convert_adapter", "adapter": adapter_dir.name, "to": "comfyui", "name": "jazz"})
    (file,) = converted["results"]["files"]
    assert file["file"] == "jazz_comfyui.safetensors" and converted["layers"] > 0
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / file["file"]).write_bytes(base64.b64decode(file["base64"]))
    there = Worker(Places(data=tmp_path / "back", output=tmp_path))
    described = there.run({"task": "describe_adapter", "adapter": file["file"]})
    assert described["layers"] == converted["layers"] and "rank" in described["description"]
    assert [file["file"] for file in described["results"]["files"]] == ["adapter.txt", "layers.png"]
    with pytest.raises(UsageError, match="no safetensors file"):
        (tmp_path / "back" / "bad.safetensors").write_bytes(b"no")
        there.run({"task": "describe_adapter", "adapter": "bad.safetensors"})


def test_a_defect_is_named_without_what_it_says():
    assert sentence(UsageError("a\nb")) == "a b"
    assert "secret" not in sentence(ValueError("secret")) and "ValueError" in sentence(ValueError("secret"))


def test_an_output_that_can_not_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be written"):
        Worker(Places(output=Path(tmp_path / "file"))).run(GENERATE)
    assert os.path.isfile(tmp_path / "file")
