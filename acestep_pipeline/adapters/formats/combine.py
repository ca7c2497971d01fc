"""Several adapters, each with a weight, as one: PEFT's `cat`, which is exact, as it lays the ranks side by side."""

import torch
from peft import LoraConfig, LoraModel

from .deltas import as_lora
from .record import KIND_NAMES, MAGNITUDE, Adapter, ModuleWeights


@torch.no_grad()
def combine(adapters: list[Adapter], weights: list[float]) -> Adapter:
    """One LoRA whose difference is the weighted sum of the adapters'; its rank on a layer is the sum of theirs,
    and at most the layer's narrower side.

    LoKr and LoHa become the LoRAs that they are equal to first.

    Raises:
        ValueError: one depends on the base weights, so that it is no sum (DoRA, OFT), or two are for models of
            different sizes.
    """
    loras = []
    for adapter in adapters:
        if bad := [kind for kind in adapter.kinds if kind in ("dora", "oft", "diag_oft")] or _with_magnitude(adapter):
            raise ValueError(f"{KIND_NAMES[bad[0]]} is no sum that others can be added to; bake it with --to merged")
        loras.append({name: as_lora(module) for name, module in adapter.modules.items()})
    _check_sizes(loras)
    model = _layers_without_weights(loras)
    peft_model = None
    for index, modules in enumerate(loras):
        name = f"adapter_{index}"
        # The highest rank as the default: PEFT adds these up for the room that it makes.
        config = LoraConfig(
            r=max(module.rank for module in modules.values()),
            rank_pattern={layer: module.rank for layer, module in modules.items()},
            target_modules=sorted(modules),
        )
        if peft_model is None:
            peft_model = LoraModel(model, config, name)
        else:
            peft_model.peft_config[name] = config
            peft_model.inject_adapter(peft_model.model, name)
        for layer_name, module in modules.items():
            layer = model.get_submodule(layer_name)
            layer.lora_A[name].weight.data = module.tensors["lora_A"].float()
            layer.lora_B[name].weight.data = module.tensors["lora_B"].float()
            layer.scaling[name] = module.scale
    names = [f"adapter_{index}" for index in range(len(loras))]
    peft_model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    combined = {}
    for layer_name in sorted({layer for modules in loras for layer in modules}):
        layer = model.get_submodule(layer_name)
        rank = sum(modules[layer_name].rank for modules in loras if layer_name in modules)
        down, up = layer.lora_A["sum"].weight[:rank], layer.lora_B["sum"].weight[:, :rank]
        if rank > (full := min(len(up), down.shape[1])):  # more than any update of this layer needs
            product = up @ down
            down, up = (product, torch.eye(full)) if len(up) == full else (torch.eye(full), product)
            rank = full
        combined[layer_name] = ModuleWeights(
            "lora", {"lora_A": down.detach().clone(), "lora_B": up.detach().clone()}, rank, float(rank)
        )
    return Adapter(combined, family="diffusers")


def _with_magnitude(adapter: Adapter) -> list[str]:
    return [weights.kind for weights in adapter.modules.values() if MAGNITUDE in weights.tensors][:1]


def _check_sizes(loras: list[dict[str, ModuleWeights]]) -> None:
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in (pair for modules in loras for pair in modules.items()):
        out_width, in_width = shapes.setdefault(name, module.shape)
        if module.shape != (out_width, in_width):
            raise ValueError(
                f"they are for models of different sizes: {name} leads from {in_width} to {out_width} in one, and "
                f"from {module.shape[1]} to {module.shape[0]} in another"
            )


def _layers_without_weights(loras: list[dict[str, ModuleWeights]]) -> torch.nn.Module:
    """A tree of linear layers of the right shapes and names, whose weights take no memory."""
    root = torch.nn.Module()
    for name, module in {name: module for modules in loras for name, module in modules.items()}.items():
        *parents, last = name.split(".")
        parent = root
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        out_width, in_width = module.shape
        with torch.device("meta"):
            layer = torch.nn.Linear(in_width, out_width, bias=False)
        layer.weight = torch.nn.Parameter(torch.zeros(()).expand(out_width, in_width), requires_grad=False)
        parent.add_module(last, layer)
    return root
