"""What users get wrong, through the flagship script: one sentence that names it, and nothing half-written."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset

from acestep_pipeline import paths
from acestep_pipeline.errors import one_sentence_errors
from acestep_pipeline.training import arguments as script_arguments
from acestep_pipeline.training import directory_lock
from acestep_pipeline.training.argument_checks import check_args
from tests.training_runs import ROOT, SCRIPT, flags, train_here

UNREADABLE = {
    "cut.flac": "the file is truncated or damaged",
    "notes.mp3": "it is not audio: it starts with text 'to do: record more",
    "zero.wav": "the file is empty",
}
ADAPTER = "pytorch_lora_weights.safetensors"
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}


def write_clip(path, *, duration_s=2.0, sample_rate=48_000, channels=2, tags="noise, test"):
    """The same quiet noise at every call, so that its latents are encoded once in all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.05, (round(duration_s * sample_rate), channels))
    soundfile.write(path, noise, sample_rate)
    if tags:
        path.with_suffix(".tags.txt").write_text(tags)
    return path


def write_unreadable(folder):
    """The files of `UNREADABLE`."""
    folder.mkdir(exist_ok=True)
    flac = write_clip(folder / "cut.flac")
    os.truncate(flac, flac.stat().st_size // 2)
    (folder / "notes.mp3").write_text("to do: record more\n" * 50)
    (folder / "zero.wav").touch()


@pytest.fixture
def music(tmp_path):
    """A folder with one good track of two seconds."""
    write_clip(tmp_path / "music" / "good.wav")
    return tmp_path / "music"


@pytest.fixture
def train(tmp_path, capsys):
    """Train in this process for one update; returns what was printed."""

    def run(data, output=None, **changes):
        train_here(data, output or tmp_path / "out", **{"max_train_steps": 1} | changes)
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """The one-sentence error of a run that must not start, with everything it printed in `refused.printed`."""

    def run(data, output=None, **changes):
        output = output or tmp_path / "out"
        before = contents(output)
        with pytest.raises(SystemExit) as stopped, one_sentence_errors():
            train_here(data, output, **changes)
        run.printed, errors = capsys.readouterr()
        assert stopped.value.code == 2
        assert "Traceback" not in errors
        (error,) = (line for line in errors.splitlines() if line.startswith("error: "))
        assert errors.endswith(f"{error}\n")
        assert contents(output) == before
        return error

    return run


def contents(folder):
    """Every path under `folder` with its bytes; None if there is no such folder."""
    if not folder.exists():
        return None
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# --- Tracks


def test_an_empty_folder(tmp_path, refused):
    (tmp_path / "music").mkdir()
    assert "music has no audio files (aif, aiff, flac, mp3" in refused(tmp_path / "music")


def test_a_missing_folder(tmp_path, refused):
    error = refused(tmp_path / "musik")
    assert error == f"error: {tmp_path / 'musik'} is not a folder; name one that holds audio."


def test_nothing_but_unreadable_files(tmp_path, refused):
    write_unreadable(tmp_path / "music")
    error = refused(tmp_path / "music")
    told = error + refused.printed
    for name, reason in UNREADABLE.items():
        assert f"{name}: {reason}" in told


def test_unreadable_files_among_good_ones_are_skipped_by_name(music, tmp_path, train, refused):
    write_unreadable(music)
    error = refused(music, strict=True)
    assert error.startswith("error: --strict: ") and "the first is " in error

    printed = train(music)
    for name, reason in UNREADABLE.items():
        assert f"  skipped  {name}: {reason}" in printed
    assert (tmp_path / "out" / ADAPTER).is_file()
    assert "on 1 tracks" in printed


def test_a_short_track_is_skipped_by_default(music, refused):
    error = refused(music, min_duration_s=None)
    assert "good.wav: it is 2.0 s long, shorter than the 10 s asked for" in error


def test_odd_formats_train(tmp_path, train):
    music = tmp_path / "music"
    for name, options in {
        "mono.wav": {"channels": 1},
        "low.flac": {"sample_rate": 8000},
        "surround.wav": {"channels": 6},
    }.items():
        write_clip(music / name, **options)
    printed = train(music, max_train_steps=3, strict=True)
    assert "on 3 tracks" in printed
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_twenty_minutes_train(tmp_path, train):
    write_clip(tmp_path / "music" / "long.flac", duration_s=1200, sample_rate=8000, channels=1)
    printed = train(tmp_path / "music", max_train_steps=4, max_duration_s=30)
    assert "on 1 tracks, 40 windows of up to 30 s: 4 updates" in printed


def test_missing_tags_and_long_lyrics_are_warned_about(tmp_path, train, tiny_pipeline):
    song = write_clip(tmp_path / "music" / "song.wav", tags=None)
    lyrics = "la la grüße 🎵\n" * 300
    song.with_suffix(".lyrics.txt").write_text(lyrics)
    tokens = tiny_pipeline.tokenizer(f"# Languages\nunknown\n\n# Lyric\n{lyrics.strip()}<|endoftext|>").input_ids
    assert len(tokens) > 2048
    printed = train(tmp_path / "music")
    assert "  warning  song.wav: it has no tags and trains with an empty caption" in printed
    lost = len(tokens) - 2048
    assert f"  warning  song.wav: its lyrics are cut: {lost} tokens beyond the model's 2048 are lost" in printed


def test_a_damaged_dataset(music, tmp_path, refused):
    rows = [{"audio": {"bytes": (music / "good.wav").read_bytes(), "path": None}, "tags": "noise"}]
    Dataset.from_list(rows).cast_column("audio", Audio(decode=False)).save_to_disk(tmp_path / "dataset")
    (arrow,) = (tmp_path / "dataset").glob("*.arrow")
    os.truncate(arrow, arrow.stat().st_size // 2)
    assert f"{tmp_path / 'dataset'} is a damaged dataset" in refused(tmp_path / "dataset")


def test_a_dataset_that_cannot_be_loaded(tmp_path, refused):
    assert "--dataset_name nobody/nothing can't be loaded" in refused(None, dataset_name="nobody/nothing")


# --- Sources


def test_no_data_anywhere_names_every_place(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "DATA_FOLDERS", (str(tmp_path / "data"), "./data"))
    error = refused(None)
    for place in ("--train_data_dir", "ACESTEP_DATA", "/data", "./data"):
        assert place in error


def test_the_environment_names_model_and_data(music, tiny_dir, train, monkeypatch):
    monkeypatch.setenv("ACESTEP_DATA", str(music))
    monkeypatch.setenv("ACESTEP_MODEL", str(tiny_dir))
    printed = train(None, pretrained_model_name_or_path=None)
    assert f"Model:     {tiny_dir}  (ACESTEP_MODEL)" in printed
    assert f"Data:      {music}  (ACESTEP_DATA)" in printed


def test_two_sources_of_data(music, refused):
    assert "--dataset_name and --train_data_dir" in refused(music, dataset_name="someone/something")


# --- Model and adapter


@pytest.mark.parametrize("component", ["vae", "condition_encoder"])
def test_a_checkpoint_that_misses_a_component(music, tmp_path, tiny_dir, refused, component):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_dir.iterdir():
        if path.name != component:
            (broken / path.name).symlink_to(path)
    error = refused(music, pretrained_model_name_or_path=broken)
    assert f"the checkpoint {broken} misses {component}" in error


def test_a_checkpoint_that_is_not_there(music, tmp_path, refused):
    error = refused(music, pretrained_model_name_or_path=tmp_path / "nothing")
    assert str(tmp_path / "nothing") in error


def test_a_lora_target_that_matches_nothing(music, refused):
    error = refused(music, lora_layers="to_q,to_x")
    assert "the LoRA target 'to_x' (--lora_layers, or" in error
    for existing in ("to_q", "to_k", "to_v", "to_out.0", "q_proj"):
        assert existing in error


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "can't be read: No such file"),
        ("{", "is not JSON"),
        ("[64]", "must hold a JSON object"),
        ('{"rank": 64}', "unknown field 'rank'"),
        ('{"r": "64"}', "r has the wrong type"),
        ('{"use_dora": 1}', "use_dora has the wrong type"),
        ('{"r": 0}', "--rank must be positive"),
        ('{"lora_alpha": Infinity}', "--lora_alpha must be a finite number"),
    ],
)
def test_a_bad_lora_config(music, tmp_path, refused, content, reason):
    config = tmp_path / "lora.json"
    if content is not None:
        config.write_text(content)
    assert reason in refused(music, lora_config=config, rank=None, lora_alpha=None)


