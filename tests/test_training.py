"""The flagship script, run for real on the tiny checkpoint and rendered clips."""

import json
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace

import psutil
import pytest
import torch
from diffusers import AceStepPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from acestep_pipeline.data import batching, held_out
from acestep_pipeline.data.encoders import fingerprint
from acestep_pipeline.data.tracks import find_audio_files
from acestep_pipeline.training import base_model, setup
from tests.training_runs import ROOT, metrics, start, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
NAME = "ace-step-lora"


@pytest.fixture(scope="module")
def short_run(demo_dir, tmp_path_factory):
    """A run of six updates with samples, its output directory, and the transformer it trained."""
    output = tmp_path_factory.mktemp("short-run") / "adapter"
    watched = []
    original = base_model.add_lora

    def watch(transformer, *args, **kwargs):
        watched.append((transformer, fingerprint(transformer)))
        parameters = original(transformer, *args, **kwargs)
        watched.append({name: p.detach().clone() for name, p in transformer.named_parameters() if p.requires_grad})
        return parameters

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "add_lora", watch)
        train_here(
            demo_dir,
            output,
            max_train_steps=6,
            gradient_accumulation_steps=2,
            num_validation_samples=2,
            validation_duration_s=2,
            validation_inference_steps=2,
            report_to="tensorboard",
        )
    (transformer, base_hash), initial = watched
    return output, transformer, base_hash, initial


def test_every_lora_parameter_changes_and_no_base_weight_does(short_run):
    _, transformer, base_hash, initial = short_run
    trained = dict(transformer.named_parameters())
    assert len(initial) == 2 * 4 * 2 * 4, "A and B of q, k, v, out in both attentions of four blocks"
    unchanged = [name for name, before in initial.items() if torch.equal(before, trained[name])]
    assert not unchanged
    transformer.unload_lora()
    assert fingerprint(transformer) == base_hash


def test_adapter_directory_is_as_promised(short_run):
    output = short_run[0]
    lines = metrics(output)
    assert [line["update"] for line in lines] == list(range(1, 7))
    assert all(set(line) == {"update", "epoch", "loss", "grad_norm", "lr"} for line in lines)
    arguments = json.loads((output / "training_args.json").read_text())
    assert arguments["arguments"]["rank"] == 4 and arguments["arguments"]["cfg_dropout"] == 0.15
    assert {"versions", "model_sha256", "dataset_sha256", "git_commit"} <= arguments.keys()
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "diffusers" and "lora" in card.data.tags
    for name in ("sample-0_with_adapter.wav", "sample-1_without_adapter.wav"):
        assert f"samples/{name}" in card.text and (output / "samples" / name).stat().st_size > 2 * 48000 * 2
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "checkpoint-6" / "trainer_state.json").is_file()
    assert list((output / "logs").rglob("events.out.tfevents.*"))
    assert not list(output.glob(".partial*"))


