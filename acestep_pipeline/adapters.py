"""LoRA: its settings, where it goes, and the file it becomes."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AceStepPipeline
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoraConfig, get_peft_model_state_dict

from .errors import UsageError
from .files import sort_metadata, write_atomically
from .paths import LORA_WEIGHTS_NAME

# The attention projections of every block, as diffusers names them: what the official trainer adapts.
DEFAULT_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
# Spellings of the original files and of ACE-Step v1 -> diffusers' names.
TARGET_SPELLINGS = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "o_proj": "to_out.0",
    "linear_q": "to_q",
    "linear_k": "to_k",
    "linear_v": "to_v",
    "to_out": "to_out.0",
}


@dataclass(frozen=True)
class LoraSettings:
    """LoRA architecture, the fields of a `--lora_config` JSON file. The weight delta is scaled by
    `lora_alpha / r` (`lora_alpha / sqrt(r)` with `use_rslora`)."""

    r: int = 64
    lora_alpha: float = 128.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = DEFAULT_TARGET_MODULES
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self):
        if self.r < 1:
            raise UsageError(f"the LoRA rank must be at least 1, not {self.r} (--rank, or r in --lora_config).")
        if not 0 < self.lora_alpha < math.inf:
            raise UsageError(f"the LoRA alpha must be positive and finite, not {self.lora_alpha} (--lora_alpha).")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"the LoRA dropout must be in [0, 1), not {self.lora_dropout} (--lora_dropout).")
        if not self.target_modules:
            raise UsageError("the LoRA has no target modules (--lora_layers, or target_modules in --lora_config).")


def read_lora_config(path: Path) -> dict:
    """The fields that a LoRA JSON file sets, checked for names and types.

    Raises:
        UsageError: the file is missing or no JSON object, or a field is unknown or of another type.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--lora_config {path} can't be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--lora_config {path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise UsageError(f"--lora_config {path} must hold a JSON object with {', '.join(_FIELD_TYPES)}.")
    for name, value in values.items():
        if name not in _FIELD_TYPES:
            raise UsageError(f"--lora_config {path}: unknown field {name!r}; known are {', '.join(_FIELD_TYPES)}.")
        fits = isinstance(value, _FIELD_TYPES[name]) and isinstance(value, bool) == (_FIELD_TYPES[name] is bool)
        if not fits or (isinstance(value, list) and not all(isinstance(target, str) for target in value)):
            raise UsageError(f"--lora_config {path}: {name} has the wrong type ({value!r}).")
    if "target_modules" in values:
        values["target_modules"] = parse_targets(values["target_modules"])
    return values


_FIELD_TYPES = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (list, str),
    "use_rslora": bool,
    "use_dora": bool,
}


def parse_targets(targets: str | list[str]) -> tuple[str, ...]:
    """Comma-separated names or a list of names, as a tuple."""
    names = targets.split(",") if isinstance(targets, str) else targets
    return tuple(str(name).strip() for name in names if str(name).strip())


def resolve_target_modules(model: torch.nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Target names in any of the three spellings -> diffusers' names, each of which matches a linear layer of `model`.

    Raises:
        UsageError: a target matches nothing; the message lists what exists.
    """
    linear_names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    resolved = []
    for target in targets:
        *parents, last = target.split(".")
        name = target if target.endswith("to_out.0") else ".".join([*parents, TARGET_SPELLINGS.get(last, last)])
        if not any(full == name or full.endswith(f".{name}") for full in linear_names):
            existing = sorted({_suffix(full) for full in linear_names if full.startswith("layers.")})
            raise UsageError(
                f"the LoRA target {target!r} matches no linear layer of this transformer; "
                f"its blocks have: {', '.join(existing)} (also spelt {', '.join(TARGET_SPELLINGS)})."
            )
        if name not in resolved:
            resolved.append(name)
    return resolved


def _suffix(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def add_lora(transformer: torch.nn.Module, settings: LoraSettings, *, seed: int) -> list[torch.nn.Parameter]:
    """Freeze `transformer`, add a trainable LoRA in float32, and return its parameters.

    The initial weights depend on `seed` alone, so every rank starts from the same adapter; the global RNG is left as
    it was.
    """
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=resolve_target_modules(transformer, settings.target_modules),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    # On a bf16 base PEFT makes bf16 adapters, too coarse for Adam's small steps.
    cast_training_params(transformer, dtype=torch.float32)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def lora_state_dict(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights by PEFT name, contiguous on the CPU."""
    state_dict = get_peft_model_state_dict(transformer)
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in state_dict.items()}


def save_lora(transformer: torch.nn.Module, directory: Path) -> None:
    """Write `pytorch_lora_weights.safetensors` with the adapter metadata that keeps alpha when diffusers loads it.

    Equal adapters make equal files.
    """
    metadata = _collate_lora_metadata({"transformer": transformer})
    for values in metadata.values():  # sets have another order in every process
        values.update({name: sorted(value) for name, value in values.items() if isinstance(value, set)})

    def write(temporary: Path) -> None:
        AceStepPipeline.save_lora_weights(
            temporary.parent,
            weight_name=temporary.name,
            transformer_lora_layers=lora_state_dict(transformer),
            **metadata,
        )
        sort_metadata(temporary)

    write_atomically(Path(directory) / LORA_WEIGHTS_NAME, write)


def check_adapter_fits(state_dict: dict[str, torch.Tensor], transformer: torch.nn.Module) -> None:
    """Check an adapter (diffusers' names, `transformer.<module>.lora_A.weight`) against the layers it would go to.

    Raises:
        ValueError: none of it is for a transformer, or a layer is missing or of another width.
    """
    weights = {name: tensor for name, tensor in state_dict.items() if name.startswith("transformer.")}
    if not weights:
        raise ValueError("it has no weights for this transformer (made for another model, or by another tool?).")
    for name, tensor in weights.items():
        path, _, matrix = name.removeprefix("transformer.").partition(".lora_")
        if matrix not in ("A.weight", "B.weight"):
            continue
        try:
            layer = transformer.get_submodule(path)
        except AttributeError:
            raise ValueError(f"it has weights for {path}, a layer that this checkpoint doesn't have.") from None
        side, axis = ("in", 1) if matrix == "A.weight" else ("out", 0)
        width, expected = tensor.shape[axis], getattr(layer, f"{side}_features", None)
        if expected not in (None, width):
            raise ValueError(f"its {path} is {width} wide ({side}put), this checkpoint's is {expected}: another size.")


def describe(settings: LoraSettings) -> dict:
    """The settings as plain JSON values."""
    return {**dataclasses.asdict(settings), "target_modules": list(settings.target_modules)}
