"""One adapter in the place of another, in the same tensors: a compiled model goes on without being compiled again.

diffusers 0.42 and peft 0.21 swap too, but refuse an adapter with other layers than the first one had, or a rsLoRA
after a LoRA, or one with alphas by layer; forget the first adapter when that fails; and scale by the alpha and rank
of the first when `set_adapters` comes after a swap.
`tests/test_adapter_hotswap.py::test_diffusers_still_has_the_gaps` fails once that has changed, and this module can go.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key

from ..errors import UsageError
from .trainable import resolve_target_modules
from .weights import adapter_layers, loaded_adapters, set_active, set_scale


@dataclass(frozen=True)
class Room:
    """What every adapter that is loaded from now on gets: layers of this rank, at these targets and its own."""

    rank: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class LayerFactors:
    """A LoRA's part for one layer: `down` is A `[rank, in]`, `up` is B `[out, rank]`."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    use_rslora: bool


def make_room(transformer: torch.nn.Module, *, target_rank: int, targets: tuple[str, ...]) -> None:
    """Have `load` give later adapters room for others that have a higher rank, or more layers.

    Raises:
        UsageError: the rank is not positive, a target matches no layer, or adapters are loaded already.
    """
    if loaded_adapters(transformer):
        raise UsageError(
            "call enable_lora_hotswap() before the first adapter is loaded, or delete those loaded first."
        )
    if not isinstance(target_rank, int) or target_rank < 1:
        raise UsageError(f"target_rank must be a positive number, the highest rank to come, not {target_rank!r}.")
    transformer._hotswap_room = Room(target_rank, tuple(resolve_target_modules(transformer, targets)))


def load(
    transformer: torch.nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None,
    metadata: Mapping[str, Any] | None,
    *,
    adapter_name: str,
    hotswap: bool,
    load_anew: Callable[[Mapping[str, torch.Tensor] | None, Mapping[str, Any] | None], object],
) -> None:
    """Load an adapter in the place of another (`hotswap`), or with room to swap others in (after `make_room`).

    Args:
        transformer: the model, compiled or not.
        state_dict: with diffusers' keys (`transformer.<layer>.lora_A.weight`); None for another kind than LoRA.
        metadata: diffusers', with the prefix `transformer.`.
        adapter_name: of the adapter to replace, or of the new one.
        hotswap: whether one is to be replaced. It acts at weight 1 afterwards where it acted before.
        load_anew: diffusers' way to load a state dict and its metadata under that name.

    Raises:
        ValueError: there is no adapter of that name, or no room for the new one in a model that may be compiled.
    """
    if hotswap and adapter_name not in loaded_adapters(transformer):
        loaded = ", ".join(loaded_adapters(transformer)) or "none"
        raise ValueError(f"no adapter {adapter_name!r} is loaded that it could replace; loaded are: {loaded}")
    room: Room | None = getattr(transformer, "_hotswap_room", None)
    factors = None if state_dict is None else read_factors(state_dict, metadata)
    obstacle = find_obstacle(transformer, adapter_name, factors) if hotswap else None
    if hotswap and obstacle is None:
        swap_in(transformer, adapter_name, factors)
    elif hotswap and (_is_compiled(transformer) or room is not None):
        raise ValueError(f"{obstacle}; call enable_lora_hotswap() with a higher target_rank or more target_modules")
    elif hotswap:
        _replace(transformer, adapter_name, lambda: load_anew(state_dict, metadata))
    elif factors is None:
        load_anew(state_dict, metadata)
    else:
        load_anew(empty_factors(transformer, factors, room), None)
        for _, layer in _layers_of(transformer, adapter_name):
            layer.scaling[adapter_name] = torch.tensor(layer.scaling[adapter_name], device=layer.weight.device)
        swap_in(transformer, adapter_name, factors)


def read_factors(
    state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None
) -> dict[str, LayerFactors] | None:
    """The factors of each layer, with the alpha that the metadata give it (without any: its rank); None if it is no
    LoRA or rsLoRA."""
    config = {name.removeprefix("transformer."): value for name, value in (metadata or {}).items()}
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(r"(?:transformer\.)?(.+)\.lora_(A|B)\.weight", key)
        if not match:
            return None
        by_layer.setdefault(match[1], {})[match[2]] = tensor
    alphas = config.get("alpha_pattern") or {}
    factors = {}
    for name, pair in by_layer.items():
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), config.get("lora_alpha", pair["A"].shape[0]))
        factors[name] = LayerFactors(pair["A"], pair["B"], alpha, bool(config.get("use_rslora")))
    return factors


