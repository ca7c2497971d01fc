"""What an adapter file is, for a person: kind, ranks, layers, strength of each, where it comes from."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...plots import plot_update_norms
from ...training.update_norms import ModuleNorm, group_by, relative_norm
from .base_weights import BaseWeights
from .deltas import delta_weight, needs_base
from .names import original_name
from .record import KIND_NAMES, Adapter

TRAINING_ARGS_NAME = "training_args.json"
# Of the training's arguments, those that say most.
_SHOWN_ARGUMENTS = (
    "preset", "rank", "lora_alpha", "learning_rate", "num_train_epochs", "max_train_steps", "effective_batch_size",
    "train_data_dir", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Norms:
    """The norms of the layers' differences, where they are known; `relative` to the base weights', or alone."""

    layers: tuple[ModuleNorm, ...]
    relative: bool

    @property
    def values(self) -> dict[str, float]:
        """||dW|| / ||W||, or ||dW||, of each layer."""
        return {norm.name: relative_norm([norm]) for norm in self.layers}


def layer_norms(adapter: Adapter, base: BaseWeights | None = None) -> Norms:
    """How strongly each layer changes; with the base weights, relative to them, and of kinds that need them too."""
    layers = []
    for name, weights in adapter.modules.items():
        if base is None and needs_base(weights):
            continue
        weight = None if base is None else base.layer(name)
        delta = delta_weight(weights, weight, config=adapter.config)
        squared = 1.0 if weight is None else float(weight.double().square().sum())
        layers.append(ModuleNorm(name, float(delta.double().square().sum()), squared))
    return Norms(tuple(layers), relative=base is not None)


def training_arguments(adapter: Adapter) -> dict:
    """What our trainer left beside the file, or beside the folder it is in; {} if nothing is there."""
    if adapter.path is not None:
        for folder in (adapter.path.parent, adapter.path.parent.parent):
            path = folder / TRAINING_ARGS_NAME
            if path.is_file():
                try:
                    return json.loads(path.read_text(encoding="utf-8"))
                except (OSError, ValueError):
                    return {}
    return {}


def base_model(adapter: Adapter) -> str | None:
    """The checkpoint that it says it was trained on."""
    arguments = training_arguments(adapter).get("arguments", {})
    named = arguments.get("pretrained_model_name_or_path") or adapter.config.get("base_model_name_or_path")
    return str(named) if named else adapter.metadata.get("ss_base_model_version")


def describe_adapter(adapter: Adapter, norms: Norms, *, sha256: str | None) -> str:
    """The lines of `acestep-lora adapters info`."""
    ranks = sorted({weights.rank for weights in adapter.modules.values()})
    scales = sorted({round(weights.scale, 6) for weights in adapter.modules.values()})
    kinds = ", ".join(f"{KIND_NAMES[kind]} on {count} layers" for kind, count in adapter.kinds.items())
    blocks = sorted({int(match[1]) for name in adapter.modules if (match := re.match(r"layers\.(\d+)\.", name))})
    targets = sorted({re.sub(r"^layers\.\d+\.", "", name) for name in adapter.modules})
    parameters = sum(t.numel() for weights in adapter.modules.values() for t in weights.tensors.values())
    dtypes = {str(t.dtype).removeprefix("torch.") for w in adapter.modules.values() for t in w.tensors.values()}
    lines = [
        f"format       {adapter.family}",
        f"kind         {kinds}",
        f"rank         {_span(ranks)}, scale {_span(scales)} (alpha / rank)",
        f"layers       {', '.join(targets)}",
        f"blocks       {_ranges(blocks)}",
        f"parameters   {parameters:,} in {', '.join(sorted(dtypes))}",
        f"base model   {base_model(adapter) or 'not said'}",
    ]
    if adapter.path is not None:
        lines.insert(0, f"file         {adapter.path} ({adapter.path.stat().st_size / 1e6:.1f} MB)")
    if sha256:
        lines.append(f"sha256       {sha256}")
    arguments = training_arguments(adapter).get("arguments", {})
    if shown := [f"{name} {arguments[name]}" for name in _SHOWN_ARGUMENTS if arguments.get(name) is not None]:
        lines.append(f"trained with {', '.join(shown)} (all in {TRAINING_ARGS_NAME})")
    if values := norms.values:
        strongest = sorted(values, key=values.get, reverse=True)
        what = "||dW|| / ||W||" if norms.relative else "||dW||"
        lines.append(f"change       {what} per layer, mean {sum(values.values()) / len(values):.4g}")
        for label, names in (("largest", strongest[:3]), ("smallest", strongest[:-4:-1])):
            shown = ", ".join(f"{original_name(name)} {values[name]:.4g}" for name in names)
            lines.append(f"  {label:<10} {shown}")
    if without := len(adapter.modules) - len(norms.layers):
        lines.append(f"  {without} layers depend on the base weights: name them with --pretrained_model_name_or_path.")
    if adapter.unknown:
        lines.append(f"not used     {len(adapter.unknown)} tensors, such as {adapter.unknown[0]}")
    return "\n".join(lines)


def draw_norms(norms: Norms, path: Path) -> None:
    """A heat map: blocks by kinds of layers."""
    blocks, kinds = list(group_by(norms.layers, "block")), list(group_by(norms.layers, "kind"))
    values = np.full((len(blocks), len(kinds)), np.nan)
    for norm in norms.layers:
        values[blocks.index(norm.block), kinds.index(norm.kind)] = relative_norm([norm])
    rows = ["outside" if block is None else str(block) for block in blocks]
    plot_update_norms(rows, kinds, values, path, relative=norms.relative)


def _span(values: list) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts) or "none"
