"""The directory a run leaves behind: whether it may be used, and what in it belongs to a run."""

import os
import shutil
from pathlib import Path

from ..adapters import LORA_WEIGHTS_NAME
from ..errors import UsageError
from ..paths import probe_writable
from .checkpointing import list_checkpoints
from .tracking import ARGS_NAME, METRICS_NAME

CARD_NAME = "README.md"
PLOT_NAME = "loss.png"
SAMPLES_DIR = "samples"
RUN_FILES = (METRICS_NAME, ARGS_NAME, LORA_WEIGHTS_NAME, CARD_NAME, PLOT_NAME)


def check_run_directory(output_dir: Path, *, resuming: bool, overwrite: bool) -> None:
    """Refuse an output directory that can't be written, or that holds files which a run would replace.

    Only the first process of a machine tries to write: the others would see its traces come and go.

    Raises:
        UsageError: with the flag that helps.
    """
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            probe_writable(output_dir)
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} can't be written ({error.strerror}); choose another.") from error
    if output_dir.is_dir() and not resuming and not overwrite and holds_run(output_dir):
        raise UsageError(
            f"--output_dir {output_dir} already holds a run; continue it with --resume_from_checkpoint latest, "
            "replace it with --overwrite_output_dir, or name another directory."
        )
    taken = [name for name in (CARD_NAME, PLOT_NAME) if (output_dir / name).exists()]
    if taken and not overwrite and not holds_run(output_dir):
        raise UsageError(
            f"--output_dir {output_dir} has a {taken[0]} that is not a run's and would be replaced; name another "
            "directory, or replace it with --overwrite_output_dir."
        )


def holds_run(output_dir: Path) -> bool:
    """Whether a run has written anything here."""
    return bool(list_checkpoints(output_dir)) or any((output_dir / name).exists() for name in RUN_FILES[:3])


def clear_run(output_dir: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for path in (*list_checkpoints(output_dir), *output_dir.glob(".partial-checkpoint-*")):
        shutil.rmtree(path, ignore_errors=True)
    samples = output_dir / SAMPLES_DIR
    for file in (*(output_dir / name for name in RUN_FILES), *samples.glob("sample-*_with*_adapter.wav")):
        file.unlink(missing_ok=True)
    if samples.is_dir() and not any(samples.iterdir()):
        samples.rmdir()
