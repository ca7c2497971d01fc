#!/usr/bin/env python
"""Filling the latent cache (VAE and text): this package beside a naive loop, in one run.

    python benchmarks/latent_cache.py               on a CPU the embedded checkpoint, on a GPU the real sizes
    python benchmarks/latent_cache.py --suite gpu --model tiny --tracks 2 --seconds 4 --rounds 1      a rehearsal

The naive loop decodes a whole file, encodes it in one piece, encodes its text, writes both, and goes on to the next
file. Ours (`prepare_tracks`) decodes the next tracks in threads meanwhile, and encodes in tiles. Both encode every
prompt alone, since the cache has to hold the same bits whatever was encoded together; `text_share` is what that costs
of our time. The two take turns on the same Ogg files, which are decoded and encoded anew each time. What a track takes
is the time from the end of the one before it; how many times real time that is, and how ours compares, are medians and
quartiles over all tracks of all rounds, after a warm-up on one track that is left out. Latents are compared. Hashing
the models, which is done once, is stated apart. On a GPU the VAE is also timed in bfloat16, with how far its latents
are then from float32's, relative to them; training does not use that. `latent_cache_table.py` writes README's table.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.conditioning import encode_condition
from acestep_pipeline.data.audio import read_audio, write_audio
from acestep_pipeline.data.cache_files import write_cache_file
from acestep_pipeline.data.encoders import Encoders
from acestep_pipeline.data.latent_cache import (
    CachedTrack,
    LatentCache,
    encode_latents,
    load_latents,
    prepare_tracks,
    prompt_fields,
)
from acestep_pipeline.data.tracks import Track, load_tracks
from acestep_pipeline.errors import RunError, UsageError, one_sentence_errors
from acestep_pipeline.estimation.model_shapes import SHAPES
from acestep_pipeline.hardware import default_device
from acestep_pipeline.progress import quiet_loading
from acestep_pipeline.tiny_checkpoint import tiny_checkpoint_path
from benchmarks.device_time import synchronize
from benchmarks.random_models import random_module
from benchmarks.results_file import RESULTS, Results, measure_or_not
from benchmarks.suites import choose_suite, suite_parser
from benchmarks.training_measure import spread

WAYS = ("naive", "ours")
LYRICS = "[verse]\n" + "\n".join(f"line {line} of a song about the rain and the road" for line in range(12))


@dataclass(frozen=True)
class Case:
    """What is encoded: so many tracks of one length (a length that a window can have), so many times each way, by VAE
    and text encoders of a model: `tiny`, the embedded checkpoint, or of a published shape with random weights."""

    model: str
    tracks: int
    seconds: int
    rounds: int


SUITES = {"cpu": Case("tiny", 8, 20, 3), "gpu": Case("2b", 20, 60, 5)}


def write_music(folder: Path, *, tracks: int, seconds: float) -> list[Track]:
    """Ogg files of noise that swells and fades, at 44.1 kHz (so that decoding resamples), with tags and lyrics."""
    folder.mkdir()
    for number in range(tracks):
        generator = np.random.default_rng(number)
        times = np.arange(round(44_100 * seconds)) / 44_100
        sound = generator.normal(0, 0.1, (2, len(times))) * (0.6 + 0.4 * np.sin(times + number))
        write_audio(folder / f"track{number:04}.ogg", sound, sample_rate=44_100)
        (folder / f"track{number:04}.tags.txt").write_text(f"noise music, piece number {number}, slow, wide, dark")
        (folder / f"track{number:04}.lyrics.txt").write_text(LYRICS)
    found, _ = load_tracks(folder, show_progress=False)
    return found


def build_pipeline(model: str, device: torch.device) -> ACEStepPipeline:
    """The embedded checkpoint, with real-size encoders in the place of its own where `model` names them."""
    with quiet_loading():
        pipeline = ACEStepPipeline.from_pretrained(tiny_checkpoint_path())
    if model != "tiny":
        torch.manual_seed(0)
        shape, dtype = SHAPES[model], torch.bfloat16 if device.type == "cuda" else torch.float32
        encoders = {
            name: random_module(shape.build(name), device=device, dtype=dtype)
            for name in ("text_encoder", "condition_encoder")
        }
        vae = random_module(shape.build("vae"), device=device, dtype=torch.float32)
        pipeline = ACEStepPipeline(**(pipeline.components | encoders | {"vae": vae}))
        pipeline.transformer.to(dtype)
    pipeline.move_encoders(device)
    return pipeline


class Clock:
    """Seconds of each track, from the end of the one before it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, []
        self.start()

    def start(self) -> None:
        """The first track of a round begins."""
        synchronize(self.device)
        self._since = time.perf_counter()

    def ended(self) -> None:
        """A track has ended."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now


class TimedCache(LatentCache):
    """Tells a clock of every track that it has prepared."""

    clock: Clock

    def prepare(self, *args, **kwargs):
        prepared = super().prepare(*args, **kwargs)
        self.clock.ended()
        return prepared


def fill_naively(pipeline: ACEStepPipeline, tracks: list[Track], folder: Path, clock: Clock) -> list[torch.Tensor]:
    """One file after another, each whole; the means of their latents."""
    means = []
    folder.mkdir()
    pipeline.vae.use_tiling = False
    clock.start()
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
        clock.ended()
        means.append(tensors["mean"])
    pipeline.vae.use_tiling = True
    return means


def fill_our_way(pipeline: ACEStepPipeline, tracks: list[Track], folder: Path, clock: Clock) -> list[CachedTrack]:
    """With the package."""
    cache = TimedCache(folder, Encoders.of(pipeline))
    cache.clock = clock
    clock.start()
    cached, problems = prepare_tracks(cache, tracks, max_duration_s=240.0, show_progress=False)
    if problems:
        raise RunError(f"not all tracks were cached as they are: {problems[0]}.")
    return cached


def measure(case: Case) -> list[dict]:
    """A row for each way."""
    device = default_device()
    pipeline = build_pipeline(case.model, device)
    clocks = {way: Clock(device) for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        music = write_music(root / "music", tracks=case.tracks, seconds=case.seconds)
        for fill in (fill_naively, fill_our_way):
            fill(pipeline, music[:1], root / f"warm-up-{fill.__name__}", Clock(device))
        started = time.perf_counter()
        LatentCache(root / "hashed", Encoders.of(pipeline))
        hashing_s = time.perf_counter() - started
        for number in range(case.rounds):
            for way in WAYS[:: -1 if number % 2 else 1]:
                folder = root / f"{way}-{number}"
                if way == "naive":
                    means = fill_naively(pipeline, music, folder, clocks[way])
                else:
                    cached = fill_our_way(pipeline, music, folder, clocks[way])
        pairs = zip(cached, means, strict=True)
        difference = max(float((load_latents(entry)["mean"] - mean).abs().max()) for entry, mean in pairs)
        parts = time_parts(pipeline, music[:3], case.seconds)
        bfloat16 = time_bfloat16(pipeline, music[0]) if device.type == "cuda" else None
    rows = {way: row(pipeline, case, way, clocks[way].seconds) for way in WAYS}
    pairs = zip(clocks["naive"].seconds, clocks["ours"].seconds, strict=True)
    rows["ours"] |= {
        "times_as_fast": spread([naive / ours for naive, ours in pairs], digits=3),
        "largest_difference_of_latents": difference,
        "parts_s_per_track": parts,
        "text_share": round(parts["text"] / statistics.mean(clocks["ours"].seconds), 4),
        "hashing_models_s": round(hashing_s, 3),
        "vae_in_bfloat16": bfloat16,
    }
    return list(rows.values())


def row(pipeline: ACEStepPipeline, case: Case, way: str, seconds: list[float]) -> dict:
    """What both ways are told by: seconds of each track, and how many times real time that is."""
    return {
        "way": way,
        "vae_precision": str(pipeline.vae.dtype).removeprefix("torch."),
        "text_precision": str(pipeline.text_encoder.dtype).removeprefix("torch."),
        "tracks_timed": len(seconds),
        "s_per_track": spread(seconds, digits=4),
        "times_real_time": spread([case.seconds / taken for taken in seconds]),
        "times_real_time_in_all": round(case.seconds * len(seconds) / sum(seconds), 2),
    }


def time_parts(pipeline: ACEStepPipeline, music: list[Track], seconds: float) -> dict[str, float]:
    """Median seconds a track of decoding, of the VAE in tiles, and of the text, one after another."""
    parts: dict[str, list[float]] = {"decode": [], "vae": [], "text": []}
    for track in music:
        clock = Clock(pipeline.vae.device)
        waveform = read_audio(track.source)
        clock.ended()
        encode_latents(pipeline.vae, track.source, waveform)
        clock.ended()
        encode_condition(pipeline, prompt_fields(track, track.tags, LYRICS, seconds))
        clock.ended()
        for taken, values in zip(clock.seconds, parts.values(), strict=True):
            values.append(taken)
    return {name: round(statistics.median(values), 4) for name, values in parts.items()}


def time_bfloat16(pipeline: ACEStepPipeline, track: Track) -> dict[str, float]:
    """What the VAE in bfloat16 takes for a track beside float32, and how far its means are from float32's."""
    waveform = read_audio(track.source)
    means, seconds = [], []
    for dtype in (torch.float32, torch.bfloat16):
        vae = pipeline.vae.to(dtype)
        encode_latents(vae, track.source, waveform)  # warm-up
        clock = Clock(vae.device)
        means.append(encode_latents(vae, track.source, waveform)["mean"])
        clock.ended()
        seconds += clock.seconds
    pipeline.vae.to(torch.float32)
    error = float((means[1] - means[0]).norm() / means[0].norm())
    return {"s_float32": round(seconds[0], 4), "s_bfloat16": round(seconds[1], 4), "relative_error": error}


