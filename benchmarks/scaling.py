#!/usr/bin/env python
"""How cost grows: with tracks (50 to 100,000), length (10 to 600 s), rank (8 to 256) and processes.

    python benchmarks/scaling.py

Tracks are measured, each number in a process of its own: the records of a simulated cache (every name leads to one of
a few real files of one minute, 64 channels), the plan of an epoch, and the reading of batches; memory is the growth of
the process's. Length and rank are arithmetic on the 2 B model's shape, with the formulas of `acestep-lora estimate`.
Processes: the embedded checkpoint trained by one and by two processes (gloo) on this CPU is measured; what a process
has to send is arithmetic. The picture is docs/scaling.png.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.data.batching import BatchLoader, DrawSettings, EpochPlanner
from acestep_pipeline.data.cache_files import read_header, write_cache_file
from acestep_pipeline.data.demo_music import render_demo_dataset
from acestep_pipeline.data.latent_cache import CachedTrack, Window
from acestep_pipeline.estimation.compute_time import pass_work
from acestep_pipeline.estimation.memory_use import Batch, Precision, inspect_adapter, predict_update
from acestep_pipeline.estimation.model_shapes import SHAPES
from acestep_pipeline.prompt_fields import PromptFields

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "scaling.json", ROOT / "docs" / "scaling.png"
TRACKS = (50, 500, 5000, 20_000, 100_000)
LENGTHS_S, RANKS, PROCESSES = (10, 30, 60, 120, 240, 600), (8, 16, 32, 64, 128, 256), (1, 2, 4, 8)
REAL_FILES, BATCHES = 20, 100


def memory_mb() -> float:
    """What this process holds in memory of its own, without mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024 / 1e6


def timed(work):
    """(seconds, result)."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def write_files(folder: Path) -> list[tuple[Path, Path]]:
    """Latents of a minute and conditions of 200 tokens, of the 2 B model's sizes."""
    generator = torch.Generator().manual_seed(0)
    files = []
    for number in range(REAL_FILES):
        latents, condition = folder / f"{number}.safetensors", folder / f"{number}.text.safetensors"
        write_cache_file(latents, {name: torch.rand(1500, 64, generator=generator) for name in ("mean", "std")}, {})
        hidden = torch.randn(200, 2048, generator=generator).bfloat16()
        write_cache_file(condition, {"encoder_hidden_states": hidden}, {})
        files.append((latents, condition))
    return files


def measure_tracks(number: int, folder: Path) -> dict:
    """Records, planner, plan and batches of so many tracks of a minute, each with words of its own."""
    files = [(folder / f"{index}.safetensors", folder / f"{index}.text.safetensors") for index in range(REAL_FILES)]

    def record(index: int) -> CachedTrack:
        latents, condition = files[index % REAL_FILES]
        fields = PromptFields(prompt=f"piece number {index}, slow, wide, dark", audio_duration=60.0)
        window = Window(0, fields, Path(str(condition)), 200)
        return CachedTrack(f"folder/{index:07}.flac", Path(str(latents)), 1500, 1500, (window,))

    start = memory_mb()
    records_s, tracks = timed(lambda: [record(index) for index in range(number)])
    with_records = memory_mb()
    planner_s, planner = timed(lambda: EpochPlanner(tracks, seed=0, effective_batch_size=4, micro_batch_size=4))
    first_s, plan = timed(lambda: planner.plan(0))
    with_plan = memory_mb()
    second_s, _ = timed(lambda: planner.plan(1))
    micros = [process[0] for process, *_ in plan[:BATCHES]]
    loader = BatchLoader(tracks, DrawSettings(seed=0, cfg_dropout=0.15))
    for micro in micros[:5]:
        loader.load(micro)
    before = memory_mb()
    load_s, _ = timed(lambda: [loader.load(micro) and None for micro in micros])
    return {
        "tracks": number, "records_s": records_s, "records_mb": with_records - start, "planner_s": planner_s,
        "plan_of_first_epoch_s": first_s, "plan_of_second_epoch_s": second_s, "plan_mb": with_plan - with_records,
        "batch_ms": 1000 * load_s / len(micros), "growth_over_batches_mb": memory_mb() - before,
    }  # fmt: skip


