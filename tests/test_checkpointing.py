"""Checkpoints: whole or recognised as damaged, whatever an optimizer keeps, and what a full disk leaves."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from acestep_pipeline.errors import RunError, UsageError, one_sentence_errors
from acestep_pipeline.training import checkpointing, manifest, run_directory
from acestep_pipeline.training.plain_state import join_state, split_state
from tests.training_runs import ROOT, SCRIPT, flags, metrics, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
SETTINGS = {"max_train_steps": 6, "checkpointing_steps": 2, "lora_dropout": 0.1, "max_duration_s": 2}


@pytest.fixture(scope="module")
def finished(demo_dir, tmp_path_factory):
    """A run of six updates with checkpoints 2, 4 and 6. Read-only: copy it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train_here(demo_dir, output, **SETTINGS)
    return output


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run."""
    return shutil.copytree(finished, tmp_path / "run")


def names(output):
    return [path.name for path in run_directory.list_checkpoints(output)]


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit in the optimizer": lambda folder: flip_a_byte(folder / "optimizer.safetensors"),
    "a flipped bit in the adapter": lambda folder: flip_a_byte(folder / WEIGHTS),
    "a cut file": lambda folder: os.truncate(folder / "trainer_state.json", 10),
    "a missing file": lambda folder: (folder / WEIGHTS).unlink(),
    "no manifest": lambda folder: (folder / manifest.MANIFEST_NAME).unlink(),
    "half a manifest": lambda folder: os.truncate(folder / manifest.MANIFEST_NAME, 40),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_used_and_both_are_named(run, capsys, damage):
    DAMAGES[damage](run / "checkpoint-6")
    assert run_directory.find_checkpoint(run, "latest") == run / "checkpoint-4"
    said = capsys.readouterr().out
    assert f"warning: {run / 'checkpoint-6'} is damaged and not used: " in said
    assert f"warning: using {run / 'checkpoint-4'} instead." in said
    if damage != "an empty folder":
        with pytest.raises(UsageError, match=f"--resume_from_checkpoint {run / 'checkpoint-6'} is damaged: its? "):
            run_directory.find_checkpoint(run, str(run / "checkpoint-6"))


def test_a_whole_one_is_used_without_a_word(run, capsys):
    assert run_directory.find_checkpoint(run, "latest") == run / "checkpoint-6"
    assert run_directory.find_checkpoint(run, "checkpoint-2") == run / "checkpoint-2"
    assert capsys.readouterr().out == ""


def test_nothing_is_started_over_because_all_are_damaged(run):
    for name in names(run):
        flip_a_byte(run / name / WEIGHTS)
    with pytest.raises(UsageError, match="every checkpoint in .* is damaged; .*SHA-256"):
        run_directory.find_checkpoint(run, "latest")


def test_a_run_goes_on_from_before_the_damage_to_the_same_end(run, finished, demo_dir, capsys):
    """Two damaged ones, beyond a limit of one: they count for nothing, and the whole one outlives them."""
    for name in ("checkpoint-4", "checkpoint-6"):
        flip_a_byte(run / name / "optimizer.safetensors")
    (run / ".partial-checkpoint-5").mkdir()
    half_written = (".partial-metrics.jsonl-abc", f"best/.partial-{WEIGHTS}-abc", "samples/.partial-sample-0.wav-abc")
    for name in half_written:
        (run / name).mkdir(parents=True)
    train_here(demo_dir, run, resume_from_checkpoint="latest", checkpoints_total_limit=1, **SETTINGS)
    said = capsys.readouterr().out
    assert f"{run / 'checkpoint-6'} is damaged and not used: its optimizer.safetensors has another SHA-256" in said
    assert f"Removed {run / 'checkpoint-4'}" in said and "2 of 6 updates are done" in said
    assert (run / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
    assert metrics(run) == metrics(finished)
    assert names(run) == ["checkpoint-6"] and not list(run.rglob(".partial*"))
    for file in (WEIGHTS, "optimizer.safetensors", "trainer_state.json"):
        assert (run / "checkpoint-6" / file).read_bytes() == (finished / "checkpoint-6" / file).read_bytes(), file


def test_a_finished_run_is_not_begun_again(demo_dir, tmp_path, capsys):
    """Killed just after `finished.json` had its name, it has left a folder as well."""
    command = {**SETTINGS, "max_train_steps": 1, "resume_from_checkpoint": "latest"}
    train_here(demo_dir, tmp_path, **command)
    (tmp_path / ".partial-finished.json-abc").mkdir()
    adapter = (tmp_path / WEIGHTS).stat()
    capsys.readouterr()
    train_here(demo_dir, tmp_path, **command)
    assert "nothing is left to do" in capsys.readouterr().out
    assert (tmp_path / WEIGHTS).stat() == adapter and not list(tmp_path.glob(".partial*"))


def test_going_back_removes_what_lies_beyond(run, finished, demo_dir):
    """Or `latest` would one day go on from there, without the metrics of the updates before."""
    before = {path: path.read_bytes() for path in (run / "checkpoint-2").iterdir()}
    run_directory.clear_leftovers(run, update=2)
    assert names(run) == ["checkpoint-2"] and before == {path: path.read_bytes() for path in before}


def test_a_file_with_a_checkpoints_name_is_none(tmp_path):
    (tmp_path / "checkpoint-7").write_text("mine")
    assert names(tmp_path) == [] and run_directory.find_checkpoint(tmp_path, "latest") is None


def test_the_manifest_names_every_file_with_its_hash(finished):
    folder = finished / "checkpoint-6"
    files = {entry["file"]: entry["size"] for entry in json.loads((folder / "manifest.json").read_text())["files"]}
    expected = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"}
    assert files == expected and files.keys() == {WEIGHTS, "optimizer.safetensors", "trainer_state.json"}
    assert manifest.find_damage(folder) is None


def test_checkpoints_by_epochs_and_by_updates():
    def due(**intervals):
        every = {"every_updates": None, "every_epochs": None} | intervals
        return [done for done in range(1, 12) if checkpointing.is_due(done, per_epoch=3, **every)]

    assert due(every_epochs=1) == [3, 6, 9]
    assert due(every_epochs=2) == [6]
    assert due(every_updates=4) == [4, 8]
    assert due(every_updates=4, every_epochs=2) == [4, 6, 8]


def test_an_epoch_is_every_track_once(demo_dir, tmp_path):
    output = tmp_path / "epochs"
    train_here(demo_dir, output, max_train_steps=9, max_train_samples=3, checkpointing_epochs=2, max_duration_s=2)
    assert names(output) == ["checkpoint-6", "checkpoint-9"]


# --- Any state


def test_any_state_comes_back_as_it_was(tmp_path):
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3).T, "d": 1e-6, "beta": (0.9, None)}},
        "param_groups": [{"params": [0, 1], "betas": (0.9, 0.999), "foreach": None, "train_mode": True}],
        "nested": {"codes": [torch.arange(4, dtype=torch.uint8)], "name": "x.y"},
    }
    tensors, values = split_state(state)
    save_file(tensors, tmp_path / "tensors.safetensors")
    back = join_state(load_file(tmp_path / "tensors.safetensors"), json.loads(json.dumps(values)))
    tensors_again, values_again = split_state(back)
    assert values_again == values and all(torch.equal(tensors[name], tensors_again[name]) for name in tensors)
    assert torch.equal(back["state"][0]["exp_avg"], state["state"][0]["exp_avg"]) and back["state"][0]["d"] == 1e-6
    assert type(back["param_groups"][0]["betas"]) is tuple
    assert sorted(tensors) == ["nested.codes.0", "state.0.exp_avg", "state.0.step"]


def test_what_can_not_be_kept_is_refused_by_name():
    for state, place in (({"a": {"b": object()}}, "a.b"), ({"a": {"__tensor__": "x"}}, "a"), ({"a": {1.5: 2}}, "a")):
        with pytest.raises(TypeError, match=f"^{place} can't be kept in a checkpoint"):
            split_state(state)
    with pytest.raises(TypeError, match="two tensors of the state are called a.1.b"):
        split_state({"a": {1: {"b": torch.ones(1)}}, "a.1": {"b": torch.ones(1)}})


# --- A full disk


def test_a_disk_that_is_full_leaves_the_checkpoint_before(demo_dir, tmp_path):
    """A real one: a file system of a size that holds one checkpoint and not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs; the next test fails writes without one")
    try:
        output = disk / "run"
        with pytest.raises(RunError) as failure:
            train_here(demo_dir, output, **SETTINGS | {"checkpointing_steps": 1})
        told = str(failure.value)
        assert "No space left on device" in told or "os error 28" in told
        assert "Kept: " in told and "--resume_from_checkpoint latest" in told
        kept = run_directory.find_checkpoint(output, "latest")
        assert kept is not None and str(kept) in told
        assert not list(output.glob(".partial*"))
        saved = shutil.copytree(output, tmp_path / "copy")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    train_here(demo_dir, saved, resume_from_checkpoint="latest", **SETTINGS | {"checkpointing_steps": 1})
    assert len(metrics(saved)) == 6


