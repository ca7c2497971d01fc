"""A disk that is full, wherever a run writes: a sentence that names the file, nothing half-written, and on it goes."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from unittest import mock

import pytest
import soundfile
from safetensors.torch import load_file

from acestep_pipeline import cli, generation, tiny_checkpoint
from acestep_pipeline.adapters import trainable as adapters
from acestep_pipeline.data import latent_cache
from acestep_pipeline.data.cache_files import read_header
from acestep_pipeline.errors import RunError
from acestep_pipeline.training import completion, final_report, manifest, run_directory, tracking, validator
from tests.training_runs import ROOT, SCRIPT, flags, metrics, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
SETTINGS = {
    "max_train_steps": 3,
    "checkpointing_steps": 1,
    "max_train_samples": 2,
    "max_duration_s": 2,
    "validation_fraction": 0.5,
    "validation_steps": 1,
    "num_validation_draws": 1,
    "num_validation_samples": 1,
    "validation_duration_s": 2,
    "validation_inference_steps": 1,
}
# In the order of a run: the disk is full when this function is called for the N-th time, and this file can't be
# written. Each run goes on where the one before has failed.
FAILURES = [
    (tracking, "write_training_args", 1, "training_args.json"),
    (tracking.MetricsFile, "write", 1, "validation.jsonl"),
    (tracking.MetricsFile, "write", 3, "metrics.jsonl"),
    (validator, "save_lora", 1, f"best/{WEIGHTS}"),
    (validator, "save_lora", 2, f"best/{WEIGHTS}"),
    (adapters, "save_lora", 1, WEIGHTS),
    (generation, "write_audio", 1, "samples/sample-0_with_adapter.wav"),
    (final_report, "plot_loss", 1, "loss.png"),
    (final_report, "write_model_card", 1, "README.md"),
    (completion, "mark_finished", 1, "finished.json"),
]


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs; the last test fails a write without one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk) -> None:
    """Write until not a byte is left."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


@contextmanager
def full_from(disk, module, function: str, call: int):
    """Fill the disk just before a function is called for the `call`-th time; make room again at the end."""
    original, calls = getattr(module, function), []

    def watched(*args, **kwargs):
        calls.append(function)
        if len(calls) == call:
            fill(disk)
        return original(*args, **kwargs)

    with mock.patch.object(module, function, watched):
        yield
    assert len(calls) >= call, f"{function} was called {len(calls)} times"
    (disk / "ballast").unlink()


def check_whole(output) -> None:
    """Whatever has its final name is whole, and nothing else is left."""
    for path in output.rglob("*"):
        assert ".partial" not in path.name and path.suffix != ".tmp"
        if path.suffix == ".jsonl":
            assert path.read_text()[-1:] in ("", "\n") and tracking.read_metrics(path) is not None
        elif path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix == ".wav":
            assert soundfile.info(path).duration == 2
        elif path.is_file():
            assert path.stat().st_size > 0
    for checkpoint in run_directory.list_checkpoints(output):
        assert manifest.find_damage(checkpoint) is None


