"""The directory a run leaves behind: whether it may be used, what in it belongs to a run, where its checkpoints are.

Nothing here imports torch: a wrong flag should not cost its seconds.
"""

import os
import shutil
from pathlib import Path

from ..errors import UsageError
from ..paths import LORA_WEIGHTS_NAME, probe_writable
from .tracking import ARGS_NAME, METRICS_NAME

CARD_NAME = "README.md"
PLOT_NAME = "loss.png"
SAMPLES_DIR = "samples"
CHECKPOINT_PREFIX = "checkpoint-"
# Written last: a checkpoint is a folder that has it.
STATE_NAME = "trainer_state.json"


def check_run_directory(output_dir: Path, *, resuming: bool, overwrite: bool) -> None:
    """Refuse an output directory that can't be written, or that holds files which a run would replace.

    Only the first process of a run tries to write, as only that one will: the others would see its traces come and go.

    Raises:
        UsageError: with the flag that helps.
    """
    try:
        if os.environ.get("RANK", "0") == "0":
            probe_writable(output_dir)
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} can't be written ({error.strerror}); choose another.") from error
    if overwrite or not output_dir.is_dir():
        return
    try:
        holds_run = bool(_run_folders(output_dir)) or any(file.exists() for file in _run_files(output_dir))
    except FileNotFoundError:
        return  # it was the trace of the first process's try
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
    return [*list_checkpoints(output_dir), *output_dir.glob(".partial-checkpoint-*")]


def _run_files(output_dir: Path) -> list[Path]:
    """What every run writes and nobody else would."""
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


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints in `output_dir`, oldest first."""
    found = [
        path
        for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*")
        if path.name.removeprefix(CHECKPOINT_PREFIX).isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT_PREFIX)))


def describe_kept(output_dir: Path) -> str:
    """What a run that fails now leaves to resume from, for its error."""
    checkpoints = list_checkpoints(output_dir)
    return f"Kept: {checkpoints[-1] if checkpoints else 'no checkpoint yet'}."


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    """The checkpoint to resume from: the newest for `latest` (None if there is none yet), else the path given.

    Raises:
        UsageError: the path is not a checkpoint of this program.
    """
    if resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    for path in (Path(resume_from_checkpoint).expanduser(), Path(output_dir) / resume_from_checkpoint):
        if (path / STATE_NAME).is_file():
            return path
    raise UsageError(
        f"--resume_from_checkpoint {resume_from_checkpoint} is no checkpoint (no {STATE_NAME} in it); "
        "name a checkpoint-<update> folder, or use 'latest'."
    )
