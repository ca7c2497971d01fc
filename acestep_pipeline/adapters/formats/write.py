"""The record -> adapter files that other programs load: diffusers, PEFT (the official trainer, Side-Step), ComfyUI."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig

from ...files import write_tensors, write_text
from ...paths import (
    COMFYUI_DIR,
    COMFYUI_ENDING,
    LORA_WEIGHTS_NAME,
    PEFT_CONFIG_NAME,
    PEFT_DIR,
    PEFT_WEIGHTS_NAME,
)
from .deltas import as_lora, needs_base
from .install import diffusers_state, is_plain_lora
from .locate import load_adapter
from .names import original_name
from .peft_configs import loha_config, lokr_config, lora_config
from .record import KIND_NAMES, MAGNITUDE, Adapter, ModuleWeights

_OFT_OPTIONS = ("r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")


def comfyui_name(name: str) -> str:
    """The file's name for an adapter of that name."""
    return re.sub(r"[^\w.-]+", "-", name) + COMFYUI_ENDING


def export(directory: Path, *, name: str, base_model: str = "") -> None:
    """Beside `pytorch_lora_weights.safetensors` in a directory, write the same adapter for PEFT and for ComfyUI."""
    adapter = load_adapter(directory / LORA_WEIGHTS_NAME, strict=False)
    write_peft(adapter, directory / PEFT_DIR, base_model=base_model)
    write_comfyui(adapter, directory / COMFYUI_DIR / comfyui_name(name))


def write_diffusers(adapter: Adapter, directory: Path) -> str | None:
    """Write `pytorch_lora_weights.safetensors`, with the metadata that keep its alphas.

    Returns:
        What had to become a LoRA, in a sentence, if anything had: diffusers has LoRA, DoRA and PEFT's LoKr.

    Raises:
        ValueError: what it does depends on the base weights.
    """
    adapter, note = _with_lora(adapter, lambda it: is_plain_lora(it) or _native_lokr(it))
    if is_plain_lora(adapter):
        state_dict, config = diffusers_state(adapter)
    else:
        tensors = _named(adapter, lambda name, part: f"transformer.{name}.{part}")
        state_dict = tensors
        config = {f"transformer.{field}": value for field, value in lokr_config(adapter).items()}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    write_tensors(directory / LORA_WEIGHTS_NAME, _contiguous(state_dict), metadata)
    return note


def write_peft(adapter: Adapter, directory: Path, *, base_model: str = "") -> str | None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, with the original files' names of layers.

    Returns, raises: as `write_diffusers`; PEFT has LoHa and its own OFT too.
    """
    kinds = {weights.kind for weights in adapter.modules.values()}
    if kinds == {"oft"}:
        config: PeftConfig = OFTConfig(
            **{name: adapter.config[name] for name in _OFT_OPTIONS if name in adapter.config},
            target_modules=sorted(map(original_name, adapter.modules)),
        )
        note = None
    else:
        adapter, note = _with_lora(adapter, lambda it: is_plain_lora(it) or _native_lokr(it) or _only(it, "loha"))
        config = (
            LoraConfig(**lora_config(adapter, original_name))
            if is_plain_lora(adapter)
            else LoHaConfig(**loha_config(adapter, original_name))
            if _only(adapter, "loha")
            else LoKrConfig(**lokr_config(adapter, original_name))
        )
    spelling = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "oft_R": "oft_R.weight",
                MAGNITUDE: "lora_magnitude_vector"}  # fmt: skip
    tensors = _named(adapter, lambda name, part: f"base_model.model.{original_name(name)}.{spelling.get(part, part)}")
    tensors = {key: t.flatten() if key.endswith("magnitude_vector") else t for key, t in tensors.items()}
    config.base_model_name_or_path, config.inference_mode = base_model, True
    values = {
        name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for name, value in config.to_dict().items()
    }
    write_tensors(directory / PEFT_WEIGHTS_NAME, _contiguous(tensors), {"format": "pt"})
    write_text(directory / PEFT_CONFIG_NAME, json.dumps(values, indent=2, sort_keys=True) + "\n")
    return note


def write_comfyui(adapter: Adapter, path: Path) -> str | None:
    """Write one file of `diffusion_model.decoder.<original name>`, which ComfyUI reads whatever its version.

    A LoRA is `lora_down`, `lora_up` and an `alpha` that holds the whole scale (of rsLoRA too); LoKr, LoHa, Diag-OFT
    and full differences have LyCORIS' names. ComfyUI has no scale for a LoKr of whole factors: there w1 takes it.

    Returns:
        A remark on what ComfyUI does otherwise, if it does.

    Raises:
        ValueError: it is PEFT's OFT, which rotates the inputs and not, as ComfyUI does, the outputs.
    """
    tensors = {}
    for name, weights in adapter.modules.items():
        key = f"diffusion_model.decoder.{original_name(name)}"
        if weights.kind == "oft":
            raise ValueError("ComfyUI has no OFT that rotates the inputs, as PEFT's does")
        parts = dict(weights.tensors)
        scale = weights.scale * weights.rank if weights.rank_stabilised else weights.alpha
        alpha = {"diag_oft": weights.constraint, "full": None}.get(weights.kind, scale)
        if weights.kind == "lokr" and {"lokr_w1", "lokr_w2"} <= parts.keys() and weights.scale != 1:
            parts["lokr_w1"] = parts["lokr_w1"].float() * weights.scale
        if MAGNITUDE in parts and parts[MAGNITUDE].ndim == 1:
            parts[MAGNITUDE] = parts[MAGNITUDE][:, None]
        spelling = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", MAGNITUDE: "dora_scale"}
        tensors |= {f"{key}.{spelling.get(part, part)}": tensor for part, tensor in parts.items()}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    write_tensors(path, _contiguous(tensors), {"format": "pt"})
    if any(MAGNITUDE in weights.tensors for weights in adapter.modules.values()):
        return "ComfyUI divides a DoRA by the norms of the base weights, not of the updated ones, and is a little off"
    return None


def _native_lokr(adapter: Adapter) -> bool:
    return _only(adapter, "lokr") and lokr_config(adapter) is not None


def _only(adapter: Adapter, kind: str) -> bool:
    return all(weights.kind == kind and not needs_base(weights) for weights in adapter.modules.values())


def _with_lora(adapter: Adapter, is_native: Callable[[Adapter], bool]) -> tuple[Adapter, str | None]:
    """The adapter itself if it is native, else one of LoRAs that make the same differences, and a sentence on that."""
    if is_native(adapter):
        return adapter, None
    modules: dict[str, ModuleWeights] = {name: as_lora(weights) for name, weights in adapter.modules.items()}
    ranks = sorted({weights.rank for weights in modules.values()})
    was = " and ".join(sorted({KIND_NAMES[kind] for kind in adapter.kinds}))
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    changed = Adapter(modules, adapter.family, metadata=adapter.metadata, path=adapter.path)
    return changed, f"{was} became a LoRA of {shown} that makes the same differences"


def _named(adapter: Adapter, key: Callable[[str, str], str]) -> dict[str, torch.Tensor]:
    return {
        key(name, part): tensor
        for name, weights in adapter.modules.items()
        for part, tensor in weights.tensors.items()
    }


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
