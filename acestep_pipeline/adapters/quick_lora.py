"""Adding a LoRA to a transformer in a fraction of the time that diffusers takes.

diffusers 0.42 and peft 0.21 look for every target among all of the model's modules, several times, initialise what is
then overwritten, and search the whole model's state dict. `tests/test_quick_lora.py` compares the layers made here
with diffusers', one by one.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear

from .hotswap import LayerFactors, read_factors
from .weights import adapter_layers, set_active


def add_lora(
    transformer: torch.nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any] | None,
    adapter_name: str,
) -> bool:
    """Add a LoRA or rsLoRA as diffusers' `load_lora_into_transformer` does, and let it alone act.

    Args:
        transformer: with adapters or without.
        state_dict: with diffusers' keys.
        metadata: `LoraConfig`'s arguments, with the prefix `transformer.`.
        adapter_name: its name; no loaded adapter has it.

    Returns:
        False, with nothing changed, where this is for diffusers to do: another kind of adapter, quantised or offloaded
        layers, layers that hold another kind already, what does not fit.
    """
    factors = read_factors(state_dict, metadata)
    if not factors or metadata is None or adapter_name in getattr(transformer, "peft_config", {}):
        return False
    layers = {name: _find(transformer, name) for name in factors}
    if _is_offloaded(transformer) or not all(_fits(layers[name], new) for name, new in factors.items()):
        return False
    config = LoraConfig(**{name.removeprefix("transformer."): value for name, value in metadata.items()})
    for name, new in factors.items():
        layer = layers[name]
        if not isinstance(layer, LoraLinear):
            # Of rank 1, as what it creates is replaced.
            layer = LoraLinear(layer, adapter_name, config, r=1, lora_alpha=1)
            parent, _, attribute = name.rpartition(".")
            setattr(transformer.get_submodule(parent), attribute, layer)
        _put(layer, adapter_name, new)
    for _, layer in adapter_layers(transformer):
        set_active(layer, [adapter_name])
    transformer.peft_config = {**getattr(transformer, "peft_config", {}), adapter_name: config}
    transformer._hf_peft_config_loaded = True
    return True


def _find(transformer: torch.nn.Module, name: str) -> torch.nn.Module | None:
    try:
        return transformer.get_submodule(name)
    except AttributeError:
        return None


def _is_offloaded(transformer: torch.nn.Module) -> bool:
    return any(hasattr(transformer, hook) for hook in ("_hf_hook", "_diffusers_hook"))


def _fits(layer: torch.nn.Module | None, new: LayerFactors) -> bool:
    """Whether a layer is a plain linear one of the right size, with LoRAs or without."""
    base = layer.base_layer if type(layer) is LoraLinear else layer
    if type(base) is not torch.nn.Linear or type(base.weight) is not torch.nn.Parameter or hasattr(base, "_hf_hook"):
        return False
    shapes = (new.down.shape[1], new.up.shape[0], new.up.shape[1])
    return shapes == (base.in_features, base.out_features, new.down.shape[0]) and base.weight.device.type != "meta"


def _put(layer: LoraLinear, name: str, new: LayerFactors) -> None:
    """What peft's `update_layer` sets for one adapter, with its weights in the place and precision of the layer's."""
    rank = new.down.shape[0]
    layer.r[name], layer.lora_alpha[name] = rank, new.alpha
    layer.use_rslora[name], layer.use_dora[name], layer.lora_bias[name] = new.use_rslora, False, False
    layer.scaling[name] = new.alpha / (math.sqrt(rank) if new.use_rslora else rank)
    layer.lora_dropout[name] = torch.nn.Identity()
    layer.lora_A[name] = _linear(new.down, like=layer.base_layer.weight)
    layer.lora_B[name] = _linear(new.up, like=layer.base_layer.weight)


def _linear(weight: torch.Tensor, *, like: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dtype = like.dtype if like.dtype.is_floating_point else weight.dtype
    # A copy: the tensors of a file that is mapped into memory would change with it.
    linear.weight = torch.nn.Parameter(weight.to(like.device, dtype, copy=True).contiguous(), requires_grad=False)
    return linear
