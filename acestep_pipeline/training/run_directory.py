"""The directory a run leaves behind: whether it may be used, what in it belongs to a run, where its checkpoints are.

Nothing here imports torch: a wrong flag should not cost its seconds.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import RunError, UsageError
from ..files import sha256, write_text
from ..paths import (
    COMFYUI_DIR,
    COMFYUI_ENDING,
    LORA_WEIGHTS_NAME,
    PEFT_CONFIG_NAME,
    PEFT_DIR,
    PEFT_WEIGHTS_NAME,
    probe_writable,
)
from .directory_lock import check_not_held
from .launch import is_first_process
from .manifest import MANIFEST_NAME, find_damage

METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"
ARGS_NAME = "training_args.json"
CARD_NAME = "README.md"
PLOT_NAME = "loss.png"
EFFECT_NAME = "effect.json"
NORMS_PLOT_NAME = "update_norms.png"
# What the final report writes, and others may, too.
REPORT_NAMES = (CARD_NAME, PLOT_NAME, EFFECT_NAME, NORMS_PLOT_NAME)
SAMPLES_DIR = "samples"
PREVIEW_PREFIX = "preview-"
# The adapter at the lowest validation loss.
BEST_DIR = "best"
CHECKPOINT_PREFIX = "checkpoint-"
PARTIAL_PREFIX = ".partial-"
STATE_NAME = "trainer_state.json"
# The command of a run whose adapter and report are complete, and the adapter's hash.
FINISHED_NAME = "finished.json"


def check_run_directory(output_dir: Path, *, resuming: bool, overwrite: bool) -> None:
    """Refuse an output directory that can't be written, where another run is at work, or that holds files which
    a run would replace.

    Only the first process of a run tries to write, as only that one will: the others would see its traces come and go.

    Raises:
        UsageError: with the flag that helps.
    """
    try:
        if is_first_process():
            probe_writable(output_dir)
            check_not_held(output_dir)
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
    taken = [name for name in REPORT_NAMES if (output_dir / name).exists()]
    if taken and not holds_run:
        raise UsageError(
            f"--output_dir {output_dir} has a {taken[0]} that is not a run's and would be replaced; name another "
            "directory, or replace it with --overwrite_output_dir."
        )


def _run_folders(output_dir: Path) -> list[Path]:
    return [*list_checkpoints(output_dir), *output_dir.glob(f"{PARTIAL_PREFIX}{CHECKPOINT_PREFIX}*")]


def _run_files(output_dir: Path) -> list[Path]:
    """What every run writes and nobody else would."""
    return [output_dir / name for name in (METRICS_NAME, ARGS_NAME, LORA_WEIGHTS_NAME, FINISHED_NAME)]


def _all_files(output_dir: Path) -> list[Path]:
    """What a run may write beside its checkpoints and samples, whether it is there or not."""
    others = (*REPORT_NAMES, VALIDATION_NAME, f"{BEST_DIR}/{LORA_WEIGHTS_NAME}")
    exported = (f"{PEFT_DIR}/{PEFT_WEIGHTS_NAME}", f"{PEFT_DIR}/{PEFT_CONFIG_NAME}")
    named = output_dir.glob(f"{COMFYUI_DIR}/*{COMFYUI_ENDING}")
    return [*_run_files(output_dir), *(output_dir / name for name in (*others, *exported)), *named]


def clear_run(output_dir: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for path in _run_folders(output_dir):
        shutil.rmtree(path, ignore_errors=True)
    _clear_half_written(output_dir)
    samples = output_dir / SAMPLES_DIR
    for folder in samples.glob(f"{PREVIEW_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (*_all_files(output_dir), *samples.glob("sample-*_with*_adapter.wav")):
        file.unlink(missing_ok=True)
    for folder in (samples, *(output_dir / name for name in (BEST_DIR, PEFT_DIR, COMFYUI_DIR))):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def list_checkpoints(output_dir: Path, *, up_to: int | None = None) -> list[Path]:
    """Folders with a checkpoint's name in `output_dir`, oldest first; with `up_to`, none of a later update."""
    found = {
        int(number): path
        for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*")
        if (number := path.name.removeprefix(CHECKPOINT_PREFIX)).isdigit() and path.is_dir()
    }
    return [found[update] for update in sorted(found) if up_to is None or update <= up_to]


