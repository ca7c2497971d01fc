"""Which of a transformer's adapters act, and how strongly: on all layers, on some, or by the step of a generation.

Switching sets a list and a number in each adapted layer; no tensor is made or copied. An adapter of weight 0 does not
act at all (a DoRA's magnitudes neither).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import UsageError
from .settings import TARGET_SETS, respell

MAX_WEIGHT = 2.0
# Kinds that have no weight in peft.
_UNSCALED = (PeftType.OFT,)

# One weight for all layers; by layer, as the user writes it (`{"cross": 0.5}`) or by the layer's full name.
Weight = float | Mapping[str, float]


def adapter_layers(transformer: torch.nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Every layer that can hold adapters, with its name in the transformer without adapters."""
    stack = [("", getattr(transformer, "_orig_mod", transformer))]
    while stack:
        prefix, module = stack.pop()
        for name, part in reversed(module._modules.items()):
            if part is None:
                continue
            layer_name = prefix + name
            # An adapter of another kind on the same layer is wrapped by this one.
            while isinstance(part, BaseTunerLayer):
                yield layer_name, part
                part = part.base_layer
            if part._modules:
                stack.append((layer_name + ".", part))


def has_adapter(layer: BaseTunerLayer, name: str) -> bool:
    """Whether an adapter has weights for this layer."""
    if "scaling" in layer.__dict__:
        return name in layer.scaling
    return any(name in getattr(layer, kind) for kind in layer.adapter_layer_names)  # an OFT has no scale


def _scales(layer: BaseTunerLayer) -> dict[str, float | torch.Tensor]:
    return layer.__dict__.get("scaling", {})


def loaded_adapters(transformer: torch.nn.Module) -> list[str]:
    """The names of all loaded adapters, in the order of loading."""
    return list(getattr(transformer, "peft_config", {}))


def active_adapters(transformer: torch.nn.Module) -> list[str]:
    """The names of the adapters that act on at least one layer."""
    names: dict[str, None] = {}
    for _, layer in adapter_layers(transformer):
        names.update(dict.fromkeys(name for name in layer.active_adapters if has_adapter(layer, name)))
    return list(names)


def check_weights(
    transformer: torch.nn.Module, names: str | Sequence[str], weights: Weight | Sequence[Weight | None] | None
) -> dict[str, Weight]:
    """The weight of each named adapter, or by each of its layers' full names.

    Args:
        transformer: with the adapters loaded.
        names: one or several.
        weights: one for each name, or one for all (None: 1): a number in [-2, 2], or a mapping from layers to numbers.
            Its keys are sets (`attention`, `self`, `cross`, `mlp`), parts of a layer's name in any spelling
            (`cross_attn`, `layers.3.mlp`, `q_proj`) or blocks (`layers.0-11`); the first that matches a layer counts,
            a layer that none matches has 1 (as in diffusers).

    Raises:
        UsageError: an adapter that isn't loaded, a weight that is no such number, a key that matches no layer.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not isinstance(weights, list | tuple):
        weights = [weights] * len(names)
    if len(weights) != len(names) or len(set(names)) != len(names):
        raise UsageError(f"give each adapter once, and a weight for each: {len(names)} names, {len(weights)} weights.")
    loaded = loaded_adapters(transformer)
    for name in names:
        if name not in loaded:
            raise UsageError(f"no adapter {name!r} is loaded; loaded are: {', '.join(loaded) or 'none'}.")
    return {name: _check_weight(transformer, name, weight) for name, weight in zip(names, weights, strict=True)}


def _check_weight(transformer: torch.nn.Module, name: str, weight: Weight | None) -> Weight:
    if weight is None:
        return 1.0
    if not isinstance(weight, Mapping):
        value = _check_number(name, weight)
        if value not in (0.0, 1.0) and transformer.peft_config[name].peft_type in _UNSCALED:
            raise UsageError(f"{name!r} is an OFT, a rotation, which has no strengths but 0 and 1, not {weight!r}.")
        return value
    if set(weight) == {"transformer"}:  # diffusers' outer form, by component
        return _check_weight(transformer, name, weight["transformer"])
    by_layer: dict[str, float] = {}
    layers = [layer_name for layer_name, layer in adapter_layers(transformer) if has_adapter(layer, name)]
    for key, value in weight.items():
        matches = _matcher(str(key))
        matched = [layer for layer in layers if matches(layer)]
        if not matched:
            raise UsageError(
                f"{key!r} matches none of the layers of the adapter {name!r}, which are like {layers[0]}; "
                f"write a part of a name, a range of blocks (layers.0-11), or {', '.join(TARGET_SETS)}."
            )
        for layer in matched:
            by_layer.setdefault(layer, _check_number(f"{name} on {key}", value))
    return {layer: by_layer.get(layer, 1.0) for layer in layers}


def _check_number(name: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, Real) or not abs(weight) <= MAX_WEIGHT:
        raise UsageError(f"the weight of {name!r} must be a number from -2 to 2, not {weight!r}.")
    return float(weight)


def _matcher(key: str) -> Callable[[str], bool]:
    """Whether a layer's name has what a key says, from dot to dot."""
    blocks = re.fullmatch(r"(?:blocks|layers)\.(\d+)-(\d+)(?:\.(.+))?", key)
    if blocks:
        prefixes = [f"layers.{block}" for block in range(int(blocks[1]), int(blocks[2]) + 1)]
        parts = tuple(f"{prefix}.{blocks[3]}" if blocks[3] else prefix for prefix in prefixes)
    else:
        parts = TARGET_SETS.get(key, (key,))
    wanted = [f".{respell(part)}." for part in parts]
    return lambda layer: any(part in f".{layer}." for part in wanted)


