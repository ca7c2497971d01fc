"""Checkpoints: everything resume needs, in safetensors and JSON, complete once it has its final name.

No random state is saved: order, noise, timesteps, windows and dropout are keyed by (seed, update) (`data.batching`).
"""

import copy
import json
import os
import shutil
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from ..adapters import save_lora
from ..errors import RunError, UsageError
from ..files import write_tensors
from ..paths import LORA_WEIGHTS_NAME
from .optimization import averaged_weights
from .run_directory import CHECKPOINT_PREFIX, STATE_NAME, describe_kept, list_checkpoints

OPTIMIZER_NAME = "optimizer.safetensors"


def save_checkpoint(
    output_dir: Path,
    *,
    update: int,
    transformer: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler | None,
    settings: dict,
    total_limit: int | None,
) -> Path:
    """Write `checkpoint-<update>` under a temporary name, rename it, then remove the oldest beyond `total_limit`.

    Call it on the main process. The folder is a loadable adapter as well.

    Raises:
        RunError: the adapter has NaN or infinite weights; nothing is written or removed then.
    """
    if not all(parameter.isfinite().all() for parameter in transformer.parameters() if parameter.requires_grad):
        raise RunError(
            f"update {update} made the adapter's weights NaN or infinite; try a lower --learning_rate. "
            f"{describe_kept(output_dir)}"
        )
    final = Path(output_dir) / f"{CHECKPOINT_PREFIX}{update}"
    temporary = Path(output_dir) / f".partial-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with averaged_weights(optimizer):
        save_lora(transformer, temporary)
        tensors, values = _flatten(optimizer.state_dict())
    write_tensors(temporary / OPTIMIZER_NAME, tensors)
    state = {
        "update": update,
        "settings": settings,
        "optimizer": values,
        "lr_scheduler": lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    (temporary / STATE_NAME).write_text(json.dumps(state, indent=1))
    if final.exists():  # an interrupted run that was resumed from an older checkpoint passes here again
        shutil.rmtree(final)
    os.replace(temporary, final)
    if total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    return final


def load_checkpoint(
    checkpoint: Path,
    *,
    transformer: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler | None,
) -> int:
    """Restore adapter, optimizer, schedule and scaler in place; returns the number of updates done."""
    state = json.loads((checkpoint / STATE_NAME).read_text())
    weights = load_file(checkpoint / LORA_WEIGHTS_NAME)
    adapter = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    with averaged_weights(optimizer):
        result = set_peft_model_state_dict(transformer, adapter)
        if result.unexpected_keys:
            raise UsageError(f"{checkpoint} has weights for modules this adapter lacks: {result.unexpected_keys[:3]}.")
        optimizer.load_state_dict(_unflatten(load_file(checkpoint / OPTIMIZER_NAME), state["optimizer"]))
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    return state["update"]


def check_same_settings(checkpoint: Path, settings: dict) -> None:
    """Refuse to continue a run under other settings than it was started with.

    Raises:
        UsageError: names every difference.
    """
    saved = json.loads((checkpoint / STATE_NAME).read_text())["settings"]
    settings = json.loads(json.dumps(settings))
    differences = [
        f"{name} was {saved.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted(saved.keys() | settings.keys())
        if saved.get(name) != settings.get(name)
    ]
    if differences:
        raise UsageError(
            f"{checkpoint} was made by other settings: {'; '.join(differences)}. Use the same settings to resume, "
            "or another --output_dir for a new run."
        )


def _flatten(state_dict: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """An optimizer's state as tensors named `<parameter>.<name>`, and everything else as JSON values.

    bitsandbytes keeps part of a parameter's state in a dict of its own: those are `<parameter>.<group>.<name>`.
    """
    tensors: dict[str, torch.Tensor] = {}

    def plain(values: dict, prefix: str) -> dict:
        """The JSON values of a parameter's state; its tensors go to `tensors`."""
        kept = {}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                # A copy: parameters may share one tensor (bitsandbytes' quantisation maps), which safetensors refuses.
                tensors[f"{prefix}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                kept[name] = plain(value, f"{prefix}.{name}") if isinstance(value, dict) else value
        return kept

    state = {str(index): plain(values, str(index)) for index, values in state_dict["state"].items()}
    return tensors, {"param_groups": state_dict["param_groups"], "state": state}


def _unflatten(tensors: dict[str, torch.Tensor], values: dict) -> dict:
    state = copy.deepcopy(values["state"])
    for key, tensor in tensors.items():
        *path, name = key.split(".")
        entries = state
        for part in path:
            entries = entries[part]
        entries[name] = tensor
    return {
        "state": {int(index): entries for index, entries in state.items()},
        "param_groups": values["param_groups"],
    }
