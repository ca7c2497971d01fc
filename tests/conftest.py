"""Shared by all tests: no network, caches of their own, one tiny checkpoint and one set of demo clips a session."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Before huggingface_hub is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for _name in ("ACESTEP_MODEL", "ACESTEP_DATA", "LORA_CONFIG"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory):
    """The project's caches, in a folder of the session."""
    os.environ["ACESTEP_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_dir(_caches) -> Path:
    """The tiny checkpoint in diffusers layout. Read-only: copy it to change it."""
    from acestep_pipeline.tiny_checkpoint import tiny_checkpoint_path

    return tiny_checkpoint_path()


@pytest.fixture
def tiny_pipeline(tiny_dir):
    """A fresh pipeline on the tiny checkpoint."""
    from acestep_pipeline import ACEStepPipeline

    pipeline = ACEStepPipeline.from_pretrained(tiny_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3 server, started when the first test asks for it."""
    from tests.s3_server import running_s3_server

    with running_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_folder(s3_server, monkeypatch):
    """An empty folder of the test's own on the S3 server, with the environment that lets the project read it."""
    from tests.s3_server import S3Folder

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return S3Folder(s3_server)


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory) -> Path:
    """Six rendered clips of four seconds with tags: quick to encode. Train on them with `--min_duration_s 1`."""
    from acestep_pipeline.data.demo_music import render_demo_dataset

    directory = tmp_path_factory.mktemp("demo") / "clips"
    render_demo_dataset(directory, duration_s=4.0)
    return directory


@pytest.fixture(scope="session")
def adapter_dir(tiny_dir, tmp_path_factory) -> Path:
    """An adapter of the tiny checkpoint that is heard."""
    import torch

    from acestep_pipeline import ACEStepPipeline
    from acestep_pipeline.adapters.trainable import LoraSettings, add_lora, save_lora

    transformer = ACEStepPipeline.from_pretrained(tiny_dir).transformer
    add_lora(transformer, LoraSettings(r=4, lora_alpha=8.0), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    directory = tmp_path_factory.mktemp("adapter")
    save_lora(transformer, directory)
    return directory
