#!/usr/bin/env python
"""Filling the latent cache (VAE and text) with one-minute tracks: this package beside a naive loop, in one run.

    python benchmarks/latent_cache.py                       the embedded checkpoint's small VAE, three tracks
    python benchmarks/latent_cache.py --model 2b --tracks 100       the real sizes, random weights: on a GPU

The naive loop decodes a whole file, encodes it in one piece, encodes its text, writes both, and goes on to the next
file. Ours decodes the next tracks in threads meanwhile, and encodes in tiles. Both encode every prompt alone, since
the cache has to hold the same bits whatever was encoded together; `text_share` is what that costs of our time. The two
take turns on the same tracks, and their latents are compared. Hashing the models, which is done once, is stated apart.
On a GPU the VAE is also timed in bfloat16, with how far its latents are then from float32's, relative to them;
training does not use that.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.conditioning import encode_condition
from acestep_pipeline.data.audio import read_audio
from acestep_pipeline.data.latent_cache import (
    LatentCache,
    encode_latents,
    load_latents,
    prepare_tracks,
    prompt_fields,
    write_cache_file,
)
from acestep_pipeline.data.tracks import Track, load_tracks
from acestep_pipeline.estimation.model_shapes import SHAPES
from acestep_pipeline.hardware import default_device, describe_device
from acestep_pipeline.progress import quiet_loading
from acestep_pipeline.tiny_checkpoint import tiny_checkpoint_path

RESULTS = Path(__file__).parent / "results"
TARGETS = {"cpu": {"figure": "ratio", "least": 1.5}, "cuda": {"figure": "real_time_factor", "least": 200.0}}
LYRICS = "[verse]\n" + "\n".join(f"line {line} of a song about the rain and the road" for line in range(12))


def write_music(folder: Path, *, tracks: int, seconds: float) -> list[Track]:
    """Ogg files of noise that swells and fades, at 44.1 kHz (so that decoding resamples), with tags and lyrics."""
    folder.mkdir()
    for number in range(tracks):
        generator = np.random.default_rng(number)
        times = np.arange(round(44_100 * seconds)) / 44_100
        sound = generator.normal(0, 0.1, (len(times), 2)) * (0.6 + 0.4 * np.sin(times + number))[:, None]
        soundfile.write(folder / f"track{number:04}.ogg", sound.astype(np.float32), 44_100)
        (folder / f"track{number:04}.tags.txt").write_text(f"noise music, piece number {number}, slow, wide, dark")
        (folder / f"track{number:04}.lyrics.txt").write_text(LYRICS)
    found, _ = load_tracks(folder, show_progress=False)
    return found


def random_module(shape: str, component: str, *, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A component at full size with random weights."""
    module = SHAPES[shape].build(component)
    for part in module.modules():  # what a weight norm left behind on the meta device
        if hasattr(part, "weight_g"):
            del part.weight
    with quiet_loading():
        module = module.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.detach().normal_(std=0.02)
        if name.endswith("weight_g"):  # the length of a filter, or deep stacks die out
            parameter.detach().fill_(1.0)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.normal_(std=0.02)
    if component == "text_encoder":  # its rotary frequencies are no weights
        rotary = module.rotary_emb
        rotary.inv_freq, rotary.attention_scaling = rotary.compute_default_rope_parameters(module.config, device)
    return module.eval()


