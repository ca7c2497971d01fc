#!/usr/bin/env python
"""Whether recipe c fits into 12, 8 and 16 GB, at full size.

    python benchmarks/memory.py          on a CPU by formulas and fake tensors, in 3 GB; on a GPU whole trainings
    python benchmarks/memory.py --suite gpu --model tiny --max_seconds 12 --stages vram_8gb        a rehearsal on a CPU

On a CPU, for each target (flags and a limit) and songs of one and of ten minutes: what `acestep-lora estimate`
predicts, for CUDA's kernels, held against the limit; and what an update's tensors come to on fake ones, beside what
the same formulas predict for a CPU's kernels (`memory_accounting.py`); the same for the VAE's tiles. The sizes of
quantised weights and of 8-bit Adam's state are formulas, which `tests/test_quantization.py` and
`tests/test_memory_use.py` hold against real ones. Then the embedded checkpoint is trained on a song of one minute and
of ten: the peak of the process. It does not grow with the song, which is encoded while it is decoded; but songs of up
to five minutes (`latent_cache.MAX_AHEAD_S`) are decoded whole, 23 MB a minute, while others are encoded.

On a GPU, for each target: trainings with random weights, from audio to samples, within the limit (`memory_peaks.py`).
`memory_table.py` writes the table in docs/training.md.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.data.tracks import Track
from acestep_pipeline.errors import one_sentence_errors
from acestep_pipeline.estimation.estimate import USABLE_MEMORY, Estimate, estimate
from acestep_pipeline.estimation.gpus import Gpu
from acestep_pipeline.estimation.memory_use import GIB
from acestep_pipeline.estimation.model_shapes import SHAPES
from acestep_pipeline.estimation.other_phases import decoding_tile_bytes, encoding_tile_bytes
from acestep_pipeline.training.arguments import parse_args as parse_training_args
from benchmarks.memory_accounting import account_tiles, account_update, predict_on_cpu
from benchmarks.memory_peaks import Training, measure_training, write_checkpoint
from benchmarks.results_file import RESULTS, Results
from benchmarks.suites import check_stages, choose_suite, suite_parser

FRAMES_PER_SECOND = 25
# For songs of a minute: two updates of four windows; a song of ten minutes has more.
SONGS = {60: 8, 600: 1}


@dataclass(frozen=True)
class Target:
    """Flags of a training of a model (`2b`, `xl`), and the GB (10^9 bytes) that it has to fit into."""

    model: str
    limit_gb: float
    flags: str


@dataclass(frozen=True)
class Tiles:
    """The VAE's coding (`encode`, `decode`) of audio of any length."""

    what: str
    dtype: str


TARGETS = {
    "c": Target("2b", 12, "--preset c --max_duration_s 60"),
    "c_checkpointed": Target("2b", 12, "--preset c --max_duration_s 60 --gradient_checkpointing"),
    "vram_12gb": Target("2b", 12, "--preset vram_12gb"),
    "vram_8gb": Target("2b", 8, "--preset vram_8gb"),
    "xl_vram_16gb": Target("xl", 16, "--preset xl_vram_16gb"),
}
ON_A_CPU = "--preset c --max_duration_s 30 --effective_batch_size 1 --num_validation_samples 0"
CPU_STAGES = {
    "targets": list(TARGETS.values()),
    "tiles": [Tiles("encode", "float32"), Tiles("decode", "float32"), Tiles("decode", "bfloat16")],
    "songs": [Training("tiny", 1, seconds, ON_A_CPU) for seconds in SONGS],
}
GPU_STAGES = {
    name: [
        Training(target.model, songs, song_s, f"{target.flags} --validation_inference_steps 8", target.limit_gb)
        for song_s, songs in SONGS.items()
    ]
    for name, target in TARGETS.items()
}
SUITES = {"cpu": CPU_STAGES, "gpu": GPU_STAGES}


def estimate_target(target: Target, song_s: float) -> Estimate:
    """`acestep-lora estimate` of eight songs of one length with 1200 letters of lyrics, on a GPU of that memory."""
    args = parse_training_args([*target.flags.split(), "--train_data_dir", "songs"])
    song = Track("song", Path("song"), "t" * 80, "l" * 1200, "en", "", 120, "C major", "4", song_s, 48000, 2, "")
    size = target.limit_gb * 1e9 / GIB / USABLE_MEMORY
    gpu = Gpu(f"{target.limit_gb:g} GB", size, bf16_tflops=100, fp32_tflops=30, bandwidth_gb_s=500, host_gb_s=20,
              source="")  # fmt: skip
    return estimate(SHAPES[target.model], args, [song] * 8, [], gpu)


