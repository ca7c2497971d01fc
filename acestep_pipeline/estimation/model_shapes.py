"""The shapes of ACE-Step 1.5's published models, and models of those shapes that have no weights.

Parameters are counted on PyTorch's meta device, with the real classes, so that nothing is downloaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel, AutoencoderOobleck
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from transformers import Qwen3Config, Qwen3Model

from ..checkpoint_conversion import OriginalCheckpoint, component_configs
from ..checkpoint_source import resolve_checkpoint
from ..errors import UsageError
from ..progress import quiet_loading
from ..tiny_checkpoint import TINY_NAME

# Qwen/Qwen3-Embedding-0.6B's config.json.
_QWEN3_EMBEDDING = {
    "vocab_size": 151669, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
# The vae folder of ACE-Step/Ace-Step1.5: 48 kHz stereo, 1920 samples a frame, 64 channels.
_VAE = {
    "encoder_hidden_size": 128, "downsampling_ratios": [2, 4, 4, 6, 10], "channel_multiples": [1, 2, 4, 8, 16],
    "decoder_channels": 128, "decoder_input_channels": 64, "audio_channels": 2, "sampling_rate": 48000,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ModelShape:
    """Constructor arguments of the components that training loads."""

    name: str
    transformer: dict
    condition_encoder: dict
    text_encoder: dict
    vae: dict

    def build(self, component: str) -> torch.nn.Module:
        """`transformer`, `condition_encoder`, `text_encoder` or `vae`, on the meta device."""
        with torch.device("meta"), quiet_loading():
            if component == "text_encoder":
                return Qwen3Model(Qwen3Config(**self.text_encoder))
            cls = {
                "transformer": AceStepTransformer1DModel,
                "condition_encoder": AceStepConditionEncoder,
                "vae": AutoencoderOobleck,
            }[component]
            return cls.from_config(getattr(self, component))


# The 2 B models (base, sft, turbo) are the defaults of diffusers' classes. XL's numbers are those of its config.json;
# the DiT and its encoders come to 4,987 M parameters, the 9.98 GB of its bfloat16 file.
SHAPES = {
    "2b": ModelShape("2b", {}, {}, _QWEN3_EMBEDDING, _VAE),
    "xl": ModelShape(
        "xl",
        {
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "encoder_hidden_size": 2048,
        },
        {}, _QWEN3_EMBEDDING, _VAE,
    ),
}  # fmt: skip


def choose_shape(config: str | None, checkpoint: str, variant_dir: str | None = None) -> ModelShape:
    """The shape to estimate for: `config` if given, a folder's own, else what the name of a Hub model says.

    Args:
        config: `2b` or `xl`.
        checkpoint: as `--pretrained_model_name_or_path`; nothing is downloaded.
        variant_dir: which DiT of an original-layout folder.

    Raises:
        UsageError: `checkpoint` looks like a folder and is none, or is no checkpoint.
    """
    if config is not None:
        return SHAPES[config]
    if checkpoint == TINY_NAME or Path(checkpoint).expanduser().is_dir():
        return _shape_of_folder(checkpoint, variant_dir)
    return SHAPES["xl" if "xl" in f"{checkpoint}/{variant_dir}".lower() else "2b"]


def _shape_of_folder(checkpoint: str, variant_dir: str | None) -> ModelShape:
    source = resolve_checkpoint(checkpoint, variant_dir=variant_dir)
    if isinstance(source, OriginalCheckpoint):
        configs = component_configs(_read(source.dit / "config.json"), {})
        parts = {name: configs[name] for name in ("transformer", "condition_encoder")}
        folders = {"vae": source.vae, "text_encoder": source.text_encoder}
    else:
        parts = {}
        folders = {name: source / name for name in ("transformer", "condition_encoder", "vae", "text_encoder")}
    parts |= {name: _read(folder / "config.json") for name, folder in folders.items()}
    return ModelShape(Path(checkpoint).name, **parts)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read as JSON ({error}); download it again.") from error


def num_parameters(module: torch.nn.Module) -> int:
    """How many parameters `module` has."""
    return sum(parameter.numel() for parameter in module.parameters())


def random_transformer(shape: dict, *, device: torch.device, dtype: torch.dtype) -> AceStepTransformer1DModel:
    """A DiT whose every weight is drawn, from the global generator of `device`: N(0, 0.02²), norms N(1, 0.02²)."""
    with torch.device("meta"):
        transformer = AceStepTransformer1DModel(**shape)
    # diffusers' own `to` warns of modules to keep in float32, of which there are none.
    torch.nn.Module.to(transformer, dtype)
    transformer = transformer.to_empty(device=device)
    for name, parameter in transformer.named_parameters():
        parameter.detach().normal_(mean=1.0 if "norm" in name else 0.0, std=0.02)
    return transformer
