"""An adapter file of any format -> the record, with every doubt about it said before a layer is touched."""

import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key

from ...hardware import memory_available_bytes
from .names import family, layer_name, other_model, split_key
from .record import KIND_TENSORS, MAGNITUDE, Adapter, ModuleWeights, layer_shape, lokr_rank
from .tensor_files import StoredTensors

# Layer name -> (out, in) of a transformer.
LayerShapes = Mapping[str, tuple[int, int]]

PEFT_TYPES = ("LORA", "LOKR", "LOHA", "OFT")
# Initialisations of PEFT that take a part out of the base weights.
BASE_CHANGING_STARTS = ("pissa", "olora", "corda")
XL_HIDDEN_SIZE, BASE_HIDDEN_SIZE = 2560, 2048

# Hidden sizes of adapter and checkpoint.
_WRONG_SIZES = {
    (XL_HIDDEN_SIZE, BASE_HIDDEN_SIZE): "an adapter for XL on a 2 B checkpoint",
    (BASE_HIDDEN_SIZE, XL_HIDDEN_SIZE): "an adapter for the 2 B model on XL",
}


class AdapterDoubt(ValueError):
    """What makes an adapter useless or doubtful, though it can be read; `strict=False` makes it a warning."""


@dataclass
class _Layer:
    """What a file holds for one layer: the tensor's name in the record -> its key; and its path in the file."""

    keys: dict[str, str] = field(default_factory=dict)
    path: str = ""


def read_adapter(
    stored: StoredTensors,
    *,
    config: dict | None = None,
    path: Path | None = None,
    layer_shapes: LayerShapes | None = None,
    strict: bool = True,
) -> Adapter:
    """Bring the tensors of an adapter file into the record.

    Args:
        stored: the file's tensors; only those of known layers are read, after all shapes were checked.
        config: `adapter_config.json`, for PEFT's files; {} where it is missing.
        path: the file, for the record.
        layer_shapes: of the transformer that it is for; None checks the file against itself alone.
        strict: whether a doubt is an error.

    Raises:
        ValueError: it can't be used. As `AdapterDoubt`, with `strict`: no layer, or not all of it, is for this
            transformer, or its weights are all zero.
    """
    if config == {} and not any(key.endswith(".alpha") for key in stored.shapes):
        _doubt(
            "there is no adapter_config.json beside it, without which its alpha, and so its strength, is unknown",
            strict=strict,
        )
    layers, unknown = _group(stored, layer_shapes)
    config, from_metadata = _find_config(config or None, stored.metadata)
    _check_config(config)
    _doubt_coverage(layers, unknown, stored, layer_shapes, strict=strict)
    kinds = {name: _kind(layer, name) for name, layer in layers.items()}
    for name, layer in layers.items():
        _check_shapes(name, kinds[name], {part: stored.shapes[key] for part, key in layer.keys.items()}, layer_shapes)
    if stored.size_bytes > memory_available_bytes():
        sizes = [f"{size / 1e9:.1f} GB" for size in (stored.size_bytes, memory_available_bytes())]
        raise ValueError(f"it holds {sizes[0]} of tensors, more than the memory that is free ({sizes[1]})")
    modules = {
        name: _read_layer(name, layers[name], kinds[name], stored, config) for name in sorted(layers, key=_in_order)
    }
    if modules and all(_is_zero(weights) for weights in modules.values()):
        _doubt(
            f"the weights of all its {len(modules)} layers are zero, so that it changes nothing: an adapter that was "
            "never trained, or saved wrongly",
            strict=strict,
        )
    return Adapter(
        modules,
        family=family(list(stored.shapes), has_config=bool(config) and not from_metadata, has_metadata=from_metadata),
        unknown=tuple(unknown),
        config=config,
        metadata=stored.metadata,
        path=path,
    )


def _doubt(what: str, *, strict: bool) -> None:
    if strict:
        raise AdapterDoubt(f"{what} (strict=False loads it all the same)")
    warnings.warn(f"the adapter is doubtful: {what}.", stacklevel=4)


def _in_order(name: str) -> tuple[int, str]:
    """Blocks by their numbers, after what is outside of them."""
    match = re.match(r"layers\.(\d+)\.", name)
    return (int(match[1]) if match else -1), name


# ---------------------------------------------------------------------------------------------------------------------
# Which keys are for which layer