# --- Values

WRONG_VALUES = {
    "effective_batch_size": [0, -4],
    "train_batch_size": [0],
    "gradient_accumulation_steps": [-1],
    "learning_rate": [-1e-4, 0, "nan", "inf"],
    "rank": [0],
    "lora_alpha": [0],
    "lora_dropout": [1.0, -0.1],
    "max_duration_s": [1, 601, "nan"],
    "min_duration_s": [-1, "nan"],
    "cfg_dropout": [2, -0.1],
    "timestep_sigma": [0],
    "timestep_mu": ["inf"],
    "timestep_steps": [0],
    "timestep_shift": [0],
    "snr_gamma": [0],
    "max_train_steps": [0],
    "max_train_samples": [0],
    "checkpointing_steps": [0],
    "checkpoints_total_limit": [0],
    "max_grad_norm": [0],
    "adam_beta1": [1],
    "adam_beta2": [-0.1],
    "adam_epsilon": [0],
    "adam_weight_decay": [-1],
    "lr_power": [-1],
    "lr_warmup_steps": [-1],
    "seed": [-1, 2**63],
    "num_validation_samples": [-1],
    "validation_duration_s": [0, 601],
    "tag_shuffle": [0],
    "caption_dropout": [1.5, -0.1, "nan"],
    "dataloader_num_workers": [-1],
    "lokr_factor": [0, -2],
    "num_train_epochs": [0],
    "lr_num_cycles": [0],
    "ema_decay": [0, 1, -0.5, "nan"],
    "gradient_checkpointing_ratio": [0, 1.5],
    "validation_fraction": [1, -0.1],
    "validation_seed": [-1, 2**63],
    "max_validation_samples": [0],
    "num_validation_draws": [0],
    "validation_steps": [0],
    "validation_epochs": [0],
    "early_stopping_patience": [0],
    "preview_steps": [0, -1],
    "upload_timeout_s": [0, "nan"],
    "checkpointing_epochs": [0],
    "validation_inference_steps": [0],
    "style_distance": [0, 7],
    "lr_scheduler": ["sawtooth"],
    "report_to": ["mlflow", "wandb"],
}
# What a flag needs beside it, or another complaint comes first.
GOES_WITH = {"lokr_factor": {"adapter_type": "lokr"}}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG_VALUES.items() for value in values],
)
def test_a_wrong_value_is_named_with_its_flag(tmp_path, refused, name, value):
    error = refused(tmp_path, **{name: value} | GOES_WITH.get(name, {}))
    assert f"--{name} " in error
    assert str(value) in error or f"{value:g}" in error or str(float(value)) in error