def build_pipeline(model: str, device: torch.device) -> ACEStepPipeline:
    """The embedded checkpoint, with real-size encoders in the place of its own where `model` names them."""
    with quiet_loading():
        pipeline = ACEStepPipeline.from_pretrained(tiny_checkpoint_path())
    if model != "tiny":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        text = {name: random_module(model, name, device=device, dtype=dtype)
                for name in ("text_encoder", "condition_encoder")}  # fmt: skip
        vae = random_module(model, "vae", device=device, dtype=torch.float32)
        pipeline = ACEStepPipeline(**(pipeline.components | text | {"vae": vae}))
        pipeline.transformer.to(dtype)
    pipeline.move_encoders(device)
    return pipeline


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def naive(pipeline: ACEStepPipeline, tracks: list[Track], folder: Path) -> list[dict[str, torch.Tensor]]:
    """One file after another, each whole."""
    latents = []
    folder.mkdir()
    for track in tracks:
        waveform = torch.from_numpy(read_audio(track.source))
        waveform = waveform[None, :, : waveform.shape[1] // pipeline.vae.hop_length * pipeline.vae.hop_length]
        with torch.no_grad():
            posterior = pipeline.vae.encode(waveform.to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist
        tensors = {"mean": posterior.mean[0].T.float().cpu(), "std": posterior.std[0].T.float().cpu()}
        write_cache_file(folder / f"{track.sha256}.safetensors", tensors, {})
        fields = prompt_fields(track, track.tags, track.lyrics, tensors["mean"].shape[0] / 25)
        condition = encode_condition(pipeline, fields).encoder_hidden_states
        write_cache_file(folder / f"{track.sha256}.text.safetensors", {"encoder_hidden_states": condition}, {})
        latents.append(tensors)
    return latents


def measure(*, model: str, tracks: int, seconds: float, rounds: int) -> dict:
    """Every figure, and what it was measured on."""
    device = default_device()
    pipeline = build_pipeline(model, device)
    taken: dict[str, list[float]] = {"naive": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        music = write_music(root / "music", tracks=tracks, seconds=seconds)
        started = time.perf_counter()
        LatentCache(root / "hashed", pipeline)
        hashing_s = time.perf_counter() - started
        encode_latents(pipeline.vae, music[0].source)  # warm-up
        encode_condition(pipeline, prompt_fields(music[0], music[0].tags, LYRICS, seconds))
        for number in range(rounds):
            cache = LatentCache(root / f"ours-{number}", pipeline)
            for way in ("naive", "ours")[:: -1 if number % 2 else 1]:
                synchronize(device)
                started = time.perf_counter()
                if way == "naive":
                    pipeline.vae.use_tiling = False
                    latents = naive(pipeline, music, root / f"naive-{number}")
                    pipeline.vae.use_tiling = True
                else:
                    cached, problems = prepare_tracks(cache, music, max_duration_s=240.0, show_progress=False)
                taken[way].append(time.perf_counter() - started)
                print(f"{way:6} {taken[way][-1]:8.2f} s for {tracks * seconds:g} s of audio", flush=True)
            if problems or len(cached) != tracks:
                raise SystemExit(f"error: not all tracks were cached: {problems}")
        difference = max(
            float((load_latents(entry)["mean"] - whole["mean"]).abs().max())
            for entry, whole in zip(cached, latents, strict=True)
        )
        parts = time_parts(pipeline, music[:3], seconds)
        bfloat16 = time_bfloat16(pipeline, music) if device.type == "cuda" else None
    ours = statistics.median(taken["ours"])
    return {
        "device": describe_device(device), "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(),
                                                       "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "soxr")},
        "model": model, "tracks": tracks, "seconds": seconds, "rounds": rounds, "seconds_taken": taken,
        "ratio": statistics.median(n / o for n, o in zip(taken["naive"], taken["ours"], strict=True)),
        "real_time_factor": tracks * seconds / ours, "naive_real_time_factor":
        tracks * seconds / statistics.median(taken["naive"]), "hashing_models_s": hashing_s,
        "largest_difference_of_latents": difference, "parts_s_a_track": parts,
        "text_share": parts["text"] * tracks / ours, "vae_in_bfloat16": bfloat16,
        "target": TARGETS.get(device.type),
    }  # fmt: skip


def time_parts(pipeline: ACEStepPipeline, music: list[Track], seconds: float) -> dict[str, float]:
    """Median seconds a track of decoding, of the VAE in tiles, and of the text, one after another."""
    parts: dict[str, list[float]] = {"decode": [], "vae": [], "text": []}
    for track in music:
        waveform = None
        works = (
            ("decode", lambda: read_audio(track.source)),  # noqa: B023
            ("vae", lambda: encode_latents(pipeline.vae, track.source, waveform)),  # noqa: B023
            ("text", lambda: encode_condition(pipeline, prompt_fields(track, track.tags, LYRICS, seconds))),  # noqa: B023
        )
        for name, work in works:
            synchronize(pipeline.vae.device)
            started = time.perf_counter()
            result = work()
            synchronize(pipeline.vae.device)
            parts[name].append(time.perf_counter() - started)
            waveform = result if name == "decode" else waveform
    return {name: statistics.median(values) for name, values in parts.items()}


def time_bfloat16(pipeline: ACEStepPipeline, music: list[Track]) -> dict[str, float]:
    """What the VAE in bfloat16 takes for a track beside float32, and how far its means are from float32's."""
    waveform = read_audio(music[0].source)
    means, seconds = [], []
    for dtype in (torch.float32, torch.bfloat16):
        vae = pipeline.vae.to(dtype)
        encode_latents(vae, b"", waveform)
        synchronize(vae.device)
        started = time.perf_counter()
        means.append(encode_latents(vae, b"", waveform)["mean"])
        seconds.append(time.perf_counter() - started)
    pipeline.vae.to(torch.float32)
    error = float((means[1] - means[0]).norm() / means[0].norm())
    return {"seconds_float32": seconds[0], "seconds_bfloat16": seconds[1], "relative_error": error}


def describe(result: dict) -> str:
    """The figures for a person."""
    parts = ", ".join(f"{name} {value:.3f} s" for name, value in result["parts_s_a_track"].items())
    lines = [
        f"ours {result['real_time_factor']:.1f} x real time, naive {result['naive_real_time_factor']:.1f} x: "
        f"{result['ratio']:.2f} times as fast",
        f"latents differ by at most {result['largest_difference_of_latents']:.1e}; a track alone: {parts}; text is "
        f"{result['text_share']:.1%} of our time",
    ]
    if target := result["target"]:
        met = "met" if result[target["figure"]] >= target["least"] else "MISSED"
        lines += [f"target: {target['figure']} >= {target['least']:g}: {met}"]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=("tiny", *SHAPES), default="tiny", help="sizes of VAE and text encoders")
    p.add_argument("--tracks", type=int, default=3, help="how many (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=60.0, help="length of each (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=1, help="how often each way is run (default: %(default)s)")
    p.add_argument("--output", type=Path, help="results file (default: benchmarks/results/latent_cache[_MODEL].json)")
    args = p.parse_args()
    result = measure(model=args.model, tracks=args.tracks, seconds=args.seconds, rounds=args.rounds)
    suffix = "" if args.model == "tiny" else f"_{args.model}"
    output = args.output or RESULTS / f"latent_cache{suffix}.json"
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(describe(result))


if __name__ == "__main__":
    main()
