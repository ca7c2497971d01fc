#!/usr/bin/env python
"""What publishing checkpoints costs the updates meanwhile: in a process of its own (the trainer's way), in a thread.

    python benchmarks/uploading.py

Both are compared with updates beside which nothing is sent, by turns. The server is a real one (SeaweedFS) on this
machine, at low priority, as is the process that sends. An update is the forward and backward pass of the embedded
checkpoint's DiT: hundreds of small operations, which wait for Python as a GPU's do. Where cores are few or busy, the
ratios hold the server's share of them too, and say little beyond which way is the better one.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.storage.publishing import publish
from acestep_pipeline.training.manifest import seal
from acestep_pipeline.training.uploading import Uploads
from tests.s3_server import S3Folder, running_s3_server

WAYS = ("none", "process", "thread")


def one_update(transformer: torch.nn.Module) -> None:
    """Forward and backward, batch 1, two seconds of latents."""
    config = transformer.config
    channels = config.in_channels // 3
    velocity = transformer(
        hidden_states=torch.randn(1, 50, channels),
        timestep=torch.full((1,), 0.5),
        timestep_r=torch.full((1,), 0.5),
        encoder_hidden_states=torch.randn(1, 16, config.encoder_hidden_size or config.hidden_size),
        context_latents=torch.randn(1, 50, 2 * channels),
        return_dict=False,
    )[0]
    velocity.square().sum().backward()


def checkpoint(folder: Path, number: int, size: int) -> Path:
    """A sealed folder with a file of random bytes, so that none of it is there already."""
    made = folder / f"checkpoint-{number}"
    made.mkdir(parents=True)
    (made / "optimizer.safetensors").write_bytes(os.urandom(size))
    seal(made)
    return made


def measure(way: str, number: int, transformer: torch.nn.Module, url: str, size: int, seconds: float) -> list[float]:
    """The seconds of each update while one checkpoint after the other is sent."""
    with tempfile.TemporaryDirectory() as folder:
        made = checkpoint(Path(folder), number, size)
        uploads = Uploads(f"{url}/{number}" if way == "process" else None, Path(folder))
        uploads.add_checkpoint(made)
        thread = threading.Thread(
            target=publish,
            args=(made, f"{url}/{number}"),
            kwargs={"include_checkpoints": True, "show_progress": False},
        )
        if way == "thread":
            thread.start()
        times, end = [], time.monotonic() + seconds
        while time.monotonic() < end and (way != "thread" or thread.is_alive()):
            begun = time.perf_counter()
            one_update(transformer)
            times.append(time.perf_counter() - begun)
            if way == "process" and not uploads.is_busy():
                break
        if way == "thread":
            thread.join()
        if failed := uploads.finish(120):
            raise SystemExit(failed)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of updates in each turn at most")
    parser.add_argument("--megabytes", type=int, default=256, help="of each checkpoint")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformer = ACEStepPipeline.from_pretrained("tiny").transformer.train()
    for _ in range(20):
        one_update(transformer)
    medians: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder, running_s3_server(Path(folder)) as server:
        os.environ.update(server.environment)
        url = S3Folder(server).url
        for process in psutil.Process().children(recursive=True):
            process.nice(19)
        for turn in range(args.rounds):
            for place, way in enumerate(WAYS[turn % 3 :] + WAYS[: turn % 3]):
                size = args.megabytes * 10**6
                times = measure(way, 3 * turn + place, transformer, url, size, args.seconds)
                medians[way].append(statistics.median(times))
    ratios = {
        way: statistics.median(
            with_it / without for with_it, without in zip(medians[way], medians["none"], strict=True)
        )
        for way in WAYS[1:]
    }
    result = {
        "update_ms_without": round(1000 * statistics.median(medians["none"]), 2),
        "ratio_process": round(ratios["process"], 3),
        "ratio_thread": round(ratios["thread"], 3),
        "rounds": args.rounds,
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(each, 1) for each in os.getloadavg()],
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
