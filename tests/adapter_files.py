"""Adapter files as each trainer writes them, and what each of them does to a layer by that trainer's own formula.

Key names, metadata, dtypes and formulas are spelt out here from the trainers' code, independently of the code under
test; files of PEFT (the official trainer, Side-Step) are written by PEFT itself.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import save_file

from tests.original_layout import original_name

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# How LyCORIS (and ai-toolkit) factorise the widths of the tiny model's attention: near the root, the smaller first.
FACTORS = {64: (8, 8), 32: (4, 8)}
Deltas = dict[str, torch.Tensor]


@dataclass
class Written:
    """What to load, and the difference that it makes to the weight of each of the transformer's layers."""

    source: Path
    deltas: Deltas


def original_layer(name: str) -> str:
    """diffusers' name of a layer of the transformer -> the original decoder's."""
    return original_name("transformer", f"{name}.weight").removeprefix("decoder.").removesuffix(".weight")


def linears(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}


class Names(dict):
    """Original name -> diffusers' name, of the linear layers."""

    def __init__(self, transformer: torch.nn.Module):
        super().__init__({original_layer(name): name for name in linears(transformer)})


def original_decoder(transformer: torch.nn.Module) -> torch.nn.Module:
    """The transformer's linear layers in a tree of the original names: what PEFT sees in the official trainer."""
    decoder = torch.nn.Module()
    for name, linear in linears(transformer).items():
        *parents, last = original_layer(name).split(".")
        parent = decoder
        for part in parents:
            if part not in dict(parent.named_children()):
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        copy = torch.nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        copy.load_state_dict(linear.state_dict())
        parent.add_module(last, copy)
    return decoder


def randomise(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """As if trained: every adapter's parameters away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
        elif any(part in name for part in ("lora_", "lokr_", "hada_", "oft_")):
            parameter.data = std * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def difference(layer: torch.nn.Module) -> torch.Tensor:
    """What an adapted layer does beyond its base layer, `[out, in]`, by its own forward pass."""
    base = layer.get_base_layer()
    eye = torch.eye(base.in_features)
    return (layer(eye) - base(eye)).T


def differences(model: torch.nn.Module) -> Deltas:
    """Of every adapted layer, by name; of nested ones the outermost."""
    found = {name: module for name, module in model.named_modules() if hasattr(module, "get_base_layer")}
    return {name: difference(module) for name, module in found.items() if ".base_layer" not in name}


# ---------------------------------------------------------------------------------------------------------------------
# PEFT: the official trainer and Side-Step


def peft_folder(transformer: torch.nn.Module, directory: Path, config) -> Written:
    """`decoder.save_pretrained(directory)` of the official trainer, with any of PEFT's configurations."""
    model = get_peft_model(original_decoder(transformer), config).eval()
    randomise(model, std=0.05 if config.peft_type == "OFT" else 0.2)
    model.save_pretrained(directory)
    names = Names(transformer)
    deltas = {names[name.removeprefix("base_model.model.")]: d for name, d in differences(model).items()}
    return Written(directory, deltas)


def lora(**changes) -> LoraConfig:
    """The official trainer's configuration; alpha is twice the rank by default there."""
    values = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ATTENTION, "bias": "none"}
    return LoraConfig(**values | {"task_type": TaskType.FEATURE_EXTRACTION} | changes)


