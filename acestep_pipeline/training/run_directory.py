"""The directory a run leaves behind: whether it may be used, and what in it belongs to a run.

Imports of torch wait until there is a directory to look into: a wrong flag should not cost its seconds.
"""

import os
import shutil
from pathlib import Path

from ..errors import UsageError
from ..paths import probe_writable
from .tracking import ARGS_NAME, METRICS_NAME

CARD_NAME = "README.md"
PLOT_NAME = "loss.png"
SAMPLES_DIR = "samples"


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
    if overwrite or not output_dir.is_dir():
        return
    holds_run = bool(_run_folders(output_dir)) or any(file.exists() for file in _run_files(output_dir))
    if holds_run and not resuming:
        raise UsageError(
            f"--output_dir {output_dir} already holds a run; continue it with --resume_from_checkpoint latest, "
            "replace it with --overwrite_output_dir, or name another directory."
        )
    taken = [name for name in (CARD_NAME, PLOT_NAME) if (output_dir / name).exists()]
    if taken and not holds_run:
        raise UsageError(
            f"--output_dir {output_dir} has a {taken[0]} that is not a run's and would be replaced; name another "
            "directory, or replace it with --overwrite_output_dir."
        )


def _run_folders(output_dir: Path) -> list[Path]:
    from .checkpointing import list_checkpoints

    return [*list_checkpoints(output_dir), *output_dir.glob(".partial-checkpoint-*")]


def _run_files(output_dir: Path) -> list[Path]:
    """What every run writes and nobody else would."""
    from ..adapters import LORA_WEIGHTS_NAME

    return [output_dir / name for name in (METRICS_NAME, ARGS_NAME, LORA_WEIGHTS_NAME)]


def clear_run(output_dir: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for path in _run_folders(output_dir):
        shutil.rmtree(path, ignore_errors=True)
    samples = output_dir / SAMPLES_DIR
    own = [*_run_files(output_dir), output_dir / CARD_NAME, output_dir / PLOT_NAME]
    for file in (*own, *samples.glob("sample-*_with*_adapter.wav")):
        file.unlink(missing_ok=True)
    if samples.is_dir() and not any(samples.iterdir()):
        samples.rmdir()