def test_tensorboard_holds_the_same_losses(short_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = short_run[0]
    (events,) = {path.parent for path in (output / "logs").rglob("events.out.tfevents.*") if path.parent.name == NAME}
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    logged = [scalar.value for scalar in accumulator.Scalars("loss")]
    assert logged == pytest.approx([line["loss"] for line in metrics(output)], rel=1e-6)


def test_the_adapter_loads_in_plain_diffusers_with_its_alpha_and_is_heard(short_run, tiny_dir):
    pipeline = AceStepPipeline.from_pretrained(tiny_dir)
    pipeline.set_progress_bar_config(disable=True)

    def latents():
        generator = torch.Generator().manual_seed(0)
        settings = {"audio_duration": 2.0, "num_inference_steps": 2, "output_type": "latent", "generator": generator}
        return pipeline("techno", lyrics="[Instrumental]", **settings).audios

    base = latents()
    pipeline.load_lora_weights(short_run[0])
    scalings = {module.scaling["default_0"] for module in pipeline.transformer.modules() if hasattr(module, "scaling")
                and isinstance(module.scaling, dict)}  # fmt: skip
    assert scalings == {8 / 4}
    assert not torch.equal(base, latents())
    pipeline.disable_lora()
    assert torch.equal(base, latents())


def test_the_loss_falls_when_overfitting_one_clip(demo_dir, tmp_path):
    output = tmp_path / "overfit"
    train_here(demo_dir, output, max_train_samples=1, max_train_steps=150, learning_rate=5e-3, rank=16, lora_alpha=32)
    losses = [line["loss"] for line in metrics(output)]
    # Knowing nothing costs 1 + var(x0), about 2; the first updates are before any learning.
    assert sum(losses[-30:]) / 30 < 0.75 * sum(losses[:4]) / 4


def test_the_same_update_however_it_is_divided(demo_dir, tmp_path):
    """One forward pass of four items, or four of one: the same adapter, without dropout."""
    results = []
    for division in ({"effective_batch_size": 4}, {"gradient_accumulation_steps": 4}):
        output = tmp_path / str(len(results))
        train_here(demo_dir, output, lora_dropout=0, max_train_steps=3, **division)
        results.append((metrics(output), load_file(output / WEIGHTS)))
    (metrics_a, adapter_a), (metrics_b, adapter_b) = results
    for a, b in zip(metrics_a, metrics_b, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )
    for name, tensor in adapter_a.items():
        assert torch.allclose(tensor, adapter_b[name], atol=2e-5), name


def test_a_killed_run_resumes_to_the_bit(demo_dir, tmp_path):
    """kill -9 between two checkpoints; then `latest` gives the adapter and metrics of a run left alone.

    Each track has two windows, and four tracks an epoch make two and a half epochs of ten updates.
    """
    settings = {"max_train_steps": 60, "checkpointing_steps": 10, "lora_dropout": 0.1, "lr_scheduler": "cosine"}
    settings |= {"max_duration_s": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(demo_dir, killed, **settings)
    deadline = time.monotonic() + 120
    while len((killed / "metrics.jsonl").read_text().splitlines() if (killed / "metrics.jsonl").exists() else []) < 13:
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not (killed / WEIGHTS).exists()
    assert list(killed.glob("checkpoint-*")), "it was killed after a checkpoint"
    done = len(metrics(killed))
    assert 13 <= done < 60, "it was killed before the end"

    resumed = start(demo_dir, killed, resume_from_checkpoint="latest", **settings)
    log, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, log
    assert "Resuming from" in log
    uninterrupted = start(demo_dir, whole, **settings)
    log, _ = uninterrupted.communicate(timeout=120)
    assert uninterrupted.returncode == 0, log
    assert (killed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert metrics(killed) == metrics(whole)


@pytest.mark.slow
def test_a_weighted_run_over_windows_resumes_to_the_bit(demo_dir, tmp_path, monkeypatch, capsys):
    """From the middle of an epoch, and of the rounds of windows: what was heard before is replayed."""
    weights, heard = (5.0, 1.0, 1.0, 1.0), []

    def weighted(*args, **kwargs):
        tracks, problems = load_tracks(*args, **kwargs)
        return [replace(track, sampling_weight=w) for track, w in zip(tracks, weights, strict=True)], problems

    load_tracks, load_latents = held_out.load_tracks, batching.load_latents
    monkeypatch.setattr(held_out, "load_tracks", weighted)
    monkeypatch.setattr(batching, "load_latents", lambda track, window: heard.append((track.id, window.start_frame))
                        or load_latents(track, window))  # fmt: skip
    settings = {"max_train_steps": 14, "checkpointing_steps": 7, "lora_dropout": 0.1, "max_duration_s": 2}
    output = tmp_path / "weighted"
    train_here(demo_dir, output, **settings)
    assert "4 tracks, 8 windows of up to 2 s, each track heard 0.5 to 2.5 times an epoch" in capsys.readouterr().out
    whole, adapter, lines = heard.copy(), (output / WEIGHTS).read_bytes(), metrics(output)
    epochs = [Counter(name for name, _ in whole[start : start + 4]) for start in (0, 4, 8)]
    assert len(whole) == 14 and all(max(visits.values()) in (2, 3) for visits in epochs), "2.5 of the 4 visits each"
    heard.clear()
    train_here(demo_dir, output, resume_from_checkpoint=output / "checkpoint-7", **settings)
    assert heard == whole[7:]
    assert ((output / WEIGHTS).read_bytes(), metrics(output)) == (adapter, lines)


def test_a_track_is_heard_as_often_as_its_repeats_say(demo_dir, tmp_path, monkeypatch, capsys):
    """Three and one and one: five visits an epoch, in two updates of three; the last holds two."""
    music, names = tmp_path / "music", [file.name for file in find_audio_files(demo_dir)][:3]
    music.mkdir()
    for name in names:
        shutil.copy(demo_dir / name, music)
    (music / "metadata.csv").write_text(f"file_name,tags,repeats\n{names[0]},a,3\n{names[1]},b,\n{names[2]},c,0\n")
    heard, load_latents = [], batching.load_latents
    monkeypatch.setattr(batching, "load_latents", lambda track, window: heard.append(track.id)
                        or load_latents(track, window))  # fmt: skip
    output = tmp_path / "out"
    train_here(music, output, max_train_steps=4, gradient_accumulation_steps=3)
    said = capsys.readouterr().out
    assert "3 tracks, 3 windows of up to 4 s, each track heard 1 to 3 times an epoch: 4 updates, " in said
    assert f"warning  {names[2]}: its repeats '0' is not a whole number from 1 to 1000; it counts as 1" in said
    assert [Counter(heard[start : start + 5]) for start in (0, 5)] == [{names[0]: 3, names[1]: 1, names[2]: 1}] * 2
    assert [line["epoch"] for line in metrics(output)] == [0, 0, 1, 1]


def test_a_song_with_timed_lyrics_is_told_what_is_sung_in_each_window(demo_dir, tmp_path, monkeypatch, capsys):
    song = next(iter(sorted(demo_dir.glob("*.tags.txt")))).name.removesuffix(".tags.txt")
    music = tmp_path / "music"
    music.mkdir()
    for file in demo_dir.glob(f"{song}.*"):
        shutil.copy(file, music)
    (music / f"{song}.lyrics.txt").write_text("[00:00.00][Verse]\n[00:00.10]eins\n[00:02.10][Chorus]\n[00:02.20]zwei")
    told, load_condition = [], batching.load_condition
    monkeypatch.setattr(
        batching, "load_condition", lambda window: told.append(window.fields) or load_condition(window)
    )
    train_here(music, tmp_path / "out", max_train_steps=6, max_duration_s=2)
    assert "1 tracks, 2 windows of up to 2 s: 6 updates, 1 an epoch." in capsys.readouterr().out
    for visits in (told[:2], told[2:4], told[4:]):
        assert {fields.lyrics for fields in visits} == {"[Verse]\neins", "[Chorus]\nzwei"}
    assert {fields.audio_duration for fields in told} == {2.0}


def test_checkpoints_are_pruned_and_hold_an_adapter(demo_dir, tmp_path):
    output = tmp_path / "pruned"
    train_here(demo_dir, output, max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert load_file(output / "checkpoint-5" / WEIGHTS).keys() == load_file(output / WEIGHTS).keys()


def test_two_processes_see_different_noise_and_end_with_equal_adapters(demo_dir, tmp_path, monkeypatch, capsys):
    """They share the work on caches that are empty, the tiny checkpoint's included, and only the first one writes."""
    output = tmp_path / "two"
    settings = {"max_train_steps": 3, "lora_dropout": 0, "max_duration_s": 2, "effective_batch_size": 2}
    settings["checkpointing_steps"] = 2
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path / "cache"))
    process = start(demo_dir, output, script=ROOT / "tests" / "two_process_probe.py", config="ddp.yaml", **settings)
    log, _ = process.communicate(timeout=180)
    assert process.returncode == 0, log
    noises = [load_file(tmp_path / f"noise-{rank}.safetensors") for rank in (0, 1)]
    assert len(noises[0]) == len(noises[1]) == 3
    for index in noises[0]:
        assert not torch.equal(noises[0][index], noises[1][index])
    first, second = (load_file(tmp_path / f"adapter-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)

    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(own["encoded"]) for own in seen] == [2, 2]
    assert len({*seen[0]["encoded"], *seen[1]["encoded"]}) == 4, "each file is encoded by one of them"
    assert str(output / "checkpoint-3") in seen[0]["written"] and not seen[1]["written"]

    # And two processes are what one process does with twice the accumulation.
    alone = tmp_path / "one"
    train_here(demo_dir, alone, train_batch_size=1, **settings)
    # So one process can go on where two stopped.
    resumed = tmp_path / "resumed"
    capsys.readouterr()
    train_here(demo_dir, resumed, resume_from_checkpoint=output / "checkpoint-2", **settings)
    assert "warning: the checkpoint is of 2 processes with up to 1 windows" in capsys.readouterr().out
    for a, b in zip(metrics(output), metrics(alone), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert metrics(resumed)[-1]["loss"] == pytest.approx(metrics(output)[-1]["loss"], rel=1e-5)
    two = load_file(output / WEIGHTS)
    for other in (alone, resumed):
        for name, tensor in load_file(other / WEIGHTS).items():
            assert torch.allclose(tensor, two[name], atol=2e-5), name


@pytest.mark.slow
def test_bf16_trains_and_is_heard(demo_dir, tmp_path, monkeypatch):
    """The path that GPUs take: frozen weights in bf16, float32 adapters, autocast; forced here, where it is slow."""
    monkeypatch.setattr(setup, "bf16_is_fast", lambda device: True)
    watched = []
    original = base_model.add_lora
    monkeypatch.setattr(
        base_model, "add_lora", lambda model, *a, **k: watched.append(model) or original(model, *a, **k)
    )
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        train_here(demo_dir, tmp_path / name, max_train_steps=2, max_train_samples=2, lora_dropout=0,
                   mixed_precision="bf16", gradient_checkpointing=checkpointing,
                   num_validation_samples=0 if checkpointing else 1, validation_duration_s=2,
                   validation_inference_steps=1)  # fmt: skip
    dtypes = {p.requires_grad: p.dtype for p in watched[0].parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "plain" / WEIGHTS).values())
    assert (tmp_path / "plain" / "samples" / "sample-0_with_adapter.wav").is_file()
    arguments = json.loads((tmp_path / "plain" / "training_args.json").read_text())["arguments"]
    assert arguments["mixed_precision"] == "bf16"
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "checkpointed"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2), "gradient checkpointing changes nothing but memory"
    # And bf16 costs precision, not correctness.
    train_here(
        demo_dir, tmp_path / "fp32", max_train_steps=2, max_train_samples=2, lora_dropout=0, mixed_precision="no"
    )
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "fp32"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