def test_a_wrong_value_of_every_numeric_flag_is_tried():
    numeric = {action.dest for action in script_arguments.build_parser()._actions if action.type in (int, float)}
    assert numeric and not numeric - WRONG_VALUES.keys()


def test_a_flag_with_choices_refuses_any_other(tmp_path, capsys):
    with_choices = [action for action in script_arguments.build_parser()._actions if action.choices]
    assert {"on_nan", "preset"} <= {action.dest for action in with_choices}
    for action in with_choices:
        with pytest.raises(SystemExit) as stopped:
            script_arguments.parse_args(flags(tmp_path, tmp_path, **{action.dest: "nonsense"}))
        told = capsys.readouterr().err
        assert stopped.value.code == 2
        assert f"argument --{action.dest}: invalid choice: 'nonsense'" in told and str(list(action.choices)[0]) in told


@pytest.mark.parametrize(
    "mix", ["discrete", "discrete=0", "discrete=nan", "turbo=1", "discrete=1,discrete=2", "discrete=1,", ""]
)
def test_an_impossible_mix_of_timesteps(tmp_path, refused, mix):
    error = refused(tmp_path, timestep_distribution="mix", timestep_mix=mix)
    assert f"--timestep_mix {mix!r}: " in error and "logit_normal_max=0.5,discrete=0.5" in error


def test_a_weighting_without_a_mean(tmp_path, refused):
    mix = {"timestep_distribution": "mix", "timestep_mix": "uniform=1,discrete=1"}
    for distribution in ({"timestep_distribution": "uniform"}, mix):
        assert "--weighting_scheme sigma_sqrt" in refused(tmp_path, weighting_scheme="sigma_sqrt", **distribution)


def test_a_tracker_that_is_not_installed_names_the_extra(tmp_path, refused):
    assert refused(tmp_path, report_to="wandb").endswith("pip install 'ace-step-lora[wandb]'.")


def test_the_edges_of_the_allowed_values_pass(tmp_path):
    edges = {"max_duration_s": 600, "cfg_dropout": 1, "lora_dropout": 0, "adam_beta1": 0, "adam_weight_decay": 0,
             "validation_duration_s": 600, "seed": 0, "lr_warmup_steps": 0, "report_to": "tensorboard"}  # fmt: skip
    check_args(script_arguments.parse_args(flags(tmp_path, tmp_path, **edges)))


def test_fp16_on_a_cpu(music, refused):
    error = refused(music, mixed_precision="fp16")
    assert "--mixed_precision fp16 needs a CUDA device" in error


