#!/usr/bin/env python
"""How cost grows: with tracks (50 to 100,000), length (10 to 600 s), rank (8 to 256) and processes.

    python benchmarks/scaling.py

Tracks are measured, each number in a process of its own: the records of a simulated cache (every name leads to one of
a few real files of one minute, 64 channels), the plans of 21 epochs, and the reading of batches. Memory is the
process' own, without mapped files, after the allocator has given back what is free; what reading adds to it is taken
over rounds of 100 batches, after a first that is left out. Length and rank are arithmetic on the 2 B model's shape,
with the formulas of `acestep-lora estimate`. Processes: the embedded checkpoint trained by one and by two processes
(gloo) on this CPU is measured; what a process has to send is arithmetic. `scaling_page.py` writes docs/scaling.md and
its picture.
"""

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
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
from acestep_pipeline.files import write_text
from acestep_pipeline.prompt_fields import PromptFields
from benchmarks.results_file import RESULTS, ROOT, origin, same_origin
from benchmarks.training_measure import spread

FILE = RESULTS / "scaling.json"
TRACKS = (50, 500, 5000, 20_000, 100_000)
LENGTHS_S, RANKS, PROCESSES = (10, 30, 60, 120, 240, 600), (8, 16, 32, 64, 128, 256), (1, 2, 4, 8)
REAL_FILES, BATCHES, ROUNDS, EPOCHS = 20, 100, 5, 20
WARM_UP_UPDATES = 4


def memory_mb() -> float:
    """What this process holds in memory of its own, without mapped files and what its allocator could give back."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
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
    del plan
    next_s = [timed(lambda epoch=epoch: planner.plan(epoch))[0] for epoch in range(1, 1 + EPOCHS)]
    loader = BatchLoader(tracks, DrawSettings(seed=0, cfg_dropout=0.15))
    updates = planner.plans_from(0, 10**9)
    growth, batch_ms = [], []
    for _ in range(1 + ROUNDS):
        micros = [process[0] for process, *_ in itertools.islice(updates, BATCHES)]
        before = memory_mb()
        batch_ms += [1000 * timed(lambda micro=micro: loader.load(micro) and None)[0] for micro in micros]
        growth.append(memory_mb() - before)
    return {
        "tracks": number, "records_s": records_s, "records_mb": with_records - start, "planner_s": planner_s,
        "plan_of_first_epoch_s": first_s, "plan_of_next_epochs_s": spread(next_s, digits=5),
        "plan_mb": with_plan - with_records, "batch_ms": spread(batch_ms[BATCHES:]),
        "growth_over_100_batches_mb": spread(growth[1:]),
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


def train(processes: int, music: Path, folder: Path, updates: int) -> dict[str, float]:
    """Seconds, with quartiles, of an update of four windows of 10 s, the embedded checkpoint, one thread a process."""
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
    ends = ends[WARM_UP_UPDATES - 1 :]
    return spread([after - before for before, after in itertools.pairwise(ends)], digits=4)


def measure(*, updates: int) -> dict:
    """Every figure, and what it was measured on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_files(folder)
        tracks = []
        for number in TRACKS:
            tracks.append(in_own_process(number, folder))
            print(json.dumps(tracks[-1]), flush=True)
        checking_ms = [1000 * timed(lambda pair=pair: [read_header(path) for path in pair])[0] for pair in files]
        sizes = [sum(path.stat().st_size for path in pair) for pair in files]
        render_demo_dataset(folder / "music", num_clips=4, duration_s=11.0)
        gloo = {number: train(number, folder / "music", folder, updates) for number in (1, 2)}
        print(f"update on 1 and 2 processes: {gloo}", flush=True)
    lengths = [account(seconds=seconds, rank=64) for seconds in LENGTHS_S]
    ranks = [account(seconds=60, rank=rank) for rank in RANKS]
    sent = ranks[RANKS.index(64)]["gradients_mb"]
    return origin() | {
        "load_average": os.getloadavg()[0],
        "tracks": tracks,
        "checking_a_cached_track_ms": statistics.median(checking_ms),
        "bytes_of_a_cached_track": statistics.mean(sizes),
        "length": lengths,
        "rank": ranks,
        "processes": {
            "measured_s_an_update": {str(number): seconds["median"] for number, seconds in gloo.items()},
            "quartiles_s_an_update": {str(number): seconds for number, seconds in gloo.items()},
            # A ring: every process sends, and receives, twice the gradients less its own share.
            "sent_mb_an_update": {str(n): 2 * sent * (n - 1) / n for n in PROCESSES},
        },
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--updates", type=int, default=24, help="updates of each run (default: %(default)s)")
    p.add_argument("--output", type=Path, default=FILE, help="results file (default: %(default)s)")
    p.add_argument("--overwrite", action="store_true", help="measure again what the file has")
    p.add_argument("--one", nargs=2, metavar=("N", "DIR"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(measure_tracks(int(args.one[0]), Path(args.one[1]))))
        return
    there = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    if args.overwrite or not same_origin(there, origin()):
        write_text(args.output, json.dumps(measure(updates=args.updates), indent=1) + "\n")
    print(f"Wrote {args.output}; benchmarks/scaling_page.py puts it into docs/scaling.md.")


if __name__ == "__main__":
    main()