PEFT_CONFIGS: dict[str, Callable] = {
    "official trainer": lora,
    "only v and o": lambda: lora(target_modules=["v_proj", "o_proj"]),
    "only mlp": lambda: lora(target_modules=["gate_proj", "up_proj", "down_proj"]),
    "outside the blocks too": lambda: lora(
        target_modules=["q_proj", "condition_embedder", "time_embed.linear_1", "time_embed_r.time_proj"]
    ),
    "rslora": lambda: lora(use_rslora=True, lora_alpha=6),
    "dora": lambda: lora(use_dora=True),
    "patterns": lambda: lora(
        rank_pattern={"layers.0.self_attn.q_proj": 2, "v_proj": 6, r"layers\.3\.cross_attn\..*": 3},
        alpha_pattern={"layers.1.cross_attn.o_proj": 5, "k_proj": 12},
    ),
    "loha": lambda: LoHaConfig(r=3, alpha=5, target_modules=ATTENTION, alpha_pattern={"v_proj": 2}),
    "lokr": lambda: LoKrConfig(r=2, alpha=6, target_modules=ATTENTION),
    "lokr of two products": lambda: LoKrConfig(
        r=2, alpha=3, decompose_both=True, decompose_factor=16, target_modules=["q_proj", "up_proj"]
    ),
    "lokr of whole factors": lambda: LoKrConfig(r=64, alpha=32, target_modules=ATTENTION),
    "oft": lambda: OFTConfig(r=0, oft_block_size=8, target_modules=ATTENTION),
    "oft exact and shared": lambda: OFTConfig(
        r=4, oft_block_size=0, block_share=True, use_cayley_neumann=False, target_modules=["q_proj", "down_proj"]
    ),
}


def side_step_fallback(transformer: torch.nn.Module, directory: Path) -> Written:
    """Side-Step where PEFT can't save: parameters by their own names, `.default.` and all, and a made-up config."""
    model = get_peft_model(original_decoder(transformer), lora(lora_alpha=4)).eval()
    randomise(model)
    directory.mkdir()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none", "task_type": None,
              "base_model_name_or_path": "", "_sidestep_fallback": True}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    names = Names(transformer)
    deltas = {names[name.removeprefix("base_model.model.")]: d for name, d in differences(model).items()}
    return Written(directory, deltas)


def diffsynth(transformer: torch.nn.Module, directory: Path) -> Written:
    """DiffSynth-Studio: `inject_adapter_in_model`, the trainable parameters by name, alpha the rank, no metadata."""
    decoder = original_decoder(transformer)
    targets = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    model = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=targets), decoder).eval()
    randomise(model)
    directory.mkdir()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    assert all(".lora_A.default.weight" in name or ".lora_B.default.weight" in name for name in weights)
    save_file(weights, directory / "epoch-0.safetensors")
    names = Names(transformer)
    return Written(directory, {names[name]: delta for name, delta in differences(model).items()})


def simpletuner(transformer: torch.nn.Module, directory: Path) -> Written:
    """SimpleTuner: PEFT's state dict over the whole model, in diffusers' file name; no alpha (by default the rank)."""
    whole = torch.nn.Module()
    whole.decoder = original_decoder(transformer)
    model = get_peft_model(whole, LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION)).eval()
    randomise(model)
    directory.mkdir()
    weights = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    assert all(name.startswith("base_model.model.decoder.layers.") for name in weights)
    metadata = {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "ace-step/lora"}
    save_file(weights, directory / "pytorch_lora_weights.safetensors", metadata=metadata)
    names = Names(transformer)
    prefix = "base_model.model.decoder."
    return Written(directory, {names[name.removeprefix(prefix)]: d for name, d in differences(model).items()})


# ---------------------------------------------------------------------------------------------------------------------
# Files with names of their own


def _targets(transformer: torch.nn.Module, endings=tuple(ATTENTION)) -> dict[str, tuple[str, torch.nn.Linear]]:
    """Original name -> diffusers' name and the layer."""
    found = {original_layer(name): (name, layer) for name, layer in linears(transformer).items()}
    return {name: pair for name, pair in found.items() if name.startswith("layers.") and name.endswith(endings)}


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=generator)


