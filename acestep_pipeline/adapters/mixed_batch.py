"""Several adapters in one batch: an item has its own, several, or none, and weights of its own.

diffusers passes no `adapter_names` to peft's layers, and peft's own mixed batches know neither weights nor DoRA nor
LoKr. Here the layers run without adapters, and a hook on each adds to every item's rows what its adapters contribute:
consecutive items with the same adapters at once, in place.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import UsageError
from .weights import (
    ActiveAdapters,
    Weight,
    activate,
    adapter_layers,
    check_weights,
    has_adapter,
    set_scale,
)

# What one item gets: nothing, an adapter at weight 1, one with a weight, or several with weights.
Choice = None | str | tuple[str, Weight] | Mapping[str, Weight]
# Names of adapters and their scales (weight and alpha) on one layer, in the order of their application.
Parts = tuple[tuple[str, float], ...]


def check_choices(
    transformer: torch.nn.Module, choices: Sequence[Choice], *, num_items: int
) -> list[dict[str, Weight]]:
    """The weights of each item's adapters.

    Raises:
        UsageError: another number of choices than of items, an adapter that isn't loaded, an impossible weight, or a
            kind of adapter that can't be mixed.
    """
    if isinstance(choices, str | Mapping) or len(choices) != num_items:
        given = "one" if isinstance(choices, str | Mapping) else len(choices)
        raise UsageError(
            f"adapters needs an entry for each of the {num_items} prompts (None: no adapter), not {given}."
        )
    checked = []
    for choice in choices:
        if choice is None:
            choice = {}
        elif isinstance(choice, str):
            choice = {choice: 1.0}
        elif isinstance(choice, tuple) and len(choice) == 2:
            choice = dict([choice])
        elif not isinstance(choice, Mapping):
            raise UsageError(
                f"an entry of adapters is None, a name, (name, weight) or {{name: weight}}, not {choice!r}."
            )
        checked.append(check_weights(transformer, list(choice), list(choice.values())))
    for name in dict.fromkeys(name for weights in checked for name in weights):
        for _, layer in adapter_layers(transformer):
            if has_adapter(layer, name) and not _is_known(layer, name):
                kind = type(layer).__module__.split(".")[-2]
                raise UsageError(
                    f"{name!r} ({kind}) can't be mixed in a batch: only LoRA, rsLoRA, DoRA, LoKr and LoHa."
                )
    return checked


def _is_known(layer: BaseTunerLayer, name: str) -> bool:
    if isinstance(layer, LoraLinear):
        return isinstance(layer.lora_variant.get(name), DoraLinearVariant | None)
    return isinstance(layer, LycorisLayer)


@contextlib.contextmanager
def adapters_by_item(transformer: torch.nn.Module, weights: Sequence[Mapping[str, Weight]]) -> Iterator[None]:
    """While this context lasts, item i of a batch is changed by the adapters `weights[i]` and no others.

    A batch may hold the items several times, one set after another, as guidance does. Afterwards the adapters of
    before act again.

    Args:
        transformer: with the adapters loaded.
        weights: for each item, what `check_choices` returned.

    Raises:
        UsageError: adapters are fused into the weights.
    """
    before = ActiveAdapters(transformer)
    hooks = []
    try:
        activate(transformer, {})
        for layer_name, layer in adapter_layers(transformer):
            parts = [_parts(layer, layer_name, item) for item in weights]
            if any(parts):
                hooks.append(layer.register_forward_hook(_adding(parts)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        before.restore()


def _parts(layer: BaseTunerLayer, layer_name: str, weights: Mapping[str, Weight]) -> Parts:
    parts = []
    for name, weight in weights.items():
        value = weight if isinstance(weight, float) else weight.get(layer_name, 0.0)
        if value and has_adapter(layer, name):
            set_scale(layer, name, value)
            parts.append((name, float(layer.scaling[name])))
    return tuple(parts)


def _adding(parts: list[Parts]) -> Callable[[BaseTunerLayer, tuple, torch.Tensor], torch.Tensor]:
    """A forward hook that adds each item's parts to its rows of the layer's output."""

    def add(layer: BaseTunerLayer, args: tuple, output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        rows = parts * (len(x) // len(parts))
        for group in dict.fromkeys(rows):
            of_group = [row for row, its in enumerate(rows) if its == group]
            if all(isinstance(layer, LoraLinear) and name not in layer.lora_variant for name, _ in group):
                for start, stop in _runs(of_group):
                    for name, scale in group:
                        _add_lora(layer, name, scale, x[start:stop], output[start:stop])
            else:
                # Each of these makes matrices as large as the layer's: once for all rows, together or not.
                result = output[of_group]
                for name, scale in group:
                    result = _with_other(layer, name, scale, x[of_group], result)
                output[of_group] = result
        return output

    return add


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges: 0, 1, 4 are (0, 2) and (4, 5)."""
    start = previous = rows[0]
    for row in rows[1:]:
        if row != previous + 1:
            yield start, previous + 1
            start = row
        previous = row
    yield start, previous + 1


def _add_lora(layer: LoraLinear, name: str, scale: float, x: torch.Tensor, output: torch.Tensor) -> None:
    """Add `scale · B·A·x` in place: one pass over the output instead of three."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    hidden = down(x.to(down.weight.dtype))
    if up.bias is None and output.dtype == hidden.dtype and output.is_contiguous():
        output.view(-1, output.shape[-1]).addmm_(hidden.flatten(0, -2), up.weight.t(), alpha=scale)
    else:
        output.add_((up(hidden) * scale).to(output.dtype))


def _with_other(layer: Any, name: str, scale: float, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """`result` with a DoRA, LoKr or LoHa, computed as peft's own forward pass does."""
    layer.scaling[name] = scale
    if isinstance(layer, LoraLinear):
        x = x.to(layer.lora_A[name].weight.dtype)
        if name not in layer.lora_variant:
            return result + (layer.lora_B[name](layer.lora_A[name](x)) * scale).to(result.dtype)
        changed = layer.lora_variant[name].forward(layer, active_adapter=name, x=x, result=result)
    else:
        changed = result + layer._get_delta_activations(name, x)
    return changed.to(result.dtype)
