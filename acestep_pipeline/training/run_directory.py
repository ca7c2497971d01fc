"""The directory a run leaves behind: whether it may be used, and what in it belongs to a run."""

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
    """Refuse an output directory that can't be written, or that holds another run.

    Raises:
        UsageError: with the flag that helps.
    """
    try:
        probe_writable(output_dir)
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} can't be written ({error.strerror}); choose another.") from error
    if output_dir.is_dir() and not resuming and not overwrite and holds_run(output_dir):
        raise UsageError(
            f"--output_dir {output_dir} already holds a run; continue it with --resume_from_checkpoint latest, "
            "replace it with --overwrite_output_dir, or name another directory."
        )


def holds_run(output_dir: Path) -> bool:
    """Whether a run has written anything here."""
    return bool(list_checkpoints(output_dir)) or any((output_dir / name).exists() for name in RUN_FILES[:3])


def clear_run(output_dir: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for path in (*list_checkpoints(output_dir), *output_dir.glob(".partial-checkpoint-*"), output_dir / SAMPLES_DIR):
        shutil.rmtree(path, ignore_errors=True)
    for name in RUN_FILES:
        (output_dir / name).unlink(missing_ok=True)
