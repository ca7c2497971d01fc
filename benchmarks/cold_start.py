#!/usr/bin/env python
"""How long it takes from the start of a training's process to its first update, on a machine that holds no model yet.

    python benchmarks/cold_start.py            measures, and writes the table in docs/serverless.md
    python benchmarks/cold_start.py --table    only writes the table
    python benchmarks/cold_start.py --check    exit status 1 if docs/serverless.md says something else

A checkpoint of random weights lies on a real S3 server (SeaweedFS) on this machine. Each run is a process of its own,
with an empty download cache, and is ended after its first update: `everything` has an empty latent cache too;
`all fetched` has a warm one whose knowledge of the encoders was removed, so that the whole checkpoint is fetched and
loaded; `DiT alone` has a warm one. The ways take turns. Also how long `acestep-lora --help` and the import of the
serverless handlers take, as processes.
"""

import argparse
import dataclasses
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel, AutoencoderOobleck
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from transformers import Qwen3Config, Qwen3Model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.data.demo_music import render_demo_dataset
from acestep_pipeline.errors import RunError, one_sentence_errors
from acestep_pipeline.progress import quiet_loading
from acestep_pipeline.storage.folder_sync import sync_folder
from acestep_pipeline.tiny_checkpoint import build_tiny_pipeline
from benchmarks.pages import write_tables
from benchmarks.random_models import random_module, transformer_shape
from benchmarks.results_file import RESULTS, ROOT, Results, read_rows
from tests.s3_server import running_s3_server

SCRIPT = ROOT / "train_ace_step_lora.py"
PAGE = ROOT / "docs" / "serverless.md"
PATH = RESULTS / "cold_start.json"
WAYS = ("everything", "all fetched", "DiT alone")
SAID = {
    "everything": "nothing cached: all is fetched and loaded, the music is encoded",
    "all fetched": "latents cached, and all is fetched and loaded",
    "DiT alone": "latents cached: the DiT alone is fetched and loaded",
}
# What starts, and in how many seconds at most.
STARTS = {"acestep-lora --help": 0.5, "lambda_handler": 5.0, "modal_app": 5.0, "runpod_handler": 5.0}
NEEDS = {"modal_app": "modal", "runpod_handler": "runpod"}
# DiTs. With its encoders as below, "half" is half as wide and half as deep as the 2 B models, and like theirs half of
# the checkpoint's bytes.
SIZES = {
    "half": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 64},
    "small": transformer_shape("small"),
}  # fmt: skip
LATENT_CHANNELS = 32
UPDATE_TIMEOUT_S = 600


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: a DiT of `SIZES` with the encoders that go with it, and the music."""

    size: str
    tracks: int = 2
    track_s: float = 4.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=tuple(SIZES), default="half", help="of the DiT (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="of all ways (default: %(default)s)")
    p.add_argument("--output", type=Path, default=PATH, help="results file (default: %(default)s)")
    p.add_argument("--table", action="store_true", help="only write the table of what was measured")
    p.add_argument("--check", action="store_true", help="only say whether docs/serverless.md is what the results say")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, and write results and table."""
    args = parse_args(argv)
    if not args.table and not args.check:
        results = Results(args.output, overwrite=True, describe=describe)
        case = Case(args.size)
        results.add("start", case, measure_starts(args.rounds))
        results.add("first update", case, measure_updates(case, args.rounds))
    if args.output == PATH:
        write_tables("benchmarks/cold_start.py", table(read_rows(PATH)), page=PAGE, check=args.check)


# --- the checkpoint --------------------------------------------------------------------------------------------------


def write_checkpoint(case: Case, directory: Path) -> None:
    """A checkpoint of random weights in diffusers' layout, in bfloat16 as the published ones, the VAE in float32."""
    pipeline = build_tiny_pipeline()
    width = SIZES[case.size]
    text_width = 3 * width["hidden_size"] // 8
    encoder = {name: width[name] for name in width if name != "num_hidden_layers"}
    encoder |= {"num_lyric_encoder_hidden_layers": 4, "num_timbre_encoder_hidden_layers": 2}
    channels = {"audio_acoustic_hidden_dim": LATENT_CHANNELS}
    text = {"hidden_size": text_width, "intermediate_size": 3 * text_width, "num_hidden_layers": 8, "head_dim": 64}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 151669}
    with torch.device("meta"), quiet_loading():
        built = {
            "transformer": AceStepTransformer1DModel(**width, **channels, in_channels=3 * LATENT_CHANNELS),
            "condition_encoder": AceStepConditionEncoder(
                **encoder, text_hidden_dim=text_width, timbre_hidden_dim=LATENT_CHANNELS
            ),
            "text_encoder": Qwen3Model(Qwen3Config(**text)),
            "vae": AutoencoderOobleck(
                encoder_hidden_size=2 * LATENT_CHANNELS,
                downsampling_ratios=[2, 4, 4, 6, 10],
                channel_multiples=[1, 2, 4, 8, 16],
                decoder_channels=2 * LATENT_CHANNELS,
                decoder_input_channels=LATENT_CHANNELS,
                sampling_rate=48000,
            ),
        }
    torch.manual_seed(0)
    for name, module in built.items():
        dtype = torch.float32 if name == "vae" else torch.bfloat16
        built[name] = random_module(module, device=torch.device("cpu"), dtype=dtype)
    with quiet_loading():
        pipeline.register_modules(**built)
        pipeline.save_pretrained(directory)


# --- until the first update ------------------------------------------------------------------------------------------