def empty_factors(
    transformer: torch.nn.Module, factors: Mapping[str, LayerFactors], room: Room
) -> dict[str, torch.Tensor]:
    """A state dict of zeros with room for `factors` and all else that `room` is for."""
    dtype = next(iter(factors.values())).down.dtype
    rank = max(room.rank, *(layer.down.shape[0] for layer in factors.values()))
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    linear = {name.removesuffix(".base_layer"): module for name, module in linear.items() if ".lora_" not in name}
    wanted = [name for name in linear if any(f".{name}".endswith(f".{target}") for target in room.targets)]
    state_dict = {}
    for name in dict.fromkeys([*wanted, *factors]):
        state_dict[f"transformer.{name}.lora_A.weight"] = torch.zeros(rank, linear[name].in_features, dtype=dtype)
        state_dict[f"transformer.{name}.lora_B.weight"] = torch.zeros(linear[name].out_features, rank, dtype=dtype)
    return state_dict


def find_obstacle(transformer: torch.nn.Module, name: str, factors: Mapping[str, LayerFactors] | None) -> str | None:
    """Why an adapter has no room in the tensors of another; None if it has."""
    if factors is None:
        return "only LoRA and rsLoRA have room in one another, and it is of another kind"
    layers = dict(_layers_of(transformer, name))
    if not layers:
        return f"the adapter {name!r} is no LoRA"
    if any(name in layer.lora_magnitude_vector for layer in layers.values()):
        return f"the adapter {name!r} is a DoRA"
    if any(layer.merged for layer in layers.values()):
        raise ValueError(f"the adapter {name!r} is fused into the model's weights; call unfuse_lora() first")
    for layer_name, new in factors.items():
        if layer_name not in layers:
            return f"it has weights for {layer_name}, and {name!r} has no room there"
        rank, wanted = layers[layer_name].lora_A[name].weight.shape[0], new.down.shape[0]
        if wanted > rank:
            return f"its rank is {wanted}, and {name!r} has room for {rank}"
    return None


@torch.no_grad()
def swap_in(transformer: torch.nn.Module, name: str, factors: Mapping[str, LayerFactors]) -> None:
    """Write an adapter into the tensors of another, zeros where it has nothing. Check `find_obstacle` first."""
    for layer_name, layer in _layers_of(transformer, name):
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        new = factors.get(layer_name)
        rank = 0 if new is None else new.down.shape[0]
        if new is not None:
            down[:rank].copy_(new.down)
            up[:, :rank].copy_(new.up)
            layer.r[name], layer.lora_alpha[name], layer.use_rslora[name] = rank, new.alpha, new.use_rslora
        down[rank:].zero_()
        up[:, rank:].zero_()
        set_scale(layer, name, 1.0)


def _layers_of(transformer: torch.nn.Module, name: str) -> Iterable[tuple[str, LoraLayer]]:
    for layer_name, layer in adapter_layers(transformer):
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            yield layer_name, layer


def _is_compiled(transformer: torch.nn.Module) -> bool:
    """As a whole or in blocks."""
    modules = transformer.modules()
    return hasattr(transformer, "_orig_mod") or any(module._compiled_call_impl is not None for module in modules)


def _replace(transformer: torch.nn.Module, name: str, load_anew: Callable[[], None]) -> None:
    """Take an adapter out and load another under its name, which acts if that one did, beside the same others."""
    acting = {layer: list(layer.active_adapters) for _, layer in adapter_layers(transformer)}
    acted = any(name in active for active in acting.values())
    for layer in acting:
        set_active(layer, [other for other in layer.active_adapters if other != name])
    transformer.delete_adapters(name)
    load_anew()
    for _, layer in adapter_layers(transformer):
        before = acting.get(layer, [])
        others = [other for other in before if other != name]
        set_active(layer, [*others, name] if acted else others)