@pytest.mark.parametrize(
    ("environment", "flags", "said"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "asks for Megatron-LM, .*; use FSDP2"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "has a parallelism_config, .*; leave it out"),
        (FSDP2 | {"FSDP_VERSION": "1"}, {}, "asks for FSDP 1, .*; set fsdp_version: 2"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "set fsdp_offload_params: false"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "leave it to --gradient_checkpointing"),
        (FSDP2, {"mixed_precision": "fp16"}, "--mixed_precision fp16 does not go with FSDP and DeepSpeed; use bf16"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "asks for ZeRO stage 3, .*; set zero_stage: 2"),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            {},
            "names a deepspeed_config_file, .*; set zero_stage",
        ),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "set offload_optimizer_device: none"),
        (ZERO, {"optimizer": "adamw_8bit"}, "--optimizer adamw_8bit does not go with DeepSpeed, .*; use adamw"),
    ],
)
def test_a_launcher_that_asks_for_what_is_not_there(tmp_path, monkeypatch, refused, environment, flags, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert re.search(said, refused(tmp_path, **flags))


def test_deepspeed_that_is_not_installed_names_the_extra(tmp_path, monkeypatch, refused):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name))
    assert "pip install 'ace-step-lora[deepspeed]'" in refused(tmp_path)


def test_flags_that_argparse_refuses(tmp_path, capsys):
    for wrong, reason in (
        ({"preset": "loud"}, "argument --preset: invalid choice: 'loud'"),
        ({"rank": "many"}, "argument --rank: invalid int value: 'many'"),
        ({"learning_rates": 1}, "unrecognized arguments: --learning_rates 1; did you mean --learning_rate?"),
    ):
        with pytest.raises(SystemExit) as stopped:
            script_arguments.parse_args(flags(tmp_path, tmp_path, **wrong))
        assert stopped.value.code == 2
        assert reason in capsys.readouterr().err


# --- Output


HOLD = """
import sys; from pathlib import Path
from acestep_pipeline.training.directory_lock import hold_directory
held = hold_directory(Path(sys.argv[1])); print("held", flush=True); sys.stdin.read()
"""


def test_one_run_at_a_time_in_an_output_directory(music, tmp_path, train, refused, monkeypatch):
    monkeypatch.setattr(directory_lock, "PATIENCE_S", 0.2)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        for flag in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
            assert f"--output_dir {tmp_path / 'out'} is in use by another run" in refused(music, **flag)
        other.kill()
    train(music)
    train(music, overwrite_output_dir=True)


@pytest.mark.parametrize("name", ["../mine", "a/b", "..", ""])
def test_a_name_of_a_run_that_is_a_path(music, refused, name):
    assert f"--exp_name {name!r} is no name; say where the run goes with --output_dir" in refused(music, exp_name=name)


def test_an_output_directory_with_a_run_needs_a_flag_and_keeps_what_is_not_the_run_s(music, tmp_path, train, refused):
    output = tmp_path / "out"
    train(music, max_train_steps=2, checkpointing_steps=1)
    assert (output / "checkpoint-2").is_dir()
    foreign = (output / "notes.txt", output / "samples" / "mine.wav", output / "checkpoint-of-mine" / "x")
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (output / "samples" / "sample-0_with_adapter.wav").touch()

    error = refused(music)
    assert f"--output_dir {output} already holds a run" in error
    assert "--overwrite_output_dir" in error and "--resume_from_checkpoint latest" in error

    # A run that fails leaves the old one as it was.
    assert "matches no linear layer" in refused(music, overwrite_output_dir=True, lora_layers="nothing")

    train(music, overwrite_output_dir=True)
    assert all(path.read_text() == "mine" for path in foreign)
    assert not (output / "checkpoint-2").exists()
    assert not (output / "samples" / "sample-0_with_adapter.wav").exists()
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 1


def test_somebody_s_readme_is_not_replaced_unasked(music, tmp_path, refused):
    output = tmp_path / "out"
    output.mkdir()
    (output / "README.md").write_text("mine")
    assert "has a README.md that is not a run's" in refused(music)


def test_a_cache_that_cannot_be_written(music, tmp_path, refused):
    (tmp_path / "file").touch()
    assert "--latent_cache_dir" in refused(music, latent_cache_dir=tmp_path / "file" / "cache")


# --- Resuming