def measure_updates(case: Case, rounds: int) -> list[dict]:
    """Of each way: seconds from the start of the process to the first update, and what it fetched."""
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    fetched: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name, running_s3_server(Path(name) / "server") as server:
        os.environ.update(server.environment)
        os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        root, address = Path(name), f"s3://{server.bucket}/model"
        write_checkpoint(case, root / "model")
        sync_folder(str(root / "model"), address, show_progress=False)
        shutil.rmtree(root / "model")
        render_demo_dataset(root / "music", duration_s=case.track_s)
        for number in range(-1, rounds):  # the first round fills caches of files and of compiled Python
            ways = WAYS if number % 2 else WAYS[::-1]
            for way in WAYS[:1] if number < 0 else ways:
                run = root / f"{number}-{way.replace(' ', '-')}"
                run.mkdir()
                latents = run / "latents" if way == "everything" and number >= 0 else root / "latents"
                if way == "all fetched":
                    latents = shutil.copytree(latents, run / "latents")
                    for known in latents.rglob("encoders-*"):
                        known.unlink()
                both = until_first_update(case, address, root / "music", run, latents)
                copies = [path for path in (run / "cache" / "s3").rglob("*") if path.is_file()]
                if number >= 0:
                    taken[way].append(both)
                    fetched[way] = sum(path.stat().st_size for path in copies)
                shutil.rmtree(run)
    rows = []
    for way in WAYS:
        clock, cpu = zip(*taken[way], strict=True)
        seconds = {"median": statistics.median(clock), "min": min(clock), "max": max(clock)}
        rows.append({"way": way, "seconds": seconds, "cpu_s": statistics.median(cpu), "fetched_bytes": fetched[way]})
    return rows


def until_first_update(case: Case, address: str, music: Path, run: Path, latents: Path) -> tuple[float, float]:
    """Train in a process of its own, and end it when `metrics.jsonl` has a line: seconds by the clock and of CPUs."""
    flags = {
        "preset": "smoke",
        "pretrained_model_name_or_path": address,
        "train_data_dir": music,
        "latent_cache_dir": latents,
        "output_dir": run / "output",
        "max_train_samples": case.tracks,
        "min_duration_s": 1,
        "max_duration_s": 2,
        "num_validation_samples": 0,
        "mixed_precision": "no",
    }
    command = [sys.executable, str(SCRIPT), *(f"--{name}={value}" for name, value in flags.items())]
    metrics = run / "output" / "metrics.jsonl"
    with (run / "log").open("wb") as log:
        started = time.perf_counter()
        environment = os.environ | {"ACESTEP_CACHE_DIR": str(run / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while not (metrics.is_file() and metrics.stat().st_size):
                if process.poll() is not None or time.perf_counter() - started > UPDATE_TIMEOUT_S:
                    said = (run / "log").read_text(errors="replace").strip().splitlines()
                    raise RunError(f"the training made no update; it said: {' '.join(said[-1:])}")
                time.sleep(0.005)
            seconds = time.perf_counter() - started
        finally:
            process.kill()
            if process.returncode is None:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
    return seconds, usage.ru_utime + usage.ru_stime


# --- what starts -----------------------------------------------------------------------------------------------------


def measure_starts(rounds: int) -> list[dict]:
    """Of each program that is installed: seconds that its process takes."""
    rows, environment = [], os.environ | {"ACESTEP_MODAL_IMAGE": "example.org/acestep-lora:1"}
    for name, limit_s in STARTS.items():
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            continue
        code = f"import serverless.{name}" if name in NEEDS or name == "lambda_handler" else None
        command = ["-c", code or "from acestep_pipeline.cli import main; main()", *([] if code else ["--help"])]
        taken = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment
            )
            taken.append(time.perf_counter() - started)
        rows.append({"way": name, "seconds": {"median": statistics.median(taken[1:])}, "limit_s": limit_s})
    return rows


# --- for people ------------------------------------------------------------------------------------------------------


def describe(row: dict) -> str:
    """A line of what was measured."""
    seconds = row["seconds"]["median"]
    if "limit_s" in row:
        within = "within" if seconds <= row["limit_s"] else "over"
        return f"{row['way']}: {seconds:.2f} s ({within} {row['limit_s']:g} s)"
    return f"{row['way']}: {seconds:.1f} s, {row['cpu_s']:.1f} s of CPU, {row['fetched_bytes'] / 1e6:.0f} MB fetched"


def table(rows: list[dict]) -> str:
    """What docs/serverless.md says of them."""
    updates = {row["way"]: row for row in rows if row["stage"] == "first update"}
    lines = ["| on a new machine | first update after | seconds of CPU | fetched |", "|---|---|---|---|"]
    for way in WAYS:
        row = updates.get(way)
        figures = "{median:.1f} s ({min:.1f}–{max:.1f})".format(**row["seconds"]) if row else "not run"
        others = f"{row['cpu_s']:.1f} | {row['fetched_bytes'] / 1e6:,.0f} MB" if row else " | "
        lines.append(f"| {SAID[way]} | {figures} | {others} |")
    starts = [f"`{row['way']}` {row['seconds']['median']:.2f} s" for row in rows if row["stage"] == "start"]
    on = f" ({rows[0]['hardware']}, S3 on the same machine)" if rows else ""
    lines += ["", f"Started as processes: {', '.join(starts) or 'not run'}{on}."]
    return "\n".join(lines)


if __name__ == "__main__":
    with one_sentence_errors():
        main()
