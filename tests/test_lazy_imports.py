"""What starts is quick because it imports little: which modules a command's help and a handler's import bring in."""

import os
import subprocess
import sys

import pytest

from tests.training_runs import ROOT

# Each of these costs a tenth of a second to several.
HEAVY = {
    "accelerate", "boto3", "botocore", "datasets", "diffusers", "huggingface_hub", "librosa", "matplotlib", "peft",
    "scipy", "soundfile", "sklearn", "torch", "transformers",
}  # fmt: skip
_REPORT = (
    "import atexit, sys; "
    "atexit.register(lambda: print('imported', *sorted({name.partition('.')[0] for name in sys.modules})))"
)


def imported_by(code: str, *arguments: str) -> set[str]:
    """The top-level modules that a new Python process has at the end of `code`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    result = subprocess.run(
        [sys.executable, "-c", f"{_REPORT}\n{code}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.strip().rpartition("imported")[2].split())


def test_the_list_names_modules_that_are_found():
    assert {"torch", "numpy"} <= imported_by("import torch")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["storage", "pull", "-h"]])
def test_help_of_the_command_imports_nothing_heavy(arguments):
    modules = imported_by("from acestep_pipeline.cli import main; main()", *arguments)
    assert "acestep_pipeline" in modules and not modules & (HEAVY | {"numpy"})


@pytest.mark.parametrize("script", ["train_ace_step_lora.py", "scripts/build_multi_style_dataset.py"])
def test_help_of_a_script_imports_nothing_heavy(script):
    code = f"import runpy, sys; sys.argv[0] = {script!r}; runpy.run_path({script!r}, run_name='__main__')"
    modules = imported_by(code, "--help")
    assert "acestep_pipeline" in modules and not modules & HEAVY


_VENDORS = (pytest.mark.slow, pytest.mark.vendors)


@pytest.mark.parametrize(
    "handler",
    [pytest.param("runpod_handler", marks=_VENDORS), pytest.param("modal_app", marks=_VENDORS), "lambda_handler"],
)
def test_a_serverless_handler_imports_nothing_heavy_before_its_first_job(handler, monkeypatch):
    monkeypatch.setenv("ACESTEP_MODAL_IMAGE", "registry.example/me/acestep-lora:1")
    modules = imported_by(f"import serverless.{handler}")
    # RunPod's own package may bring boto3.
    assert "acestep_pipeline" in modules and not modules & (HEAVY - {"boto3", "botocore"})


def test_the_images_entrypoint_imports_nothing_heavy_before_it_knows_what_to_run():
    modules = imported_by("import acestep_pipeline.container.__main__")
    assert "acestep_pipeline" in modules and not modules & (HEAVY | {"numpy"})
