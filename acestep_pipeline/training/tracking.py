"""What a run writes down: `metrics.jsonl`, `training_args.json`, and the facts that make it repeatable."""

import importlib.util
import json
import math
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from ..errors import UsageError
from ..files import write_text
from ..version import __version__

METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"
ARGS_NAME = "training_args.json"
TRACKERS = ("tensorboard", "wandb", "trackio")
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy", "soundfile", "soxr")


class MetricsFile:
    """`metrics.jsonl`, one line an optimizer update, or `validation.jsonl`, one a validation; flushed as written."""

    def __init__(self, output_dir: Path, *, first_update: int, name: str = METRICS_NAME) -> None:
        """Open for appending after update `first_update`; lines of later updates, from a run that was cut off beyond
        its last checkpoint, are dropped, since they are about to be repeated."""
        path = Path(output_dir) / name
        kept = [line for line in read_metrics(path) if line["update"] <= first_update] if path.is_file() else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        # What the run has taken up to here, where the lines say it.
        self.seconds = kept[-1].get("seconds", 0.0) if kept else 0.0
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict) -> None:
        """Append one update's values; NaN and infinity, which JSON lacks, become null."""
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def flush_to_disk(self) -> None:
        """Before a checkpoint: a power cut must not lose the lines of updates that no run will repeat."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The complete lines of a metrics file; a half-written last line is left out."""
    lines = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def write_training_args(output_dir: Path, *, arguments: dict, facts: dict) -> None:
    """Write `training_args.json`: every resolved argument, and facts about model, data, code and machine."""
    content = {"arguments": arguments, **facts, **environment_facts()}
    write_text(Path(output_dir) / ARGS_NAME, json.dumps(content, indent=2, default=str) + "\n")


def plain_values(values: dict) -> dict:
    """Values as every tracker takes them: numbers, booleans and text."""
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in values.items()
    }


def environment_facts() -> dict:
    """Versions, platform and the git commit of this code (None outside a checkout)."""
    return {
        "ace_step_lora": __version__,
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "platform": platform.platform(),
    }


def git_commit() -> str | None:
    """Commit of the checkout this code runs from, with `-dirty` if it has changes."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def check_trackers(report_to: str) -> None:
    """Refuse an unknown tracker, or one that isn't installed; `none` is fine.

    Raises:
        UsageError: names the extra to install.
    """
    if report_to == "none":
        return
    if report_to not in TRACKERS:
        raise UsageError(f"--report_to must be one of none, {', '.join(TRACKERS)}, not {report_to!r}.")
    if importlib.util.find_spec(report_to) is None:
        raise UsageError(f"--report_to {report_to} needs an extra: pip install 'ace-step-lora[{report_to}]'.")
