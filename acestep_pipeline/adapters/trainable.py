"""Adapters in a transformer: where they go, how they are added, and the file they become."""

import re
from pathlib import Path

import torch
from diffusers import AceStepPipeline
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import get_peft_model_state_dict

from ..errors import UsageError
from ..files import sort_metadata, write_atomically
from ..paths import LORA_WEIGHTS_NAME
from .settings import ADAPTER_TYPES, TARGET_SETS, TARGET_SPELLINGS, LoraSettings, respell


def resolve_target_modules(
    model: torch.nn.Module, targets: tuple[str, ...], blocks: tuple[int, ...] | None = None
) -> list[str]:
    """Target names in any of the three spellings -> diffusers' names, each of which matches a linear layer of `model`;
    with `blocks` the full names of the layers in those blocks.

    Raises:
        UsageError: a target or a block matches nothing; the message lists what exists.
    """
    linear_names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if blocks is not None:
        _check_blocks(model, blocks)
        linear_names = [name for name in linear_names if _block(name) in blocks]
    resolved = {}
    for target in targets:
        name = respell(target)
        matched = [full for full in linear_names if _ends_with(full, name)]
        if not matched:
            existing = sorted({_suffix(full) for full in linear_names if full.startswith("layers.")})
            raise UsageError(
                f"the LoRA target {target!r} (--lora_layers, or target_modules in --lora_config) matches no linear "
                "layer of this transformer; "
                f"its blocks have: {', '.join(existing)} (also spelt {', '.join(TARGET_SPELLINGS)})."
            )
        resolved.update(dict.fromkeys(matched if blocks is not None else [name]))
    return list(resolved)


def _check_blocks(model: torch.nn.Module, blocks: tuple[int, ...]) -> None:
    existing = sorted({_block(name) for name, _ in model.named_modules()} - {None})
    missing = [str(block) for block in blocks if block not in existing]
    if missing or not blocks:
        shown = missing if len(missing) <= 4 else [*missing[:2], "…", missing[-1]]
        named = ", ".join(shown) or "no block"
        raise UsageError(f"--lora_blocks names {named}; this transformer has the blocks 0 to {existing[-1]}.")


def _check_ranks(model: torch.nn.Module, ranks: dict[str, int]) -> None:
    """Refuse a LoRA that is larger than the layer it is for, which is read nowhere (`formats/read.py`)."""
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        most = layer.in_features + layer.out_features
        if rank > most:
            raise UsageError(
                f"--rank {rank} (or r or rank_pattern in --lora_config) is more than {name} can use, a layer from "
                f"{layer.in_features} to {layer.out_features}: at most {most}."
            )


def resolve_pattern(names: list[str], pattern: dict[str, float], *, field: str) -> dict[str, float]:
    """A `rank_pattern` or `alpha_pattern` -> a value for each layer of `names` (the adapted ones) that it matches.

    With whole names nothing depends on the order of the keys, which a saved file does not keep.

    Raises:
        UsageError: a key matches no adapted layer, or is no regular expression.
    """
    resolved: dict[str, float] = {}
    for key, value in pattern.items():
        try:
            ends = [re.compile(rf"(.*\.)?({respell(end)})") for end in TARGET_SETS.get(key, (key,))]
        except re.error as error:
            raise UsageError(f"{field} in --lora_config: {key!r} is no regular expression: {error}.") from error
        matched = [name for name in names if any(end.fullmatch(name) for end in ends)]
        if not matched:
            raise UsageError(
                f"{field} in --lora_config: {key!r} matches no adapted layer; "
                f"adapted are {', '.join(sorted({_within_block(name) for name in names}))} of the blocks."
            )
        for name in matched:
            resolved.setdefault(name, value)
    return resolved


def _suffix(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _within_block(name: str) -> str:
    return name.split(".", 2)[2] if _block(name) is not None else name


def _block(name: str) -> int | None:
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def _ends_with(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def add_lora(transformer: torch.nn.Module, settings: LoraSettings, *, seed: int) -> list[torch.nn.Parameter]:
    """Freeze `transformer`, add a trainable adapter in float32, and return its parameters.

    The initial weights depend on `seed` alone, so every rank starts from the same adapter; the global RNG is left as
    it was.

    Raises:
        UsageError: a target or a block matches nothing, or a LoRA's rank is more than a layer can use.
    """
    transformer.requires_grad_(False)
    targets = resolve_target_modules(transformer, settings.target_modules, settings.layers_to_transform)
    names = [name for name, _ in transformer.named_modules() if any(_ends_with(name, target) for target in targets)]
    ranks = resolve_pattern(names, settings.rank_pattern, field="rank_pattern")
    if settings.adapter_type == "lora":
        _check_ranks(transformer, {name: ranks.get(name, settings.r) for name in names})
    common = {
        "r": settings.r,
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": resolve_pattern(names, settings.alpha_pattern, field="alpha_pattern"),
    }
    config = ADAPTER_TYPES[settings.adapter_type](settings, common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    # On a bf16 base PEFT makes bf16 adapters, too coarse for Adam's small steps.
    cast_training_params(transformer, dtype=torch.float32)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def lora_state_dict(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights by PEFT name, contiguous on the CPU."""
    # Only what is trained: FSDP gives the state of a whole model to all processes or none, and one process saves.
    trained = {name: tensor for name, tensor in transformer.named_parameters() if tensor.requires_grad}
    state_dict = get_peft_model_state_dict(transformer, state_dict=trained)
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in state_dict.items()}


def save_lora(transformer: torch.nn.Module, directory: Path) -> None:
    """Write `pytorch_lora_weights.safetensors` with the adapter metadata that keeps alpha when diffusers loads it.

    Equal adapters make equal files. The dropout is not part of them: diffusers leaves the layers that it loads in
    training mode, and would drop while generating.
    """
    metadata = _collate_lora_metadata({"transformer": transformer})
    for values in metadata.values():  # sets have another order in every process
        values.update({name: sorted(value) for name, value in values.items() if isinstance(value, set)})
        values.update(dict.fromkeys(values.keys() & {"lora_dropout", "rank_dropout"}, 0.0))

    def write(temporary: Path) -> None:
        AceStepPipeline.save_lora_weights(
            temporary.parent,
            weight_name=temporary.name,
            transformer_lora_layers=lora_state_dict(transformer),
            **metadata,
        )
        sort_metadata(temporary)

    write_atomically(Path(directory) / LORA_WEIGHTS_NAME, write)
