"""Putting an adapter of the record into a transformer, as PEFT layers that diffusers can switch, scale and remove."""

import itertools

import torch
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from peft.utils.integrations import dequantize_module_weight

from .deltas import delta_weight, needs_base
from .peft_configs import loha_config, lokr_config, lora_config
from .record import MAGNITUDE, Adapter, ModuleWeights


def layer_shapes(transformer: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer that an adapter can be for, by name; adapters that are there don't count."""
    shapes = {}
    # A compiled model has the real one inside.
    for name, module in getattr(transformer, "_orig_mod", transformer).named_modules():
        if _inside_adapter(name):
            continue
        layer = base_layer(module)
        if isinstance(layer, torch.nn.Linear):
            shapes[name] = (layer.out_features, layer.in_features)
    return shapes


def base_layer(module: torch.nn.Module) -> torch.nn.Module:
    """The layer itself, without the adapters around it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _inside_adapter(name: str) -> bool:
    return any(
        part == "base_layer" or part.startswith(("lora_", "lokr_", "hada_", "oft_")) for part in name.split(".")
    )


def is_plain_lora(adapter: Adapter) -> bool:
    """Whether PEFT's LoRA layers hold it: LoRAs, or DoRAs with norms of rows."""
    with_magnitude = {MAGNITUDE in weights.tensors for weights in adapter.modules.values()}
    return (
        {weights.kind for weights in adapter.modules.values()} == {"lora"}
        and len(with_magnitude) == 1
        and all(_of_rows(weights) for weights in adapter.modules.values())
    )


def _of_rows(weights: ModuleWeights) -> bool:
    magnitude = weights.tensors.get(MAGNITUDE)
    return magnitude is None or magnitude.ndim == 1 or magnitude.shape[1] == 1


def diffusers_state(adapter: Adapter) -> tuple[dict[str, torch.Tensor], dict]:
    """State dict and metadata of an adapter of LoRAs or DoRAs alone, as diffusers' own loader takes them."""
    state_dict = {}
    for name, weights in adapter.modules.items():
        state_dict[f"transformer.{name}.lora_A.weight"] = weights.tensors["lora_A"]
        state_dict[f"transformer.{name}.lora_B.weight"] = weights.tensors["lora_B"]
        if MAGNITUDE in weights.tensors:
            state_dict[f"transformer.{name}.lora_magnitude_vector"] = weights.tensors[MAGNITUDE].flatten()
    return state_dict, {f"transformer.{name}": value for name, value in lora_config(adapter).items()}


def free_name(transformer: torch.nn.Module) -> str:
    """A name that no adapter of the transformer has; the first is `default_0`, as diffusers has it."""
    taken = getattr(transformer, "peft_config", {})
    return next(name for number in itertools.count(len(taken)) if (name := f"default_{number}") not in taken)


def install_factors(transformer: torch.nn.Module, adapter: Adapter, adapter_name: str) -> None:
    """Add an adapter that is no plain LoRA.

    LoKr and LoHa go into PEFT's layers of their names with the file's own factors, whatever their shapes. All else (an
    OFT, magnitudes on a LoKr, kinds side by side) becomes the difference of each weight, held by a LoKr layer whose w1
    is 1: as large as the layer, and scaled like any other.

    Raises:
        ValueError: the base is packed in 4 bits, where PEFT has no other kind than LoRA.
    """
    transformer = getattr(transformer, "_orig_mod", transformer)
    for name in adapter.modules:
        layer = base_layer(transformer.get_submodule(name))
        if tuple(layer.weight.shape) != (layer.out_features, layer.in_features):
            raise ValueError("this base is packed in 4 bits, to which only a LoRA or DoRA can be added")
    kinds = {weights.kind for weights in adapter.modules.values()}
    if kinds == {"loha"} and not any(needs_base(weights) for weights in adapter.modules.values()):
        config = LoHaConfig(**loha_config(adapter))
        stored = adapter.modules
    else:
        stored = {name: _as_lokr(transformer, name, adapter) for name in adapter.modules}
        names = {"target_modules": sorted(adapter.modules)}
        config = LoKrConfig(**(lokr_config(Adapter(stored)) or {"r": 1, "alpha": 1, **names}))
    # What PEFT creates is thrown away: on no device, it costs nothing.
    inject_adapter_in_model(config, transformer, adapter_name=adapter_name, low_cpu_mem_usage=True)
    for name, weights in stored.items():
        _set_factors(transformer.get_submodule(name), adapter_name, weights)
    transformer._hf_peft_config_loaded = True


def _as_lokr(transformer: torch.nn.Module, name: str, adapter: Adapter) -> ModuleWeights:
    weights = adapter.modules[name]
    if weights.kind == "lokr" and not needs_base(weights):
        return weights
    one = torch.ones(1, 1)
    if weights.kind == "lora" and not needs_base(weights):
        factors = {"lokr_w1": one, "lokr_w2_a": weights.tensors["lora_B"], "lokr_w2_b": weights.tensors["lora_A"]}
        return ModuleWeights("lokr", factors, weights.rank, weights.scale * weights.rank)
    # A quantised base counts as what it stands for.
    base = dequantize_module_weight(base_layer(transformer.get_submodule(name)))
    delta = delta_weight(weights, base.detach().cpu(), config=adapter.config)
    return ModuleWeights("lokr", {"lokr_w1": one, "lokr_w2": delta})


def _set_factors(layer: torch.nn.Module, adapter_name: str, weights: ModuleWeights) -> None:
    """Replace what PEFT created for an adapter by the tensors of the record, in the layer's dtype and place."""
    base = base_layer(layer).weight
    dtype = base.dtype if base.dtype.is_floating_point else torch.float32
    for store in layer.adapter_layer_names:
        if adapter_name in getattr(layer, store):
            del getattr(layer, store)[adapter_name]
        if store in weights.tensors:
            tensor = weights.tensors[store].to(device=base.device, dtype=dtype, copy=True).contiguous()
            getattr(layer, store)[adapter_name] = torch.nn.Parameter(tensor, requires_grad=False)
    layer.r[adapter_name] = weights.rank
    layer.alpha[adapter_name] = weights.alpha
    layer.scaling[adapter_name] = weights.scale