def test_resuming_under_other_settings_names_each_with_both_values(music, tmp_path, train, refused):
    train(music, lr_scheduler="cosine")
    error = refused(
        music, resume_from_checkpoint="latest", learning_rate=1e-5, rank=8, seed=7, lr_scheduler="cosine",
        max_train_steps=3,
    )  # fmt: skip
    assert f"{tmp_path / 'out' / 'checkpoint-1'} was made by other settings" in error
    for difference in (
        "learning_rate was 0.001 and is 1e-05",
        "rank was 4 and is 8",
        "seed was 42 and is 7",
        "num_updates was 1 and is 3",
    ):
        assert difference in error
    assert "dropout was" not in error


def test_a_run_at_a_constant_rate_is_made_longer_with_the_warm_up_it_began_with(music, tmp_path, train):
    long = {"lr_scheduler": "constant_with_warmup", "checkpointing_steps": 20}
    train(music, max_train_steps=20, **long)
    printed = train(music, max_train_steps=40, resume_from_checkpoint="latest", **long)
    assert "20 of 40 updates are done" in printed
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["arguments"]["lr_warmup_steps"] == 1


def test_resuming_on_other_data_is_refused(music, train, refused):
    train(music)
    (music / "good.tags.txt").write_text("something else")
    error = refused(music, resume_from_checkpoint="latest")
    assert "dataset_sha256 was" in error


def test_the_same_targets_from_flag_and_file_are_the_same_settings(music, tmp_path, train):
    train(music, lora_layers="to_q,to_k")
    config = tmp_path / "lora.json"
    config.write_text('{"target_modules": ["to_q", "to_k"]}')
    printed = train(music, lora_config=config, resume_from_checkpoint="latest", max_train_steps=2)
    assert "1 of 2 updates are done" in printed


def test_resuming_from_a_checkpoint_that_is_not_there(music, tmp_path, refused):
    missing = tmp_path / "out" / "checkpoint-5"
    assert f"--resume_from_checkpoint {missing} is no checkpoint" in refused(music, resume_from_checkpoint=missing)


def test_latest_in_an_empty_directory_starts_from_the_beginning(music, tmp_path, train):
    (tmp_path / "out").mkdir()
    printed = train(music, resume_from_checkpoint="latest")
    assert f"There is no checkpoint in {tmp_path / 'out'} yet: starting from the beginning." in printed
    assert (tmp_path / "out" / "checkpoint-1").is_dir()


# --- As users start it


def start(command, data, output, cache, **changes):
    return subprocess.run(
        [*command, str(SCRIPT), *flags(data, output, **changes)],
        capture_output=True,
        text=True,
        cwd=cache.parent,
        env={**os.environ, "ACESTEP_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
        timeout=120,
    )


def test_an_unwritable_output_directory_is_found_before_anything_is_read(music, tmp_path):
    """Below a regular file, which no user can write to. A fresh cache directory shows that no model was made."""
    (tmp_path / "file").touch()
    run = start([sys.executable], music, tmp_path / "file" / "out", tmp_path / "cache", max_train_samples=1)
    output = tmp_path / "file" / "out"
    assert run.stderr == (
        f"error: --output_dir {output} can't be written ({tmp_path / 'file'} is not a directory); choose another.\n"
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert not (tmp_path / "cache").exists()


def test_accelerate_launch_fails_with_the_same_sentence(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--num_cpu_threads_per_process", "1"]  # fmt: skip
    run = start(launch, tmp_path, tmp_path / "out", tmp_path / "cache", rank=0)
    assert run.stderr == "error: --rank must be positive, not 0.\n"
    assert run.returncode == 1  # the launcher's own status for any failure of the script
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_processes_that_look_at_one_output_directory_do_not_disturb_each_other(tmp_path):
    code = (
        "import sys; from pathlib import Path; from acestep_pipeline.training.run_directory import *\n"
        "for _ in range(60): check_run_directory(Path(sys.argv[1]), resuming=False, overwrite=False)"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "a" / "b")],
            env={**os.environ, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
        )
        for rank in range(3)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0, 0]
    assert not (tmp_path / "a").exists()


def test_debug_shows_the_traceback(tmp_path):
    run = start([sys.executable], tmp_path, tmp_path / "out", tmp_path / "cache", rank=0, debug=True)
    assert "Traceback" in run.stderr and "UsageError: --rank must be positive, not 0." in run.stderr
    assert run.returncode == 1


def test_a_flag_that_would_do_nothing_is_not_ignored(tmp_path, refused):
    error = refused(tmp_path, snr_gamma=3.0)
    assert "--snr_gamma does nothing without --weighting_scheme min_snr; add it, or leave" in error
    error = refused(tmp_path, timestep_mix="uniform=1,discrete=1")
    assert "--timestep_mix does nothing without --timestep_distribution mix" in error
