"""Does a run that is killed again and again end like one that was left alone? Counts the losses; none is expected.

    python benchmarks/crash_resume.py --kills 50 --output crash_resume.json

The flagship script trains the tiny checkpoint on rendered clips. Half of the kills come from outside after a random
time (`kill -9`), half strike at a random operation on a file of the run (opening, renaming, removing), so that the
writing of checkpoints, of metrics and of the final report is hit often. After each kill the run goes on with
`--resume_from_checkpoint latest`; after a few of them it is left to finish, and its adapter, its last checkpoint, its
metrics (without times), its validation losses, its best adapter, its effect and its samples must be those of the
reference, to the byte.

Every start is a process of its own, forked from one that has imported the libraries, which would else be most of the
time.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
SETTINGS = {
    "preset": "smoke",
    "pretrained_model_name_or_path": "tiny",
    "min_duration_s": 1,
    "max_duration_s": 2,
    "max_train_samples": 4,
    "max_train_steps": 20,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 2,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "rank": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "ema_decay": 0.9,
    "mixed_precision": "no",
    "validation_fraction": 0.25,
    "validation_steps": 4,
    "num_validation_draws": 2,
    "num_validation_samples": 1,
    "validation_duration_s": 2,
    "validation_inference_steps": 1,
}


def start(
    data: Path, output: Path, log: Path, *, strike_at: int | None, counted: Path | None = None
) -> tuple[int, int]:
    """Fork a process that trains or goes on training; returns its id, and a pipe that tells when it trains.

    It kills itself just before the `strike_at`-th operation on a file in `output`; else it writes down in `counted`
    how many there were.
    """
    ready, trains = os.pipe()
    pid = os.fork()
    if pid:
        os.close(trains)
        return pid, ready
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in OPERATIONS or not str(arguments[0]).startswith(str(output)):
            return
        count += 1
        if count == strike_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if "metrics.jsonl" in str(arguments[0]):
            os.write(trains, b".")

    from acestep_pipeline.errors import one_sentence_errors
    from train_ace_step_lora import arguments, train

    flags = {**SETTINGS, "train_data_dir": data, "output_dir": output, "resume_from_checkpoint": "latest"}
    sys.argv = ["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    sys.addaudithook(watch)
    status = 1
    try:
        with one_sentence_errors():
            train(arguments.parse_args())
        status = 0
    finally:
        if counted is not None:
            counted.write_text(str(count))
        sys.stdout.flush()
        os._exit(status)


def wait(pid: int, ready: int, *, kill_after_s: float | None) -> int:
    """Wait for a process, and kill it so long after its training began; returns its status, or -9."""
    if kill_after_s is not None:
        os.read(ready, 1)  # or the end of the pipe, if it has ended without training
        deadline = time.monotonic() + kill_after_s
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                os.close(ready)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(ready)
    return os.waitstatus_to_exitcode(status)


def left_behind(output: Path) -> str:
    """What a killed run was doing, from what it left."""
    if list(output.glob(".partial-checkpoint-*-removed")):
        return "removing a checkpoint"
    if list(output.glob(".partial-checkpoint-*")):
        return "writing a checkpoint"
    if (output / "pytorch_lora_weights.safetensors").exists():
        return "final report"
    if (output / "metrics.jsonl").exists():
        return "training"
    return "starting"


def result(output: Path) -> dict[str, bytes]:
    """What must be equal: every file of a finished run but those that hold times or machine facts."""
    from acestep_pipeline.training.tracking import read_metrics

    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(output / "metrics.jsonl")]
    kept = [path for part in ("samples/*.wav", "checkpoint-*/*", "best/*.safetensors") for path in output.glob(part)]
    names = ("pytorch_lora_weights.safetensors", "validation.jsonl", "effect.json")
    files = [*(output / name for name in names), *kept]
    contents = {str(path.relative_to(output)): path.read_bytes() for path in files}
    leftovers = {str(path.relative_to(output)): b"" for path in output.rglob(".partial*")}
    return {"metrics.jsonl": json.dumps(lines).encode(), **contents, **leftovers}


class Trial:
    """A reference run, and runs that are killed and must come to the same."""

    def __init__(self, work: Path, *, seed: int) -> None:
        from acestep_pipeline.data.demo_music import render_demo_dataset

        self.work, self.random = work, random.Random(seed)
        self.data = work / "clips"
        render_demo_dataset(self.data, duration_s=4.0)
        # The first fills the caches, so that the reference takes as long as those that are killed.
        for name in ("warm-up", "reference"):
            pid, ready = start(self.data, work / name, work / f"{name}.log", strike_at=None, counted=work / "counted")
            os.read(ready, 1)
            began = time.monotonic()
            if wait(pid, ready, kill_after_s=None):
                raise SystemExit(f"the {name} run failed:\n{(work / f'{name}.log').read_text()}")
        self.training_s = time.monotonic() - began
        self.operations = int((work / "counted").read_text())
        self.expected = result(work / "reference")

    def kill_one_run(self, number: int, kills: int) -> tuple[Counter, list[str]]:
        """Kill one run up to `kills` times, let it finish, and compare it; returns what was hit, and the losses."""
        output, log = self.work / f"run-{number}", self.work / f"run-{number}.log"
        hit: Counter = Counter()
        while True:
            last = hit.total() == kills
            from_outside = self.random.random() < 0.5
            strike_at = None if last or from_outside else self.random.randint(1, self.operations)
            after_s = self.random.uniform(0, self.training_s) if from_outside and not last else None
            status = wait(*start(self.data, output, log, strike_at=strike_at), kill_after_s=after_s)
            if status == -signal.SIGKILL:
                hit[left_behind(output)] += 1
                continue
            if status:
                return hit, [f"run {number} can't go on: {log.read_text()[-300:]}"]
            found = result(output)
            names = sorted(self.expected.keys() | found.keys())
            return hit, [f"run {number}: {name}" for name in names if self.expected.get(name) != found.get(name)]


def main(input_args=None) -> int:
    """Kill, compare, print and write the result; returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how many in all")
    parser.add_argument("--kills-a-run", type=int, default=5, help="at most so many before a run is left to finish")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args(input_args)
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        os.environ["ACESTEP_CACHE_DIR"] = str(Path(work) / "cache")
        import_libraries()
        trial = Trial(Path(work), seed=args.seed)
        hit, losses, runs = Counter(), [], 0
        while hit.total() < args.kills:
            found, lost = trial.kill_one_run(runs, min(args.kills_a_run, args.kills - hit.total()))
            hit, losses, runs = hit + found, losses + lost, runs + 1
            print(f"{hit.total()} kills, {runs} runs, {len(losses)} losses", *lost, sep="\n  ", flush=True)
    report = {
        "kills": hit.total(),
        "runs": runs,
        "losses": losses,
        "killed_while": dict(hit.most_common()),
        "files_compared": len(trial.expected),
        "operations_on_files_in_a_run": trial.operations,
        "seed": args.seed,
        "seconds": round(time.monotonic() - began),
        "settings": SETTINGS,
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
    }
    print(json.dumps(report, indent=1))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if losses else 0


def import_libraries() -> None:
    """All that the script imports, once, before the forks."""
    import train_ace_step_lora  # noqa: F401
    from acestep_pipeline.training import checkpointing, final_report, setup, validation  # noqa: F401


if __name__ == "__main__":
    raise SystemExit(main())