def describe(case: Case) -> str:
    """E.g. `2b, 100 tracks of 60 s`."""
    return f"{case.model}, {case.tracks * case.rounds} tracks of {case.seconds} s"


def describe_row(row: dict) -> str:
    """One line for a person."""
    if "times_real_time" not in row:
        return f"{row['way']:6} out of memory"
    line = f"{row['way']:6}" + "{median:8.2f} × real time ({q1:.2f}-{q3:.2f})".format(**row["times_real_time"])
    if row["way"] == "naive":
        return line
    parts = ", ".join(f"{name} {value:.3f} s" for name, value in row["parts_s_per_track"].items())
    line += ", {median:.2f} times as fast ({q1:.2f}-{q3:.2f})".format(**row["times_as_fast"])
    return f"{line}; latents differ by {row['largest_difference_of_latents']:.1e}; a track alone: {parts}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = suite_parser(__doc__, "latent_cache", SUITES)
    p.add_argument("--model", choices=("tiny", *SHAPES), help="VAE and text encoders, instead of the suite's")
    p.add_argument("--tracks", type=int, help="how many files, instead of the suite's")
    p.add_argument("--seconds", type=int, help="length of each, instead of the suite's")
    p.add_argument("--rounds", type=int, help="how often each way encodes all of them, instead of the suite's")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the suite's configuration."""
    args = parse_args(argv)
    suite = choose_suite(args.suite, rehearsed=args.model is not None, rehearsal="--model tiny")
    given = {name: getattr(args, name) for name in ("model", "tracks", "seconds", "rounds")}
    case = dataclasses.replace(SUITES[suite], **{name: value for name, value in given.items() if value is not None})
    if min(case.tracks, case.rounds) < 1 or case.seconds < 2 or case.seconds % 2:
        raise UsageError("--tracks and --rounds must be at least 1, --seconds an even number.")
    output = args.output or RESULTS / f"latent_cache_{suite}.json"
    results = Results(output, overwrite=args.overwrite, describe=describe_row)
    if not results.has("caching", case):
        print(f"{describe(case)} …", flush=True)
        results.add("caching", case, measure_or_not(functools.partial(measure, case), WAYS))
    print(f"Wrote {output}; benchmarks/latent_cache_table.py puts it into README.md.")


if __name__ == "__main__":
    with one_sentence_errors(debug=False):
        main()