def test_a_write_that_fails_leaves_the_checkpoint_before(run, demo_dir, finished):
    """In a process of its own, whose files may not grow beyond less than the optimizer's state."""
    shutil.rmtree(run / "checkpoint-6")
    largest = (run / "checkpoint-4" / "optimizer.safetensors").stat().st_size
    command = [sys.executable, str(SCRIPT), *flags(demo_dir, run, resume_from_checkpoint="latest", **SETTINGS)]
    limits = (largest - 1000, largest - 1000)
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=300, preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, limits), env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    (error,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert f"{run / 'checkpoint-6'} can't be written" in error and "File too large" in error
    assert error.endswith(f"Kept: {run / 'checkpoint-4'}.")
    assert names(run) == ["checkpoint-2", "checkpoint-4"] and not list(run.glob(".partial*"))
    train_here(demo_dir, run, resume_from_checkpoint="latest", **SETTINGS)
    assert (run / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes() and metrics(run) == metrics(finished)


def test_nan_weights_are_never_saved(demo_dir, tmp_path):
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="update 7 made the adapter's weights NaN"), one_sentence_errors(debug=True):
        checkpointing.save_checkpoint(
            tmp_path, update=7, transformer=model, optimizer=None, settings={}, total_limit=None
        )
    assert not list(tmp_path.iterdir())