def _dora(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """m · (W + Δ) / ‖W + Δ‖ − W, norms of rows."""
    updated = weight + delta
    return magnitude[:, None] * updated / updated.norm(dim=1, keepdim=True) - weight


def _write(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def ai_toolkit(transformer: torch.nn.Module, directory: Path, network: str = "lora") -> Written:
    """ai-toolkit: `diffusion_model.` for `transformer.`, float16, alpha is the rank and not written; a LoKr has one.

    The alpha of a LoKr with whole factors ("full rank") is a huge number, which float16 can't hold.
    """
    generator, tensors, deltas = torch.Generator().manual_seed(3), {}, {}
    for index, (original, (name, layer)) in enumerate(_targets(transformer).items()):
        key, weight = f"diffusion_model.decoder.{original}", layer.weight.detach()
        out, inputs = weight.shape
        if network == "lokr":
            (a, b), (c, d) = FACTORS[out], FACTORS[inputs]
            w1, alpha, rank = _random(generator, a, c).half(), 4.0, 2
            tensors[f"{key}.lokr_w1"] = w1
            if index % 2:
                w2, alpha = _random(generator, b, d).half(), 9999999999.0
                tensors[f"{key}.lokr_w2"] = w2
                scale, w2 = 1.0, w2.float()
            else:
                w2_a, w2_b = _random(generator, b, rank).half(), _random(generator, rank, d).half()
                tensors |= {f"{key}.lokr_w2_a": w2_a, f"{key}.lokr_w2_b": w2_b}
                scale, w2 = alpha / rank, w2_a.float() @ w2_b.float()
            tensors[f"{key}.alpha"] = torch.tensor(alpha).half()
            deltas[name] = torch.kron(w1.float(), w2) * scale
            continue
        down, up = _random(generator, 4, inputs).half(), _random(generator, out, 4).half()
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        deltas[name] = up.float() @ down.float()
        if network == "dora":
            magnitude = (weight.norm(dim=1) * (1 + 0.1 * torch.rand(out, generator=generator))).half()
            tensors[f"{key}.magnitude"] = magnitude
            deltas[name] = _dora(weight, deltas[name], magnitude.float())
    metadata = {"format": "pt", "software": '{"name": "ai-toolkit"}', "sshs_model_hash": "0", "ss_output_name": "x"}
    _write(directory / "my_lora.safetensors", tensors, metadata)
    return Written(directory / "my_lora.safetensors", deltas)


def comfyui(transformer: torch.nn.Module, directory: Path, style: str = "native") -> Written:
    """ComfyUI: `lora_down/up` with an alpha for each layer; prefixes of Side-Step's two exports, and kohya's names.

    `dora` is Side-Step's native export of a DoRA, whose `dora_scale` is `[out]`.
    """
    generator, tensors, deltas = torch.Generator().manual_seed(4), {}, {}
    for index, (original, (name, layer)) in enumerate(_targets(transformer).items()):
        key = {
            "native": f"base_model.model.{original}",
            "dora": f"base_model.model.{original}",
            "generic": f"diffusion_model.decoder.{original}",
            "kohya": f"lora_unet_decoder_{original.replace('.', '_')}",
        }[style]
        rank, alpha, weight = 2 + index % 3, float(1 + index % 5), layer.weight.detach()
        down, up = _random(generator, rank, layer.in_features), _random(generator, layer.out_features, rank)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        deltas[name] = up @ down * alpha / rank
        if style == "dora":
            magnitude = weight.norm(dim=1) * (1 + 0.1 * torch.rand(layer.out_features, generator=generator))
            tensors[f"{key}.dora_scale"] = magnitude
            deltas[name] = _dora(weight, deltas[name], magnitude)
    _write(directory / "jazz_comfyui.safetensors", tensors)
    return Written(directory / "jazz_comfyui.safetensors", deltas)


def _factors(generator, shape: tuple[int, int], rank: int | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A factor of a LoKr: whole, or `_a` and `_b` of a rank; and what it is."""
    if rank is None:
        whole = _random(generator, *shape)
        return {"": whole}, whole
    left, right = _random(generator, shape[0], rank), _random(generator, rank, shape[1])
    return {"_a": left, "_b": right}, left @ right


def lycoris(transformer: torch.nn.Module, directory: Path, algo: str = "lokr") -> Written:
    """LyCORIS over the decoder, as Side-Step uses it: `lycoris_layers_0_self_attn_q_proj.…`, an alpha for each layer.

    rsLoRA's alpha is stored times the root of the rank, so that alpha / rank stays the scale (LokrModule.__init__); a
    LoKr of whole factors has none. OFT: R = (I + Q)(I − Q)⁻¹ of skew-symmetric Q = B − Bᵀ, and W' = rescale · RᵀW by
    blocks of rows.
    """
    generator, tensors, deltas = torch.Generator().manual_seed(5), {}, {}
    for original, (name, layer) in _targets(transformer).items():
        key, weight = f"lycoris_{original.replace('.', '_')}", layer.weight.detach()
        out, inputs = weight.shape
        rank, alpha = 3, 5.0
        if algo.startswith("lokr"):
            outs, ins = FACTORS[out][:: -1 if "unbalanced" in algo else 1], FACTORS[inputs]
            first, w1 = _factors(generator, (outs[0], ins[0]), rank if "both" in algo else None)
            second, w2 = _factors(generator, (outs[1], ins[1]), None if "full" in algo else rank)
            tensors |= {f"{key}.lokr_w1{end}": part for end, part in first.items()}
            tensors |= {f"{key}.lokr_w2{end}": part for end, part in second.items()}
            alpha = alpha * math.sqrt(rank) if "rslora" in algo else alpha
            deltas[name] = torch.kron(w1, w2) * (1.0 if algo == "lokr full" else alpha / rank)
        elif algo.startswith("loha"):
            parts = {f"hada_{w}_{end}": _random(generator, *((out, rank) if end == "a" else (rank, inputs)))
                     for w in ("w1", "w2") for end in "ab"}  # fmt: skip
            tensors |= {f"{key}.{part}": tensor for part, tensor in parts.items()}
            products = [parts[f"hada_{w}_a"] @ parts[f"hada_{w}_b"] for w in ("w1", "w2")]
            deltas[name] = products[0] * products[1] * alpha / rank
        elif algo == "locon":
            down, up = _random(generator, rank, inputs), _random(generator, out, rank)
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            deltas[name] = up @ down * alpha / rank
        elif algo == "full":
            deltas[name] = tensors[f"{key}.diff"] = _random(generator, out, inputs)
            continue
        else:  # diag-oft
            blocks, alpha = _random(generator, 8, out // 8, out // 8) / 4, 0.01 if "constraint" in algo else 0.0
            skew = blocks - blocks.transpose(1, 2)
            if alpha and skew.norm() > alpha * out:
                skew = skew * alpha * out / skew.norm()
            eye, rescale = torch.eye(out // 8), 1 + _random(generator, out, 1)
            rotation = (eye + skew) @ torch.linalg.inv(eye - skew)
            rotated = torch.cat([r.T @ rows for r, rows in zip(rotation, weight.split(out // 8), strict=True)])
            tensors |= {f"{key}.oft_blocks": blocks, f"{key}.rescale": rescale}
            deltas[name] = rescale * rotated - weight
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        if "dora" in algo:
            magnitude = weight.norm(dim=1, keepdim=True) * (1 + 0.1 * torch.rand(out, 1, generator=generator))
            tensors[f"{key}.dora_scale"] = magnitude
            deltas[name] = _dora(weight, deltas[name], magnitude[:, 0])
    kind = "loha" if algo.startswith("loha") else "lokr"
    _write(directory / f"{kind}_weights.safetensors", tensors, {"algo": kind, "format": "lycoris"})
    return Written(directory, deltas)


LYCORIS_ALGOS = (
    "lokr", "lokr both", "lokr full", "lokr full both", "lokr unbalanced", "lokr rslora", "lokr dora", "loha",
    "loha dora", "locon", "full", "diag-oft", "diag-oft constraint",
)  # fmt: skip

# Name -> writes the file to a new directory, for a transformer.
FAMILIES: dict[str, Callable[[torch.nn.Module, Path], Written]] = {
    **{
        f"PEFT, {name}": lambda transformer, directory, make=make: peft_folder(transformer, directory, make())
        for name, make in PEFT_CONFIGS.items()
    },
    "Side-Step, fallback": side_step_fallback,
    "DiffSynth": diffsynth,
    "SimpleTuner": simpletuner,
    **{
        f"ai-toolkit, {network}": lambda t, d, network=network: ai_toolkit(t, d, network)
        for network in ("lora", "dora", "lokr")
    },
    **{
        f"ComfyUI, {style}": lambda t, d, style=style: comfyui(t, d, style)
        for style in ("native", "generic", "kohya", "dora")
    },
    **{f"LyCORIS, {algo}": lambda t, d, algo=algo: lycoris(t, d, algo) for algo in LYCORIS_ALGOS},
}