def in_own_process(number: int, folder: Path) -> dict:
    command = [sys.executable, __file__, "--one", str(number), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {number} tracks failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def account(*, seconds: float, rank: int) -> dict:
    """Operations and bytes of an update of one window, with checkpointing, bf16 and AdamW, by formula."""
    with torch.device("meta"):
        plain, adapted = SHAPES["2b"].build("transformer"), SHAPES["2b"].build("transformer")
    add_lora(adapted, LoraSettings(r=rank, lora_alpha=2.0 * rank, lora_dropout=0.05), seed=0)
    adapter = inspect_adapter(adapted, dropout=0.05)
    batch, precision = Batch(1, round(25 * seconds), 400), Precision(weight=2, mask=1, shared_keys=False)
    work = pass_work(plain.config, adapter, batch, precision, base_quantization="none", gradient_checkpointing=1.0)
    parts = predict_update(plain, adapter, batch, precision, base_quantization="none", gradient_checkpointing=1.0,
                           optimizer="adamw")  # fmt: skip
    return {"seconds": seconds, "rank": rank, "adapter_parameters": adapter.num_parameters,
            "tflop": work.flops / 1e12, "gb": sum(parts.values()) / 1e9,
            "gradients_mb": 4 * adapter.num_parameters / 1e6}  # fmt: skip


def train(processes: int, music: Path, folder: Path, updates: int) -> float:
    """Median seconds of an update of four windows of 10 s, the embedded checkpoint, one thread a process."""
    output = folder / f"output-{processes}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        str(ROOT / "train_ace_step_lora.py"), "--preset", "c", "--pretrained_model_name_or_path", "tiny",
        "--train_data_dir", str(music), "--output_dir", str(output), "--max_train_steps", str(updates),
        "--max_duration_s", "10", "--num_validation_samples", "0", "--train_batch_size", "1", "--latent_cache_dir",
        str(folder / "cache"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"error: training with {processes} processes failed: {done.stderr[-2000:]}")
    ends = [json.loads(line)["seconds"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(after - before for before, after in zip(ends[3:], ends[4:], strict=False))


def measure(*, updates: int) -> dict:
    """Every figure, and what it was measured on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_files(folder)
        tracks = []
        for number in TRACKS:
            tracks.append(in_own_process(number, folder))
            print(json.dumps(tracks[-1]), flush=True)
        checking_s, _ = timed(lambda: [read_header(path) for pair in files for path in pair])
        sizes = [sum(path.stat().st_size for path in pair) for pair in files]
        render_demo_dataset(folder / "music", num_clips=4, duration_s=11.0)
        gloo = {number: train(number, folder / "music", folder, updates) for number in (1, 2)}
        print(f"update on 1 and 2 processes: {gloo}", flush=True)
    lengths = [account(seconds=seconds, rank=64) for seconds in LENGTHS_S]
    ranks = [account(seconds=60, rank=rank) for rank in RANKS]
    sent = ranks[RANKS.index(64)]["gradients_mb"]
    return {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "load_average": os.getloadavg()[0],
        "tracks": tracks,
        "checking_a_cached_track_ms": 1000 * checking_s / REAL_FILES,
        "bytes_of_a_cached_track": statistics.mean(sizes),
        "length": lengths,
        "rank": ranks,
        "processes": {
            "measured_s_an_update": {str(number): seconds for number, seconds in gloo.items()},
            # A ring: every process sends, and receives, twice the gradients less its own share.
            "sent_mb_an_update": {str(n): 2 * sent * (n - 1) / n for n in PROCESSES},
        },
    }


def draw(result: dict, path: Path) -> None:
    """Four panels: tracks (time, memory), length, rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((time_axis, memory_axis), (length_axis, rank_axis)) = pyplot.subplots(2, 2, figsize=(10, 7))
    numbers = [row["tracks"] for row in result["tracks"]]
    for key, label in (
        ("plan_of_first_epoch_s", "plan of an epoch"),
        ("planner_s", "planner"),
        ("records_s", "records"),
    ):
        time_axis.loglog(numbers, [row[key] for row in result["tracks"]], "o-", label=label)
    time_axis.set(xlabel="tracks", ylabel="s", title="Planning (measured)")
    for key, label in (("records_mb", "records"), ("plan_mb", "plan"), ("growth_over_batches_mb", "100 batches read")):
        memory_axis.semilogx(numbers, [row[key] for row in result["tracks"]], "o-", label=label)
    memory_axis.set(xlabel="tracks", ylabel="MB", title="Memory of the data path (measured)")
    for axis, rows, key in ((length_axis, result["length"], "seconds"), (rank_axis, result["rank"], "rank")):
        values = [row[key] for row in rows]
        axis.loglog(values, [row["tflop"] for row in rows], "o-", label="TFLOP an update")
        axis.loglog(values, [row["gb"] for row in rows], "s-", label="GB at the peak")
        axis.set(xlabel={"seconds": "window, s", "rank": "rank"}[key], title="2 B, one window (formula)")
    for axis in figure.axes:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--updates", type=int, default=24, help="updates of each run (default: %(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    p.add_argument("--picture", type=Path, default=PICTURE, help="(default: %(default)s)")
    p.add_argument("--one", nargs=2, metavar=("N", "DIR"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(measure_tracks(int(args.one[0]), Path(args.one[1]))))
        return
    result = measure(updates=args.updates)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, args.picture)
    print(f"Wrote {args.output} and {args.picture}")


if __name__ == "__main__":
    main()
