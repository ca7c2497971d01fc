"""Key names of adapter files: which layer of the transformer a key means, and whose file it is.

Facts from the trainers' own code: the official trainer and Side-Step save PEFT's names over the decoder
(`base_model.model.layers.…`), SimpleTuner over the whole model (`base_model.model.decoder.layers.…`), DiffSynth-Studio
PEFT's names with the adapter's (`layers.….lora_A.default.weight`), ai-toolkit `diffusion_model.decoder.layers.…`;
ComfyUI reads `diffusion_model.decoder.…`, `base_model.model.…`, `lora_unet_decoder_…` and `lycoris_…`.
"""

import re

from ...checkpoint_conversion import MODULE_RENAMES

# What may stand before a layer's name, in any order.
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "ace_step_transformer.",
    "transformer.",
    "pipe.dit.",
    "dit.",
    "decoder.",
)
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", "ace_step_transformer_", "decoder_")

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "o_proj")
_OUTSIDE_BLOCKS = (
    *(f"{embed}.{part}" for embed in ("time_embed_r", "time_embed") for part in ("linear_1", "linear_2", "time_proj")),
    "condition_embedder",
    "proj_in_conv",
    "proj_out_conv",
    "proj_in.1",
    "proj_out.1",
)
_LAYER = re.compile(
    rf"layers\.\d+\.(?:(?:self_attn|cross_attn)\.(?:{'|'.join(map(re.escape, _ATTENTION))})"
    rf"|mlp\.(?:gate|up|down)_proj)|{'|'.join(map(re.escape, _OUTSIDE_BLOCKS))}"
)
# With underscores for dots: the number and the names inside them tell where the dots were.
_FLAT_NAMES = {name.replace(".", "_"): name for name in (*_ATTENTION, *_OUTSIDE_BLOCKS)}
_FLAT_LAYER = re.compile(
    r"layers_(?P<number>\d+)_(?P<part>self_attn|cross_attn|mlp)_(?P<name>[a-z_0-9]+)|(?P<outside>[a-z_0-9]+)"
)

# End of a key -> the tensor's name in the record. `.default` and the like is an adapter's name in PEFT.
_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"
_ENDINGS = [
    (re.compile(rf"(?:\.lora_A|\.lora_down|[._]lora\.down){_ADAPTER}(?:\.weight)?$"), "lora_A"),
    (re.compile(rf"(?:\.lora_B|\.lora_up|[._]lora\.up){_ADAPTER}(?:\.weight)?$"), "lora_B"),
    (re.compile(rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?$|\.dora_scale$|\.magnitude$"), "magnitude"),
    (re.compile(r"\.alpha$"), "alpha"),
    (re.compile(rf"\.(?P<name>lokr_(?:w[12](?:_[ab])?|t2)|hada_(?:w[12]_[ab]|t[12])){_ADAPTER}$"), None),
    (re.compile(rf"\.oft_R{_ADAPTER}(?:\.weight)?$"), "oft_R"),
    (re.compile(r"\.(?P<name>oft_blocks|rescale|diff)$"), None),
]

# Patterns of keys -> what such a file is an adapter for.
_OTHER_MODELS = [
    (r"lyric_encoder\.encoders|lyric_embs|lyric_proj|speaker_embedder|genre_embedder"
     r"|transformer_blocks[._]\d+[._]cross_attn", "ACE-Step v1, whose adapters don't fit 1.5"),
    (r"(?:lyric|timbre)_encoder|text_projector", "the condition encoder, which no adapter changes here"),
    (r"down_blocks|mid_block|input_blocks|output_blocks|lora_te\d?_|^unet\.", "Stable Diffusion (a UNet)"),
    (r"single_transformer_blocks|double_blocks|single_blocks", "Flux"),
    (r"joint_blocks|transformer_blocks\.\d+\.attn\.", "Stable Diffusion 3 or another image model"),
    (r"(?:^|\.)model\.layers\.\d+\.", "a language model"),
    (r"(?:^|\.)blocks\.\d+\.", "a video model"),
]  # fmt: skip


def split_key(key: str) -> tuple[str, str] | None:
    """A key -> what stands before the tensor's name, and that name in the record (`alpha` for an alpha)."""
    for pattern, name in _ENDINGS:
        if match := pattern.search(key):
            return key[: match.start()], name or match["name"]
    return None


def layer_name(path: str) -> str | None:
    """A layer's name in any spelling, with any prefix -> diffusers' name; None if it is none of the transformer's."""
    stripped = _strip(path, _PREFIXES)
    if _LAYER.fullmatch(stripped):
        return _respell(stripped)
    if "." in path:
        return None
    match = _FLAT_LAYER.fullmatch(_strip(path, _FLAT_PREFIXES))
    if match is None:
        return None
    if match["outside"]:
        name = _FLAT_NAMES.get(match["outside"])
        return _respell(name) if name in _OUTSIDE_BLOCKS else None
    last = _FLAT_NAMES.get(match["name"], match["name"])
    candidate = f"layers.{match['number']}.{match['part']}.{last}"
    return _respell(candidate) if _LAYER.fullmatch(candidate) else None


def original_name(layer: str) -> str:
    """diffusers' name of a layer -> the original files' and the peers'."""
    name = f".{layer}."
    for original, renamed in MODULE_RENAMES.items():
        name = name.replace(f".{renamed}.", f".{original}.")
    return name.strip(".")


def other_model(keys: list[str]) -> str | None:
    """What an adapter with these keys is for, if it is a model that is known and not this one."""
    for pattern, model in _OTHER_MODELS:
        if any(re.search(pattern, key) for key in keys):
            return model
    return None


def family(keys: list[str], *, has_config: bool, has_metadata: bool) -> str:
    """Whose format this is, for a person."""
    text = "\n".join(keys)
    if has_config:
        return "PEFT"
    if has_metadata:
        return "diffusers"
    if re.search(r"\.(lokr|hada)_|\.oft_blocks", text) and re.search(r"^lycoris_", text, re.MULTILINE):
        return "LyCORIS"
    if re.search(r"^base_model\.model\.decoder\.", text, re.MULTILINE):
        return "SimpleTuner"
    if re.search(r"lora_(down|up)|dora_scale|^lora_unet_", text, re.MULTILINE):
        return "ComfyUI"
    if re.search(r"^diffusion_model\.", text, re.MULTILINE):
        return "ai-toolkit"
    if re.search(r"\.lora_A\.[^.]+\.weight$", text, re.MULTILINE):
        return "DiffSynth"
    if re.search(r"^base_model\.model\.", text, re.MULTILINE):
        return "PEFT"
    return "diffusers" if re.search(r"^transformer\.", text, re.MULTILINE) else "unknown"


def _strip(name: str, prefixes: tuple[str, ...]) -> str:
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _respell(name: str) -> str:
    name = f".{name}."
    for original, renamed in MODULE_RENAMES.items():
        name = name.replace(f".{original}.", f".{renamed}.")
    return name.strip(".")
