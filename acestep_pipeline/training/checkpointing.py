"""Checkpoints: everything resume needs, in safetensors and JSON, complete once it has its final name.

No random state is saved: order, noise, timesteps, windows and dropout are keyed by (seed, update) (`data.batching`).
"""

import json
import os
import shutil
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..adapters.trainable import save_lora
from ..errors import RunError, UsageError
from ..files import flush_to_disk, write_tensors
from ..paths import LORA_WEIGHTS_NAME
from .manifest import seal
from .optimization import averaged_weights
from .plain_state import join_state, split_state
from .run_directory import (
    CHECKPOINT_PREFIX,
    STATE_NAME,
    describe_kept,
    discard,
    list_checkpoints,
    partial_name,
)


def is_due(done: int, *, per_epoch: int, every_updates: int | None, every_epochs: int | None) -> bool:
    """Whether there is a checkpoint after update `done`: every so many updates, and every so many epochs."""
    intervals = [every_updates, every_epochs and every_epochs * per_epoch]
    return any(interval and done % interval == 0 for interval in intervals)


def save_checkpoint(
    output_dir: Path,
    *,
    update: int,
    transformer: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict,
    total_limit: int | None,
    **others,
) -> Path:
    """Write `checkpoint-<update>` under a temporary name, rename it, then remove the oldest beyond `total_limit`.

    Call it on the main process. The folder is a loadable adapter as well. `others` are what else a run consists of:
    anything with `state_dict()` and `load_state_dict()` (schedule, scaler, ...), or None.

    Raises:
        RunError: the adapter has NaN or infinite weights, or the disk is full; older checkpoints are as they were.
    """
    if not all(parameter.isfinite().all() for parameter in transformer.parameters() if parameter.requires_grad):
        raise RunError(
            f"update {update} made the adapter's weights NaN or infinite; try a lower --learning_rate. "
            f"{describe_kept(output_dir)}"
        )
    parts = {"optimizer": optimizer, **others}
    final = Path(output_dir) / f"{CHECKPOINT_PREFIX}{update}"
    temporary = partial_name(final)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with averaged_weights(optimizer):
            save_lora(transformer, temporary)
            values = {name: _write_part(temporary, name, part) for name, part in parts.items()}
        state = {"update": update, "settings": settings, "parts": values}
        (temporary / STATE_NAME).write_text(json.dumps(state, indent=1))
        seal(temporary)
        if final.exists():  # a run that was resumed from an older checkpoint passes here again
            discard(final)
        os.replace(temporary, final)
        flush_to_disk(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"{final} can't be written ({error}); make room and continue with --resume_from_checkpoint latest. "
            f"{describe_kept(output_dir)}"
        ) from error
    if total_limit is not None:
        for old in list_checkpoints(output_dir, up_to=update)[:-total_limit]:
            discard(old)
    return final


def load_checkpoint(
    checkpoint: Path, *, transformer: torch.nn.Module, optimizer: torch.optim.Optimizer, **others
) -> int:
    """Restore what `save_checkpoint` was given, in place; returns the number of updates done."""
    state = json.loads((checkpoint / STATE_NAME).read_text())
    weights = load_file(checkpoint / LORA_WEIGHTS_NAME)
    adapter = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    with averaged_weights(optimizer):
        result = set_peft_model_state_dict(transformer, adapter)
        if result.unexpected_keys:
            raise UsageError(f"{checkpoint} has weights for modules this adapter lacks: {result.unexpected_keys[:3]}.")
        for name, part in {"optimizer": optimizer, **others}.items():
            if part is not None and state["parts"].get(name) is not None:
                file = _part_file(checkpoint, name)
                part.load_state_dict(join_state(load_file(file) if file.exists() else {}, state["parts"][name]))
    return state["update"]


def saved_setting(checkpoint: Path, name: str):
    """What `name` was in the run that wrote `checkpoint`; None if it was not noted.

    A run that is made longer keeps what followed from its length when it began.
    """
    return json.loads((checkpoint / STATE_NAME).read_text())["settings"].get(name)


def check_same_settings(checkpoint: Path, settings: dict) -> None:
    """Refuse to continue a run under other settings than it was started with.

    Raises:
        UsageError: names every difference.
    """
    saved = json.loads((checkpoint / STATE_NAME).read_text())["settings"]
    settings = json.loads(json.dumps(settings))
    if differences := _differences(saved, settings):
        raise UsageError(
            f"{checkpoint} was made by other settings: {'; '.join(differences)}. Use the same settings to resume, "
            "or another --output_dir for a new run."
        )


def _differences(saved: dict, settings: dict) -> list[str]:
    """What was and is otherwise, within settings of settings, too; long values (all tracks) are cut."""
    found = []
    for name in sorted(saved.keys() | settings.keys()):
        was, now = saved.get(name), settings.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            found += [f"{name}.{difference}" for difference in _differences(was, now)]
        elif was != now:
            found.append(f"{name} was {_cut(was)} and is {_cut(now)}")
    return found


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _part_file(checkpoint: Path, name: str) -> Path:
    return checkpoint / f"{name}.safetensors"


def _write_part(checkpoint: Path, name: str, part) -> dict | None:
    """Write a part's tensors; returns the rest of its state as JSON values."""
    if part is None:
        return None
    tensors, values = split_state(part.state_dict())
    if tensors:
        write_tensors(_part_file(checkpoint, name), tensors)
    return values