def _group(stored: StoredTensors, layer_shapes: LayerShapes | None) -> tuple[dict[str, _Layer], list[str]]:
    """The layers of the transformer that the file has tensors for, and the keys that are for none."""
    layers: dict[str, _Layer] = defaultdict(_Layer)
    unknown = []
    for key in sorted(stored.shapes):
        split = split_key(key)
        name = layer_name(split[0]) if split else None
        if name is None or (layer_shapes is not None and name not in layer_shapes):
            unknown.append(key)
            continue
        path, part = split
        layer = layers[name]
        if part in layer.keys:
            raise ValueError(f"{layer.keys[part]} and {key} are both for {name}: several adapters in one file")
        layer.keys[part] = key
        layer.path = path
    for name in [name for name, layer in layers.items() if layer.keys.keys() <= {"alpha"}]:
        unknown += layers.pop(name).keys.values()
    return dict(layers), unknown


def _doubt_coverage(
    layers: dict[str, _Layer],
    unknown: list[str],
    stored: StoredTensors,
    layer_shapes: LayerShapes | None,
    *,
    strict: bool,
) -> None:
    expected = "layers.0.self_attn.to_q or q_proj with lora_A and lora_B, or the like"
    if not layers:
        model = other_model(list(stored.shapes))
        found = f"{len(unknown)} tensors, such as {unknown[0]}" if unknown else "no tensors"
        what = f"it is for {model}: " if model else ""
        what += f"it has no weights for this transformer; found are {found}, and expected {expected}"
        _doubt(what, strict=strict)
    elif unknown:
        names = {name for key in unknown if (split := split_key(key)) and (name := layer_name(split[0]))}
        model = other_model(unknown)
        if layer_shapes is not None and names - layer_shapes.keys():
            name = sorted(names - layer_shapes.keys())[0]
            what = f"{len(names)} of its {len(layers) + len(names)} layers are missing from this checkpoint: it has"
            what += f" weights for {name}, a layer that this checkpoint doesn't have"
        else:
            what = f"{len(unknown)} of its {len(stored.shapes)} tensors, such as {unknown[0]}, are for no layer of it"
            what += f" but for {model}" if model else f" ({expected} is expected)"
        _doubt(what, strict=strict)


def _kind(layer: _Layer, name: str) -> str:
    parts = layer.keys.keys() - {"alpha", MAGNITUDE}
    kinds = [kind for kind, tensors in KIND_TENSORS.items() if parts & set(tensors)]
    if len(kinds) != 1:
        held = ", ".join(sorted(layer.keys))
        raise ValueError(f"its {name} has {held}: that is no update of one kind")
    if extra := parts - set(KIND_TENSORS[kinds[0]]):
        raise ValueError(f"its {name} has {', '.join(sorted(extra))}, which a linear layer can't have")
    return kinds[0]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def _check_shapes(name: str, kind: str, shapes: dict[str, tuple[int, ...]], layer_shapes: LayerShapes | None) -> None:
    """Refuse what doesn't fit, by the shapes alone: nothing has been read yet."""
    try:
        widths = layer_shape(kind, shapes)
    except ValueError as error:
        raise ValueError(f"its {name} can't be used: {error}") from None
    expected = (None, None) if layer_shapes is None else layer_shapes[name]
    if any(width not in (None, wanted) for width, wanted in zip(widths, expected, strict=True) if wanted is not None):
        given, wanted = (" and ".join(map(_shown_width, sides, ("output", "input"))) for sides in (widths, expected))
        why = next((why for size, why in _WRONG_SIZES.items() if size == (widths[1], expected[1])), "another size")
        raise ValueError(f"its {name} has {given}, this checkpoint's {wanted}: {why}")
    out_width, in_width = (width or wanted for width, wanted in zip(widths, expected, strict=True))
    if kind == "lora" and shapes["lora_A"][0] > out_width + in_width:
        raise ValueError(
            f"its {name} has rank {shapes['lora_A'][0]}, more than a layer from {in_width} to {out_width} can use"
        )
    if kind == "oft" and in_width and shapes["oft_R"][0] > in_width:
        raise ValueError(f"its {name} has {shapes['oft_R'][0]} rotations of an input that is {in_width} wide")
    allowed = {(out_width,), (out_width, 1), (1, in_width)}
    if MAGNITUDE in shapes and shapes[MAGNITUDE] not in allowed:
        raise ValueError(f"its {name} has magnitudes {list(shapes[MAGNITUDE])} for a layer with {out_width} outputs")
    if shapes.get("alpha", ()) not in ((), (1,)):
        raise ValueError(f"its {name} has an alpha of shape {list(shapes['alpha'])}, not one number")


