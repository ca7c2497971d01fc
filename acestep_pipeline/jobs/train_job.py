"""A training job: the training script in a process of its own, watched through the files that it writes."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from ..container.command import launcher
from ..errors import RunError, UsageError
from ..files import write_text
from ..training.run_directory import ARGS_NAME, EFFECT_NAME, METRICS_NAME, list_checkpoints
from ..training.tracking import read_metrics
from .places import Places
from .results import check_can_publish, publish_results
from .schema import TrainingJob, training_model
from .training_flags import check_flags, training_flags

# How long a training that was asked to stop may take for its update and its checkpoint. A worker that is being taken
# away has less: then what was written before counts.
STOP_S = 300.0
POLL_S = 0.3
# Progress is told no more often than this, and at least this often while updates are made.
MIN_INTERVAL_S, MAX_INTERVAL_S, SHARE = 2.0, 60.0, 0.005
# The vendors' own keys are no business of the training's.
PRIVATE = ("RUNPOD_", "MODAL_", "SKYPILOT_")
_NEWEST_LINES = 50


def run_training(
    job: TrainingJob, places: Places, *, job_id: str, emit: Callable[[dict], None], stop: threading.Event
) -> dict:
    """Train, tell `emit` how it goes, and publish what came out.

    Args:
        emit: gets `{"event": "progress", "update", "of", "loss", "eta_s", "seconds"}` and other events.
        stop: when it is set the training writes a checkpoint and ends.

    Returns:
        The result: "status" is done, or stopped (the same job goes on from there).

    Raises:
        UsageError: the training refused its input.
        RunError: it failed.
    """
    name = job.name or job_id
    folder, notes = places.output / name, places.output / ".jobs" / name
    if job.upload:
        check_can_publish(places.s3_address(job.upload, "upload"))
    try:
        notes.mkdir(parents=True, exist_ok=True)
        lock = FileLock(notes / "lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UsageError(f"the job {name} is running already; wait for it, or choose another name.") from None
    except OSError as error:
        raise UsageError(f"{notes} can't be written ({error.strerror}); mount a folder there.") from None
    with lock:
        emit({"event": "started", "name": name})
        status, seconds = _watch(_command(job, places, name, notes), folder, notes, job.time_limit_s, emit, stop)
        if status in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            return {"status": "stopped", "task": "train", "name": name, "seconds": seconds, **_last(folder)}
        if status != 0:
            raise (UsageError if status == 2 else RunError)(_error(notes / "log.txt", status))
        result = {"status": "done", "task": "train", "name": name, "seconds": seconds, **_last(folder)}
        effect = json.loads((folder / EFFECT_NAME).read_text("utf-8"))
        result["effect"] = {key: effect[key] for key in ("verdict", "why", "use")}
        if job.upload:
            emit({"event": "uploading"})
            result["results"] = publish_results(folder, job.upload, valid_s=job.links_valid_s)
        return result


def _command(job: TrainingJob, places: Places, name: str, notes: Path) -> list[str]:
    """The training script with the job's flags, on every GPU of the machine."""
    config = None
    if job.lora_config is not None:
        config = notes / "lora_config.json"
        write_text(config, json.dumps(job.lora_config))
    flags = training_flags(job.arguments)
    check_flags(flags, config)
    data = places.readable(job.data, "data", root=places.data, hub="hf://datasets/")
    flags += [f"--train_data_dir={data}"]
    model = training_model(job, places)
    flags += [f"--pretrained_model_name_or_path={model}"] if model else []
    flags += [f"--{field}={value}" for field in ("variant_dir", "revision") if (value := getattr(job, field))]
    flags += [f"--lora_config={config}"] if config else []
    flags += [f"--output_dir={places.output / name}", f"--exp_name={name}"]
    flags += ["--resume_from_checkpoint=latest"] if job.resume else ["--overwrite_output_dir"]
    import torch

    return [*launcher(torch.cuda.device_count()), *flags]