def partial_name(checkpoint: Path) -> Path:
    """Where a checkpoint lies while it is being written or removed."""
    return checkpoint.with_name(f"{PARTIAL_PREFIX}{checkpoint.name}")


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that no kill leaves half of it under that."""
    doomed = checkpoint.with_name(f"{PARTIAL_PREFIX}{checkpoint.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def clear_leftovers(output_dir: Path, *, update: int) -> list[Path]:
    """Before a run goes on after `update`: remove what a killed one left half-written, and later checkpoints.

    These are damaged, or the user went back behind them; their updates are about to be repeated.

    Returns:
        The checkpoints that were removed.
    """
    (output_dir / FINISHED_NAME).unlink(missing_ok=True)
    _clear_half_written(output_dir)
    kept = set(list_checkpoints(output_dir, up_to=update))
    later = [path for path in list_checkpoints(output_dir) if path not in kept]
    for path in reversed(later):
        discard(path)
    return later


def _clear_half_written(output_dir: Path) -> None:
    for partial in output_dir.glob(f"{PARTIAL_PREFIX}{CHECKPOINT_PREFIX}*"):
        shutil.rmtree(partial)
    for file in _all_files(output_dir):
        for partial in file.parent.glob(f"{PARTIAL_PREFIX}{file.name}*"):
            shutil.rmtree(partial)
    previews = f"{SAMPLES_DIR}/{PARTIAL_PREFIX}{PREVIEW_PREFIX}*"
    for pattern in (
        previews,
        f"{SAMPLES_DIR}/{PARTIAL_PREFIX}sample-*",
        f"{COMFYUI_DIR}/{PARTIAL_PREFIX}*{COMFYUI_ENDING}-*",
    ):
        for partial in output_dir.glob(pattern):
            shutil.rmtree(partial)


def mark_finished(output_dir: Path, command: dict) -> None:
    """Note, after the final report, that `command` (the arguments as they were given) has nothing left to do."""
    with naming_failed_writes(output_dir, FINISHED_NAME):
        write_text(output_dir / FINISHED_NAME, json.dumps(_completion(output_dir, command), indent=1))


def nothing_left_to_do(output_dir: Path, command: dict) -> bool:
    """Whether the same command has finished here, and its adapter is still the one it wrote; says so if it is.

    Several machines may not see the same directory: they agree on the checkpoint instead.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if os.environ.get("LOCAL_WORLD_SIZE", processes) != processes:
        return False
    try:
        finished = json.loads((output_dir / FINISHED_NAME).read_text(encoding="utf-8"))
        if finished != _completion(output_dir, command):
            return False
    except (OSError, ValueError):
        return False
    if is_first_process():
        _clear_half_written(output_dir)
        print(f"The run in {output_dir} is finished: nothing is left to do.")
    return True


def _completion(output_dir: Path, command: dict) -> dict:
    ignored = ("resume_from_checkpoint", "overwrite_output_dir", "debug")
    given = {name: str(value) for name, value in command.items() if name not in ignored}
    return {"adapter_sha256": sha256(output_dir / LORA_WEIGHTS_NAME), "command": given}


def describe_kept(output_dir: Path) -> str:
    """What a run that fails now leaves to resume from, for its error."""
    checkpoints = list_checkpoints(output_dir)
    return f"Kept: {checkpoints[-1] if checkpoints else 'no checkpoint yet'}."


@contextlib.contextmanager
def naming_failed_writes(output_dir: Path, name: str) -> Iterator[None]:
    """Turn a write into a run's directory that fails, such as on a full disk, into a sentence that says how to go on.

    `name` is the file's, in `output_dir`; one that the error knows itself counts more.

    Raises:
        RunError: instead of `OSError` and `SafetensorError`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        path = getattr(error, "filename", None) or Path(output_dir) / name
        raise RunError(
            f"{path} can't be written ({getattr(error, 'strerror', None) or error}); make room and continue with "
            f"--resume_from_checkpoint latest. {describe_kept(output_dir)}"
        ) from error


def describe_checkpoint(checkpoint: Path | None) -> str:
    """Its name and what is in it, the same wherever a copy of it lies."""
    return f"{checkpoint.name} ({sha256(checkpoint / MANIFEST_NAME)[:12]})" if checkpoint else "none"


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    """The checkpoint to resume from: for `latest` the newest that is whole (None if there is none), else that path.

    The first process of a machine warns of each newer one that is damaged.

    Raises:
        UsageError: the path is not a checkpoint of this program, or is damaged; or all checkpoints are.
    """
    if resume_from_checkpoint == "latest":
        return _newest_whole(output_dir)
    for path in (Path(resume_from_checkpoint).expanduser(), Path(output_dir) / resume_from_checkpoint):
        if (path / STATE_NAME).is_file():
            if damage := find_damage(path):
                raise UsageError(f"--resume_from_checkpoint {path} is damaged: {damage}; use another, or 'latest'.")
            return path
    raise UsageError(
        f"--resume_from_checkpoint {resume_from_checkpoint} is no checkpoint (no {STATE_NAME} in it); "
        "name a checkpoint-<update> folder, or use 'latest'."
    )


def _newest_whole(output_dir: Path) -> Path | None:
    warnings = []
    for checkpoint in reversed(list_checkpoints(output_dir)):
        damage = find_damage(checkpoint)
        if damage is None:
            if warnings and os.environ.get("LOCAL_RANK", "0") == "0":
                print("\n".join([*warnings, f"warning: using {checkpoint} instead."]), flush=True)
            return checkpoint
        warnings.append(f"warning: {checkpoint} is damaged and not used: {damage}.")
    if warnings:
        raise UsageError(
            f"--resume_from_checkpoint latest: every checkpoint in {output_dir} is damaged; {warnings[0][9:-1]}. "
            "Start from the beginning with --overwrite_output_dir and without --resume_from_checkpoint."
        )
    return None
