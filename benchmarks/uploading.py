#!/usr/bin/env python
"""What publishing checkpoints costs the updates meanwhile.

    python benchmarks/uploading.py

While checkpoints are sent as the trainer sends them, the process that sends is stopped and let go on by turns of some
updates, and the turns beside each other are compared: a machine's speed drifts by more than what is measured. The
server is a real one (SeaweedFS) on this machine. The thread of the updates has a core to itself, as it has beside a
GPU; the server and the process that sends have the others. An update is the forward and backward pass of the embedded
checkpoint's DiT: hundreds of small operations, which wait for Python as a GPU's do.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.errors import RunError, UsageError, one_sentence_errors
from acestep_pipeline.files import write_text
from acestep_pipeline.progress import progress_bar
from acestep_pipeline.training.manifest import seal
from acestep_pipeline.training.uploading import Uploads
from benchmarks.pages import write_tables
from benchmarks.results_file import ROOT
from benchmarks.training_measure import spread
from tests.s3_server import S3Folder, running_s3_server

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "uploading.json", ROOT / "docs" / "storage.md"
UPDATES_A_TURN = 10


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


def sender() -> psutil.Process | None:
    """The process that sends, if there is one."""
    for child in psutil.Process().children():
        if "acestep_pipeline.training.sending" in child.cmdline():
            return child
    return None


def turn(transformer: torch.nn.Module) -> float:
    """Milliseconds of an update, on the mean of a turn."""
    begun = time.perf_counter()
    for _ in range(UPDATES_A_TURN):
        one_update(transformer)
    return 1000 * (time.perf_counter() - begun) / UPDATES_A_TURN


def measure(transformer: torch.nn.Module, uploads: Uploads) -> list[tuple[float, float]]:
    """(with, without) of each pair of turns until what was added is sent, in the one order and the other."""
    pairs = []
    while (process := sender()) is None:
        time.sleep(0.01)
    time.sleep(1)  # its imports
    with contextlib.suppress(psutil.NoSuchProcess):
        while uploads.is_busy():
            taken = {}
            for sends in (True, False) if len(pairs) % 2 else (False, True):
                process.send_signal(signal.SIGCONT if sends else signal.SIGSTOP)
                taken[sends] = turn(transformer)
            process.send_signal(signal.SIGCONT)
            pairs.append((taken[True], taken[False]))
    return pairs[:-1]  # in the last it may have ended


def main() -> None:
    """Measure, and write the results file and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=16, help="one after the other (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=512, help="of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="only say whether the page is what the results say")
    args = parser.parse_args()
    if not args.check:
        result = measure_all(args.checkpoints, args.megabytes)
        print(json.dumps(result, indent=1))
        write_text(args.output, json.dumps(result, indent=1) + "\n")
    if args.output == RESULTS:
        result = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_tables("benchmarks/uploading.py", sentence(result), page=PAGE, check=args.check)


def sentence(result: dict) -> str:
    """What it comes to, for the page."""
    return (
        "Updates that take {update_ms_without[median]:.0f} ms take {ratio[median]:.3f} times that meanwhile "
        "(95 % interval of the median of {pairs} pairs of turns: {low:.3f}–{high:.3f}; `benchmarks/uploading.py`), "
        "and to hand over a checkpoint of {megabytes} MB takes {add_checkpoint_ms:.1f} ms."
    ).format(**result, **result["ratio_interval"])


def median_interval(values: list[float]) -> dict[str, float]:
    """A 95 % interval of the median, by order statistics (the binomial's normal approximation)."""
    ranked, reach = sorted(values), round(0.98 * len(values) ** 0.5)
    middle = len(values) // 2
    return {"low": round(ranked[middle - reach], 4), "high": round(ranked[middle + reach], 4)}


def measure_all(checkpoints: int, megabytes: int) -> dict:
    """All of it, as the results file has it."""
    torch.set_num_threads(1)
    own, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise UsageError("it needs two cores, one of them for the updates alone.")
    transformer = ACEStepPipeline.from_pretrained("tiny").transformer.train()
    pairs, added_ms = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.sched_setaffinity(0, others)  # what this thread starts is on these, too
        with running_s3_server(Path(folder)) as server:
            os.environ.update(server.environment)
            url = S3Folder(server).url
            for number in progress_bar(iterable=range(checkpoints), desc="Checkpoints", unit="checkpoint"):
                run = Path(folder, f"run-{number}")
                made = checkpoint(run, number, megabytes * 10**6)
                uploads = Uploads(f"{url}/{number}", run)
                begun = time.perf_counter()
                uploads.add_checkpoint(made)
                added_ms.append(1000 * (time.perf_counter() - begun))
                os.sched_setaffinity(0, {own})
                pairs += measure(transformer, uploads)
                os.sched_setaffinity(0, others)
                if failed := uploads.finish(120):
                    raise RunError(failed)
    ratios = [with_it / without for with_it, without in pairs]
    return {
        "update_ms_without": spread([without for _, without in pairs]),
        "ratio": spread(ratios, digits=4),
        "ratio_interval": median_interval(ratios),
        "pairs": len(pairs),
        "checkpoints": checkpoints,
        "megabytes": megabytes,
        "add_checkpoint_ms": round(statistics.median(added_ms), 1),
        "cores": len(others) + 1,
    }


if __name__ == "__main__":
    with one_sentence_errors():
        main()
