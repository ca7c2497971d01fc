"""The model that trains: the DiT alone, and the encoders, which are loaded only for what the latent cache lacks."""

from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel
from safetensors import SafetensorError

from ..checkpoint_conversion import OriginalCheckpoint, load_dit_components
from ..checkpoint_source import open_checkpoint
from ..data.encoders import Encoders
from ..errors import UsageError
from ..pipeline import ACEStepPipeline
from ..progress import quiet_loading


def load_base(
    checkpoint: dict, *, latent_cache_dir: Path, weight_dtype: torch.dtype, device: torch.device
) -> tuple[torch.nn.Module, Encoders]:
    """The DiT of a checkpoint, on the CPU, and its encoders.

    Where the latent cache knows the encoders, only the DiT's files are fetched and read, and the others when
    `Encoders.pipeline` is asked for; the pipeline's transformer is the one returned.

    Args:
        checkpoint: arguments of `ACEStepPipeline.from_pretrained` that name it.
        latent_cache_dir: the latent cache.
        weight_dtype: of everything but the VAE, which is in float32.
        device: where the encoders encode.

    Raises:
        UsageError: it can't be reached, or isn't complete.
    """
    source = open_checkpoint(**checkpoint)
    transformer = load_transformer(source.fetch(encoders=False), weight_dtype)

    def load_encoders() -> ACEStepPipeline:
        pipeline = ACEStepPipeline.from_pretrained(
            **checkpoint, torch_dtype=weight_dtype, vae_dtype=torch.float32, transformer=transformer
        )
        pipeline.move_encoders(device)
        return pipeline

    encoders = Encoders.of_checkpoint(
        source.encoders_id, latent_cache_dir=latent_cache_dir, dtype=weight_dtype, load=load_encoders
    )
    return transformer, encoders


def load_transformer(files: Path | OriginalCheckpoint, dtype: torch.dtype) -> AceStepTransformer1DModel:
    """The DiT of a checkpoint that is on this machine, in evaluation mode.

    Raises:
        UsageError: it can't be loaded.
    """
    with quiet_loading():
        if isinstance(files, OriginalCheckpoint):
            return load_dit_components(files.dit, dtype, wanted=("transformer",))["transformer"]
        try:
            return AceStepTransformer1DModel.from_pretrained(files / "transformer", dtype=dtype)
        except (OSError, ValueError, SafetensorError) as error:
            what = " ".join(str(error).split())[:300]
            raise UsageError(f"the checkpoint in {files} can't be loaded: {what}") from error


def is_turbo(transformer: AceStepTransformer1DModel) -> bool:
    """Whether a DiT was distilled for few steps, as `AceStepPipeline.is_turbo` says of its own."""
    return bool(transformer.config.get("is_turbo")) or transformer.config.get("model_version") == "turbo"
