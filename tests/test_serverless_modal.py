"""serverless/modal_app.py without Modal: imported, and its functions called here: `make serverless-test`."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_serverless_jobs import ARGUMENTS, GENERATE

pytestmark = [pytest.mark.slow, pytest.mark.vendors]
ROOT = Path(__file__).resolve().parents[1]
IMAGE = "registry.example/me/acestep-lora:1"


@pytest.fixture
def modal_app(demo_dir, adapter_dir, tmp_path, monkeypatch):
    """The app, with folders of the test's own."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "loud").symlink_to(adapter_dir)
    monkeypatch.setenv("ACESTEP_MODAL_IMAGE", IMAGE)
    monkeypatch.setenv("ACESTEP_MODEL", "tiny")
    monkeypatch.setenv("ACESTEP_JOBS_DATA", str(demo_dir))
    monkeypatch.setenv("ACESTEP_JOBS_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setenv("ACESTEP_ADAPTERS", str(tmp_path / "lora"))
    monkeypatch.delenv("ACESTEP_S3_ROOT", raising=False)
    return importlib.import_module("serverless.modal_app")


def test_a_training_runs_and_what_is_refused_is_not_tried_again(modal_app, tmp_path, capsys):
    job = {"task": "train", "name": "jazz", "data": ".", "arguments": ARGUMENTS}
    result = modal_app.train.local(job)
    assert result["status"] == "done" and result["update"] == 60
    assert (tmp_path / "output" / "jazz" / "pytorch_lora_weights.safetensors").is_file()
    assert '"event": "progress"' in capsys.readouterr().out
    assert modal_app.train.local(job | {"data": "/etc"})["status"] == "refused"
    assert "task must be one of train" in modal_app.train.local(GENERATE)["error"]
    assert modal_app.train.local([])["status"] == "refused"


def test_a_training_that_ran_out_of_its_day_is_tried_again(modal_app, monkeypatch):
    from acestep_pipeline.errors import RunError

    monkeypatch.setattr(modal_app, "TIMEOUT_S", modal_app.MARGIN_S + 45)
    job = {"task": "train", "name": "long", "data": ".", "arguments": ARGUMENTS | {"max_train_steps": 100_000}}
    with pytest.raises(RunError, match="the next try goes on"):
        modal_app.train.local(job)


def test_music_is_made_by_one_model_that_stays(modal_app):
    music = modal_app.Music()
    first = list(music.generate.local(GENERATE))
    second = list(music.generate.local(GENERATE | {"adapters": {"loud": 1.0}}))
    assert first[-1]["status"] == second[-1]["status"] == "done"
    assert first[-1]["results"] != second[-1]["results"]
    assert list(music.generate.local(GENERATE | {"duration_s": 900}))[-1]["status"] == "refused"


def test_what_is_deployed_has_its_gpu_and_its_volumes(modal_app):
    deployed = modal_app.train._spec_
    assert deployed.gpus == "H100" and deployed.volumes.keys() == {"/output", "/cache"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ACESTEP_MODAL_IMAGE": IMAGE, "ACESTEP_MODAL_TRAIN_GPU": "H1OO"}, "did you mean H100?"),
        ({"ACESTEP_MODAL_IMAGE": ""}, "ACESTEP_MODAL_IMAGE must name the image in its registry"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_deployed(settings, said):
    result = subprocess.run(
        [sys.executable, "-c", "import serverless.modal_app"],
        cwd=ROOT,
        env=os.environ | settings | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0 and said in result.stderr