def measure_target(target: Target) -> dict:
    """Predictions for songs of one and ten minutes, and formulas against the accounting."""
    args = parse_training_args([*target.flags.split(), "--train_data_dir", "songs"])
    checkpointing = args.gradient_checkpointing_ratio if args.gradient_checkpointing else 0.0
    lora = LoraSettings(r=args.rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout)
    songs = {}
    for song_s in SONGS:
        found = estimate_target(target, song_s)
        songs[f"{song_s} s"] = {
            "windows_in_a_pass": found.batch.items, "window_s": found.batch.frames / FRAMES_PER_SECOND,
            "update_bytes": sum(found.update.values()), "encoding_bytes": found.encoding,
            "samples_bytes": found.samples, "peak_bytes": found.peak,
            "fits": found.peak <= target.limit_gb * 1e9,
        }  # fmt: skip
    batch, config = estimate_target(target, 60).batch, SHAPES[target.model].transformer
    predicted, adapter = predict_on_cpu(config, lora, batch, checkpointing=checkpointing)
    accounted = account_update(config, lora, batch, checkpointing=checkpointing)
    return {
        "predicted_for": songs, "adapter_parameters": adapter.num_parameters,
        "unquantised_adamw": {"predicted_bytes": predicted, "accounted_bytes": accounted,
                              "ratio": round(predicted / accounted, 4)},
    }  # fmt: skip


def measure_tiles(tiles: Tiles) -> dict:
    """What the estimate takes for the tiles, and what they come to, whatever the song's length."""
    encode, dtype = tiles.what == "encode", getattr(torch, tiles.dtype)
    predict = encoding_tile_bytes if encode else decoding_tile_bytes
    accounted = {f"{song_s} s": account_tiles(song_s, encode=encode, dtype=dtype) for song_s in SONGS}
    return {"predicted_bytes": predict(SHAPES["2b"], dtype.itemsize), "accounted_bytes": accounted}


def describe_row(row: dict) -> str:
    """One line for a person."""
    if row.get("out_of_memory"):
        return "  out of memory"
    if songs := row.get("predicted_for"):
        peaks = ", ".join(f"{song['peak_bytes'] / 1e9:.1f} GB for songs of {name}" for name, song in songs.items())
        ours = row["unquantised_adamw"]
        return f"predicted {peaks}; an update on fake tensors is {1 / ours['ratio']:.3f} of what is predicted"
    if "accounted_bytes" in row:
        accounted = ", ".join(f"{size / 1e9:.3f} GB of {name}" for name, size in row["accounted_bytes"].items())
        return f"predicted {row['predicted_bytes'] / 1e9:.3f} GB, on fake tensors {accounted}"
    return ", ".join(f"{name.removesuffix('_bytes')} {size / 1e9:.2f} GB" for name, size in row.items())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = suite_parser(__doc__, "memory", SUITES)
    p.add_argument("--model", choices=("tiny", *SHAPES), help="train this model instead of those of the suite")
    p.add_argument("--max_seconds", type=int, help="songs of at most this, instead of those of the suite")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the stages."""
    args = parse_args(argv)
    suite = choose_suite(args.suite, rehearsed=args.model is not None, rehearsal="--model tiny")
    stages = SUITES[suite]
    check_stages(args.stages, stages, suite)
    output = args.output or RESULTS / f"memory_{suite}.json"
    results = Results(output, overwrite=args.overwrite, describe=describe_row)
    with tempfile.TemporaryDirectory() as folder:

        @functools.cache
        def checkpoint(model: str) -> str:
            return "tiny" if model == "tiny" else str(write_checkpoint(SHAPES[model], Path(folder, model)))

        for stage in args.stages or stages:
            for case in stages[stage]:
                if isinstance(case, Training):
                    song_s = min(case.song_s, args.max_seconds or case.song_s)
                    case = dataclasses.replace(case, model=args.model or case.model, song_s=song_s)
                if not results.has(stage, case):
                    print(f"{stage}: {case} …", flush=True)
                    results.add(stage, case, [measure(case, checkpoint)])
    print(f"Wrote {output}; benchmarks/memory_table.py puts it into docs/training.md.")


def measure(case: Target | Tiles | Training, checkpoint) -> dict:
    """The row of a configuration; `checkpoint` names that of a model."""
    if isinstance(case, Training):
        return measure_training(case, checkpoint(case.model))
    return measure_target(case) if isinstance(case, Target) else measure_tiles(case)


if __name__ == "__main__":
    with one_sentence_errors(debug=False):
        main()