def _watch(
    command: list[str],
    folder: Path,
    notes: Path,
    time_limit_s: int | None,
    emit: Callable[[dict], None],
    stop: threading.Event,
) -> tuple[int, float]:
    """Run the command, tell what its metrics say; its status, and the seconds it took."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PRIVATE)}
    environment["PYTHONUNBUFFERED"] = "1"
    started, metrics = time.monotonic(), Metrics(folder)
    with (notes / "log.txt").open("wb") as log:
        # A group of its own, so that a signal for the worker reaches the training once, from here.
        process = subprocess.Popen(
            command, cwd=notes, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            while (status := process.poll()) is None:
                if time_limit_s is not None and time.monotonic() - started > time_limit_s:
                    emit({"event": "time_limit", "seconds": time_limit_s})
                    stop.set()
                if stop.wait(POLL_S):
                    status = _stop(process)
                    break
                if (progress := metrics.progress()) is not None:
                    emit(progress)
        finally:
            if process.poll() is None:
                _stop(process)
    if (progress := metrics.progress(at_once=True)) is not None:
        emit(progress)
    return status, round(time.monotonic() - started, 1)


def _stop(process: subprocess.Popen) -> int:
    """Have a training write a checkpoint and end; kill it, and what it started, if it takes too long."""
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 128 + signal.SIGTERM
    # Before its loop begins the training dies of the signal, and has nothing to keep.
    return 128 - status if status < 0 else status


class Metrics:
    """What a run's `metrics.jsonl` says, as it grows."""

    def __init__(self, folder: Path) -> None:
        self._path, self._arguments = folder / METRICS_NAME, folder / ARGS_NAME
        self._size = self._path.stat().st_size if self._path.exists() else 0
        self._told_at = self._told = 0.0

    def progress(self, *, at_once: bool = False) -> dict | None:
        """The newest update, if it is time to tell one that was not told yet.

        `eta_s` is the time that the updates to come would take at the pace of the last fifty.
        """
        now = time.monotonic()
        if not at_once and now - self._told_at < MIN_INTERVAL_S:
            return None
        lines = self._newest()
        if not lines or lines[-1]["update"] <= self._told:
            return None
        total, last = self._total(), lines[-1]
        if not at_once and last["update"] - self._told < SHARE * (total or 0) and now - self._told_at < MAX_INTERVAL_S:
            return None
        self._told_at, self._told = now, last["update"]
        made = last["update"] - lines[0]["update"]
        pace = (last["seconds"] - lines[0]["seconds"]) / made if made else None
        return {
            "event": "progress",
            "update": last["update"],
            "of": total,
            "loss": last["loss"],
            "eta_s": None if total is None or pace is None else round((total - last["update"]) * pace, 1),
            "seconds": last["seconds"],
        }

    def _newest(self) -> list[dict]:
        """The last lines that are whole, of a file that has changed since the job began."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size == self._size and not self._told:
                    return []
                file.seek(max(0, size - 400 * _NEWEST_LINES))
                content = file.read()
        except FileNotFoundError:
            return []
        lines = []
        for line in content.splitlines(keepends=True)[-_NEWEST_LINES:]:
            try:
                lines.append(json.loads(line) if line.endswith(b"\n") else None)
            except ValueError:
                continue  # the first may be cut
        return [line for line in lines if line]

    def _total(self) -> int | None:
        try:
            return json.loads(self._arguments.read_text("utf-8"))["arguments"]["num_updates"]
        except (FileNotFoundError, KeyError):
            return None


def _last(folder: Path) -> dict:
    """The last update of a run, and its checkpoints."""
    lines = read_metrics(folder / METRICS_NAME) if (folder / METRICS_NAME).exists() else []
    checkpoints = list_checkpoints(folder) if folder.is_dir() else []
    return {
        "update": lines[-1]["update"] if lines else 0,
        "loss": lines[-1]["loss"] if lines else None,
        "checkpoint": checkpoints[-1].name if checkpoints else None,
    }


def _error(log: Path, status: int) -> str:
    """The sentence with which the training ended."""
    text = log.read_text("utf-8", errors="replace")
    said = re.findall(r"^error(?: \(process \d+\))?: (.*)$", text, flags=re.MULTILINE)
    if said:
        return said[-1]
    if status < 0:
        return f"the training was killed by {signal.Signals(-status).name} (out of memory?); the same job goes on."
    return f"the training failed with status {status}; its last line: {text.strip().splitlines()[-1:] or 'none'}."