def test_a_run_fails_wherever_it_writes_and_goes_on_every_time(disk, demo_dir, tmp_path):
    output = disk / "run"
    for module, function, call, name in FAILURES:
        with full_from(disk, module, function, call), pytest.raises(RunError) as failure:
            train_here(demo_dir, output, resume_from_checkpoint="latest", **SETTINGS)
        told, kept = str(failure.value), run_directory.list_checkpoints(output)
        assert told.startswith(f"{output / name} can't be written ("), told
        assert "No space left on device" in told or "os error 28" in told
        assert told.endswith(
            "make room and continue with --resume_from_checkpoint latest. "
            f"Kept: {kept[-1] if kept else 'no checkpoint yet'}."
        )
        check_whole(output)
    assert kept[-1].name == "checkpoint-3"
    train_here(demo_dir, output, resume_from_checkpoint="latest", **SETTINGS)
    check_whole(output)

    train_here(demo_dir, tmp_path / "undisturbed", **SETTINGS)
    assert metrics(output) == metrics(tmp_path / "undisturbed")
    names = {path.relative_to(tmp_path / "undisturbed") for path in (tmp_path / "undisturbed").rglob("*")}
    assert {path.relative_to(output) for path in output.rglob("*")} == names
    for name in (WEIGHTS, f"best/{WEIGHTS}", "validation.jsonl", "samples/sample-0_with_adapter.wav"):
        assert (output / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_a_full_cache_keeps_what_was_encoded(disk, demo_dir, tmp_path):
    few = SETTINGS | {"max_train_steps": 1, "num_validation_samples": 0, "latent_cache_dir": disk / "cache"}
    with full_from(disk, latent_cache, "write_cache_file", 3), pytest.raises(RunError) as failure:
        train_here(demo_dir, tmp_path / "run", **few)
    assert str(failure.value).startswith(f"{disk / 'cache'}/v") and "another --latent_cache_dir" in str(failure.value)
    files = {path: path.stat().st_mtime_ns for path in (disk / "cache").rglob("*") if path.is_file()}
    assert len(files) == 3 and all(read_header(path) for path in files)
    assert not list((disk / "cache").rglob(".partial*"))
    train_here(demo_dir, tmp_path / "run", **few)
    assert all(path.stat().st_mtime_ns == made for path, made in files.items())


def test_other_commands_name_the_file_too(disk, tmp_path, capsys):

    def failed(command) -> str:
        with pytest.raises(SystemExit) as stopped:
            cli.main(command)
        assert stopped.value.code == 1
        return capsys.readouterr().err.splitlines()[-1]

    fill(disk)
    os.truncate(disk / "ballast", 15 << 20)  # enough for a folder and a few small files
    assert failed(["tiny-checkpoint", str(disk / "tiny")]).startswith(f"error: {disk / 'tiny'} can't be written (")
    assert [path.name for path in disk.iterdir()] == ["ballast"]
    generate = ["generate", "--pretrained_model_name_or_path", "tiny", "--prompt", "x", "--duration", "10"]
    generate += ["--num_inference_steps", "1", "--output", str(disk / "out.wav")]
    assert failed(generate).startswith(f"error: {disk / 'out.wav'} can't be written (No space left on device)")
    assert [path.name for path in disk.iterdir()] == ["ballast"]
    (disk / "ballast").unlink()
    tiny_checkpoint.write_tiny_checkpoint(disk / "tiny")


@pytest.mark.slow
def test_a_process_that_may_not_write_large_files_ends_with_status_1(demo_dir, tmp_path):
    """Without a disk of its own: its files may not grow to the size of a sample, the largest that there is."""
    output, limit = tmp_path / "run", 300_000
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *flags(demo_dir, output, **SETTINGS)],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
    )
    sample = output / "samples" / "sample-0_with_adapter.wav"
    (error,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert error == (
        f"error: {sample} can't be written (File too large); make room and continue with "
        f"--resume_from_checkpoint latest. Kept: {output / 'checkpoint-3'}."
    )
    check_whole(output)
    train_here(demo_dir, output, resume_from_checkpoint="latest", **SETTINGS)
    assert sample.is_file() and (output / "finished.json").is_file()


def test_what_a_command_writes(disk, demo_dir, tmp_path, capsys):
    train_here(demo_dir, tmp_path / "run", max_train_steps=1, max_duration_s=2)
    fill(disk)
    for command in (
        ["dataset", "build", "--data-dir", demo_dir, "--output-dir"],
        ["adapters", "convert", tmp_path / "run", "--to", "peft", "--output"],
        ["adapters", "convert", tmp_path / "run", "--to", "merged", "--output"],
        ["adapters", "merge", tmp_path / "run", "--output"],
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(word) for word in (*command, disk / "out")])
        *_, error = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 1, error
        assert error == f"error: {disk / 'out'} can't be written: the disk is full; make room, and run this again."
