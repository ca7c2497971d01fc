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
from .run_directory import ARGS_NAME, METRICS_NAME, naming_failed_writes

TRACKERS = ("tensorboard", "wandb", "trackio")
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy", "soundfile", "soxr")


class MetricsFile:
    """`metrics.jsonl`, one line an optimizer update, or `validation.jsonl`, one a validation; written at once.

    Every method raises `RunError` where the disk is full; what could be written of a line is taken back.
    """

    def __init__(self, output_dir: Path, *, first_update: int, name: str = METRICS_NAME) -> None:
        """Open for appending after update `first_update`; lines of later updates, from a run that was cut off beyond
        its last checkpoint, are dropped, since they are about to be repeated."""
        self._place = Path(output_dir), name
        path = Path(output_dir) / name
        kept = [line for line in read_metrics(path) if line["update"] <= first_update] if path.is_file() else []
        # What the run has taken up to here, where the lines say it.
        self.seconds = kept[-1].get("seconds", 0.0) if kept else 0.0
        with naming_failed_writes(*self._place):
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("ab", buffering=0)

    def write(self, line: dict) -> None:
        """Append one update's values; NaN and infinity, which JSON lacks, become null."""
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        content, before = (json.dumps(finite) + "\n").encode(), self._file.tell()
        with naming_failed_writes(*self._place):
            try:
                while content:  # a disk that is nearly full takes a part first, and only then refuses
                    content = content[self._file.write(content) :]
            except OSError:
                self._file.truncate(before)
                raise

    def flush_to_disk(self) -> None:
        """Before a checkpoint: a power cut must not lose the lines of updates that no run will repeat."""
        with naming_failed_writes(*self._place):
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
    with naming_failed_writes(output_dir, ARGS_NAME):
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
