"""What an adapter is: its kind, where it goes, its ranks; from flags or a JSON file. Imports no torch."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from peft import PeftConfig

# The attention projections of every block, as diffusers names them: what the official trainer adapts.
DEFAULT_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
# Names for several targets at once; `attention+mlp` is both.
TARGET_SETS = {
    "attention": DEFAULT_TARGET_MODULES,
    "self": tuple(f"self_attn.{name}" for name in DEFAULT_TARGET_MODULES),
    "cross": tuple(f"cross_attn.{name}" for name in DEFAULT_TARGET_MODULES),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
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
MAX_LOKR_DROPOUT = 0.5
# The width of XL's DiT, the widest: an update of this rank can be any there is.
MAX_RANK = 2560


@dataclass(frozen=True)
class LoraSettings:
    """An adapter's architecture; the fields of a `--lora_config` JSON file.

    LoRA's update of a layer is `B·A · lora_alpha / r` (`/ sqrt(r)` with `use_rslora`); with `use_dora` the norms of
    the updated weight's rows are trained as well. LoKr's is the Kronecker product `W1 ⊗ W2 · lora_alpha / r`, where W1
    is about `lokr_factor` wide (-1: both about equally wide, the smallest) and a factor is itself a product of rank r
    where r is below half its width (W2; W1 with `lokr_decompose_both`).

    `rank_pattern` and `alpha_pattern` give some layers another rank or alpha. Their keys are sets (`cross`), names in
    any spelling (`cross_attn.q_proj`) or regular expressions that match the end of a layer's name
    (`layers\\.[0-3]\\..*`); the first that matches a layer counts. `layers_to_transform` is which blocks to adapt
    (None: all).
    """

    r: int = 64
    lora_alpha: float = 128.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = DEFAULT_TARGET_MODULES
    use_rslora: bool = False
    use_dora: bool = False
    adapter_type: str = "lora"
    lokr_factor: int = -1
    lokr_decompose_both: bool = False
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        ranks = {"--rank, or r in --lora_config": self.r} | _named("rank_pattern", self.rank_pattern)
        alphas = {"--lora_alpha": self.lora_alpha} | _named("alpha_pattern", self.alpha_pattern)
        for where, rank in ranks.items():
            if not 1 <= rank <= MAX_RANK:
                raise UsageError(
                    f"the LoRA rank must be between 1 and {MAX_RANK}, the width of XL, the widest model, not {rank} "
                    f"({where})."
                )
        for where, alpha in alphas.items():
            if not 0 < alpha < math.inf:
                raise UsageError(f"the LoRA alpha must be positive and finite, not {alpha} ({where}).")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"the LoRA dropout must be in [0, 1), not {self.lora_dropout} (--lora_dropout).")
        if not self.target_modules:
            raise UsageError("the LoRA has no target modules (--lora_layers, or target_modules in --lora_config).")
        if self.adapter_type not in ADAPTER_TYPES:
            raise UsageError(f"--adapter_type must be one of {', '.join(ADAPTER_TYPES)}, not {self.adapter_type!r}.")
        if self.adapter_type == "lokr":
            self._check_lokr()
        elif (self.lokr_factor, self.lokr_decompose_both) != (-1, False):
            raise UsageError("--lokr_factor and --lokr_decompose_both are for --adapter_type lokr; leave them out.")

    def _check_lokr(self) -> None:
        if self.use_rslora or self.use_dora:
            flag = "--use_dora" if self.use_dora else "--use_rslora"
            raise UsageError(f"{flag} is a kind of LoRA; leave it out with --adapter_type lokr.")
        if self.lokr_factor != -1 and self.lokr_factor < 1:
            raise UsageError(f"--lokr_factor must be -1 (about the square root) or positive, not {self.lokr_factor}.")
        if self.lora_dropout > MAX_LOKR_DROPOUT:
            raise UsageError(
                f"--lora_dropout drops whole rows of a LoKr update and must be at most {MAX_LOKR_DROPOUT} there, "
                f"not {self.lora_dropout}."
            )


def _named(field_name: str, pattern: dict) -> dict:
    return {f"{field_name}[{key!r}] in --lora_config": value for key, value in pattern.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of adapters


def _lora(settings: LoraSettings, common: dict) -> "PeftConfig":
    from peft import LoraConfig

    return LoraConfig(
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True,
        **common,
    )


def _lokr(settings: LoraSettings, common: dict) -> "PeftConfig":
    from peft import LoKrConfig

    # Rescaled, so that what is trained with dropout is, on average, what is used without.
    return LoKrConfig(
        alpha=settings.lora_alpha,
        rank_dropout=settings.lora_dropout,
        rank_dropout_scale=True,
        decompose_factor=settings.lokr_factor,
        decompose_both=settings.lokr_decompose_both,
        init_weights=True,
        **common,
    )


# `--adapter_type` -> PEFT's config from the settings and, resolved for a model, `r, target_modules, rank_pattern,
# alpha_pattern`.
ADAPTER_TYPES: dict[str, Callable[[LoraSettings, dict], "PeftConfig"]] = {"lora": _lora, "lokr": _lokr}


def describe(settings: LoraSettings) -> dict:
    """The settings as plain JSON values."""
    return {**dataclasses.asdict(settings), "target_modules": list(settings.target_modules)}


def describe_kind(settings: dict) -> tuple[str, str]:
    """Name of the kind, and ranks and scale, for a person; of settings as `describe` gives them."""
    kind = "LoKr" if settings["adapter_type"] == "lokr" else "DoRA" if settings["use_dora"] else "LoRA"
    parts = [f"rank {settings['r']}", f"alpha {settings['lora_alpha']:g}", f"dropout {settings['lora_dropout']:g}"]
    parts += ["rank-stabilised"] if settings["use_rslora"] else []
    parts += [f"factor {settings['lokr_factor']}"] if kind == "LoKr" else []
    for name in ("rank", "alpha"):
        parts += [f"{name} {value} in {key}" for key, value in settings[f"{name}_pattern"].items()]
    return kind, ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_lora_config(path: str | Path) -> dict:
    """The fields that a LoRA JSON file (also one at an `s3://` or `hf://` address) sets, checked for names and types.

    Raises:
        UsageError: the file is missing or no JSON object, or a field is unknown or of another type.
    """
    from ..storage.copies import local_file

    try:
        values = json.loads(local_file(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--lora_config {path} can't be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--lora_config {path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise UsageError(f"--lora_config {path} must hold a JSON object with {', '.join(_FIELD_TYPES)}.")
    for name, value in values.items():
        if name not in _FIELD_TYPES:
            raise UsageError(f"--lora_config {path}: unknown field {name!r}; known are {', '.join(_FIELD_TYPES)}.")
        if not _fits(name, value):
            raise UsageError(f"--lora_config {path}: {name} has the wrong type ({value!r}).")
    if "target_modules" in values:
        values["target_modules"] = parse_targets(values["target_modules"])
    if "layers_to_transform" in values:
        values["layers_to_transform"] = parse_blocks(values["layers_to_transform"])
    return values


# Field -> its types; and those of what a list or an object holds.
_FIELD_TYPES = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (list, str),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "adapter_type": (str,),
    "lokr_factor": (int,),
    "lokr_decompose_both": (bool,),
    "layers_to_transform": (list, str),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
}
_ELEMENT_TYPES = {
    "target_modules": (str,),
    "layers_to_transform": (int,),
    "rank_pattern": (int,),
    "alpha_pattern": (int, float),
}


def _fits(name: str, value: object) -> bool:
    held = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    pairs = [(value, _FIELD_TYPES[name]), *((element, _ELEMENT_TYPES[name]) for element in held)]
    # In Python True is an int.
    return all(isinstance(item, types) and isinstance(item, bool) == (bool in types) for item, types in pairs)


def parse_targets(targets: str | list[str]) -> tuple[str, ...]:
    """Names and sets (`TARGET_SETS`), separated by commas or plus signs, or a list of them, as a tuple of names."""
    text = targets if isinstance(targets, str) else ",".join(targets)
    names = [name.strip() for name in re.split("[,+]", text)]
    expanded = [target for name in names if name for target in TARGET_SETS.get(name, (name,))]
    return tuple(dict.fromkeys(expanded))


def parse_blocks(blocks: str | list[int] | None) -> tuple[int, ...] | None:
    """Block numbers and ranges, both ends included (`0-11,20`), or a list of numbers; None, for all, stays None.

    Raises:
        UsageError: it is neither.
    """
    if blocks is None:
        return None
    numbers: set[int] = set()
    for part in blocks.split(",") if isinstance(blocks, str) else map(str, blocks):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UsageError(f"--lora_blocks takes numbers and ranges such as 0-11,20; {part!r} is neither.")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def respell(name: str) -> str:
    """A layer's name, or the end of one, with its last part as diffusers spells it."""
    if name.endswith("to_out.0"):
        return name
    *parents, last = name.split(".")
    return ".".join([*parents, TARGET_SPELLINGS.get(last, last)])