def _shown_width(width: int | None, side: str) -> str:
    return f"{width} {side}s" if width else f"any {side}s"


# ---------------------------------------------------------------------------------------------------------------------
# Tensors, ranks and alphas


def _find_config(config: dict | None, metadata: dict[str, str]) -> tuple[dict, bool]:
    """PEFT's configuration, and whether it was in the file's metadata, where diffusers puts it."""
    if config is not None:
        return config, False
    try:
        values = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except ValueError:
        raise ValueError(f"its metadata ({LORA_ADAPTER_METADATA_KEY}) is no JSON") from None
    prefix = "transformer."
    values = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return values, bool(values)


def _check_config(config: dict) -> None:
    if str(config.get("peft_type", "LORA")) not in PEFT_TYPES:
        raise ValueError(f"it is PEFT's {config['peft_type']}, and only {', '.join(PEFT_TYPES)} can be used")
    start = str(config.get("init_lora_weights", True))
    if start.startswith(BASE_CHANGING_STARTS):
        raise ValueError(f"it began as {start}, which changes the base weights too: save it as a plain LoRA with PEFT")


def _read_layer(name: str, layer: _Layer, kind: str, stored: StoredTensors, config: dict) -> ModuleWeights:
    tensors = {part: stored.load(key) for part, key in layer.keys.items()}
    for part, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"its {layer.keys[part]} holds {tensor.dtype}, not floating-point numbers")
        # A LoKr of whole factors has an alpha that means nothing, and may be too large for its type.
        if part != "alpha" and not _is_finite(tensor):
            raise ValueError(f"its {layer.keys[part]} has NaN or infinite values: it was damaged in training")
    stored_alpha = float(tensors.pop("alpha")) if "alpha" in tensors else None
    shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
    if kind in ("oft", "full"):
        return ModuleWeights(kind, tensors)
    if kind == "diag_oft":
        return ModuleWeights(kind, tensors, constraint=stored_alpha or 0.0)
    shown = {
        "lora": lambda: shapes["lora_A"][0],
        "lokr": lambda: lokr_rank(shapes),
        "loha": lambda: shapes["hada_w1_b"][0],
    }
    rank = shown[kind]()
    if stored_alpha is not None:
        # As LyCORIS and ComfyUI do: no scale for a LoKr of whole factors.
        return ModuleWeights(kind, tensors, *((1, 1.0) if rank is None else (rank, stored_alpha)))
    if not config:
        return ModuleWeights(kind, tensors, rank or 1, float(rank or 1))
    if rank is None:
        rank = _by_pattern(config, "rank_pattern", config.get("r", 1), layer, name)
    alpha_name = "lora_alpha" if kind == "lora" else "alpha"
    alpha = _by_pattern(config, "alpha_pattern", config.get(alpha_name, rank), layer, name)
    return ModuleWeights(kind, tensors, int(rank), float(alpha), bool(config.get("use_rslora")) and kind == "lora")


def _by_pattern(config: dict, field_name: str, default: float, layer: _Layer, name: str) -> float:
    """A layer's value: its pattern's, by PEFT's own rule, for the name in the file or diffusers'; else the default."""
    pattern = config.get(field_name) or {}
    for candidate in (layer.path.removeprefix("base_model.model."), name):
        value = pattern.get(get_pattern_key(list(pattern), candidate), default)
        if value != default:
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"its configuration gives {value!r} where {field_name} or its default must be positive")
    return value


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are numbers: one pass without a copy, as NaN and infinities show in the extremes."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
    return math.isfinite(low) and math.isfinite(high)


def _is_zero(weights: ModuleWeights) -> bool:
    """Whether a layer's update is zero, as one of its factors is."""
    tensors = weights.tensors
    if weights.kind in ("oft", "diag_oft", "full"):
        # A rotation by nothing.
        return not any(tensors[name].any() for name in ("oft_R", "oft_blocks", "diff") if name in tensors)
    return any(not tensor.any() for part, tensor in tensors.items() if part != MAGNITUDE)