def check_not_fused(transformer: torch.nn.Module) -> None:
    """Fused layers compute with their own weights alone, whatever adapters are added, chosen or removed.

    Raises:
        UsageError: adapters are fused into the weights.
    """
    if any(layer.merged for _, layer in adapter_layers(transformer)):
        raise UsageError("adapters are fused into the model's weights; call unfuse_lora() before any other is used.")


def activate(transformer: torch.nn.Module, weights: Mapping[str, Weight]) -> None:
    """Let these adapters act, and no others; `weights` is what `check_weights` returned.

    Raises:
        UsageError: adapters are fused into the weights.
    """
    check_not_fused(transformer)
    for layer_name, layer in adapter_layers(transformer):
        active = []
        for name, weight in weights.items():
            if has_adapter(layer, name):
                value = weight if isinstance(weight, float) else weight[layer_name]
                set_scale(layer, name, value)
                # A compiled model is not to see another list of adapters: there a scale of 0 does it.
                if value or torch.is_tensor(_scales(layer).get(name)):
                    active.append(name)
        set_active(layer, active)


def set_active(layer: BaseTunerLayer, names: list[str]) -> None:
    """Which adapters act on a layer. A compiled model asks whether it is the same list, so an equal one stays."""
    if layer.active_adapters != names:
        layer._active_adapter = names


def set_scale(layer: BaseTunerLayer, name: str, weight: float) -> None:
    """peft's `set_scale`, which would put a number in the place of the tensor that a compiled model reads."""
    scale = _scales(layer).get(name)
    if scale is None:  # an OFT, which always turns all the way
        return
    layer.set_scale(name, weight)
    if torch.is_tensor(scale):
        scale.fill_(layer.scaling[name])
        layer.scaling[name] = scale


class ActiveAdapters:
    """Which adapters act on each layer, and how strongly, at one moment: to have it so again later."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self._transformer = transformer
        self._layers = {
            layer: (list(layer.active_adapters), {name: float(scale) for name, scale in _scales(layer).items()})
            for _, layer in adapter_layers(transformer)
        }

    def restore(self) -> None:
        """Adapters that have gone since are left out; those that were loaded since don't act."""
        for _, layer in adapter_layers(self._transformer):
            active, scales = self._layers.get(layer, ([], {}))
            set_active(layer, [name for name in active if has_adapter(layer, name)])
            for name in scales.keys() & _scales(layer).keys():
                if torch.is_tensor(layer.scaling[name]):
                    layer.scaling[name].fill_(scales[name])
                else:
                    layer.scaling[name] = scales[name]


@dataclass(frozen=True)
class AdapterSchedule:
    """Weights by the step: for each adapter, `(from which share of the steps on, weight)` in ascending order.

    Of N steps the one numbered k (from 0) has the last entry whose share is at most k / N. The weight before the first
    entry is 0, and so is that of every adapter which the schedule does not name. Make it with `check_schedule`.
    """

    points: Mapping[str, tuple[tuple[float, Weight], ...]]

    def weights(self, step: int, num_steps: int) -> dict[str, Weight]:
        """The weight of each adapter in one step."""
        # 1e-9: 0.4 of 5 steps is step 2, whatever the rounding.
        return {
            name: next((weight for start, weight in reversed(points) if start <= step / num_steps + 1e-9), 0.0)
            for name, points in self.points.items()
        }


def check_schedule(
    transformer: torch.nn.Module, schedule: Mapping[str, Weight | Sequence[tuple[float, Weight]]]
) -> AdapterSchedule:
    """A schedule as the user writes it: `{"jazz": [(0.0, 0.0), (0.4, 0.8)], "lofi": 0.5}`.

    Raises:
        UsageError: as `check_weights`, or shares that are not in [0, 1) or not ascending.
    """
    points = {}
    for name, entries in schedule.items():
        entries = [(0.0, entries)] if isinstance(entries, Mapping | Real) else entries
        try:
            shares, weights = zip(*((float(share), weight) for share, weight in entries), strict=True)
        except (TypeError, ValueError):
            raise UsageError(f"the schedule of {name!r} must be a list of (share of the steps, weight).") from None
        in_order = all(earlier < later for earlier, later in zip(shares, shares[1:], strict=False))
        if not in_order or not all(0 <= share < 1 for share in shares):
            raise UsageError(f"the shares of the steps for {name!r} must ascend, from 0 to below 1, not {shares}.")
        checked = [check_weights(transformer, name, weight)[name] for weight in weights]
        points[name] = tuple(zip(shares, checked, strict=True))
    return AdapterSchedule(points)


def on_schedule(transformer: torch.nn.Module, schedule: AdapterSchedule, callback: Callable | None) -> Callable:
    """Set the weights of the first step, and return a `callback_on_step_end` that sets those of each next one.

    `callback` is the user's own, called before.
    """
    current = schedule.weights(0, 1)
    activate(transformer, current)

    def advance(pipeline: Any, step: int, timestep: float, tensors: dict) -> dict | None:
        nonlocal current
        changed = callback(pipeline, step, timestep, tensors) if callback is not None else None
        following = schedule.weights(step + 1, len(pipeline.scheduler.timesteps))
        if following != current:
            activate(transformer, following)
            current = following
        return changed

    return advance
