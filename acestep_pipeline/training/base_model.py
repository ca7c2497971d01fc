"""The model that trains: the DiT alone, with an adapter, and blocks that compute as the flags have it; and the
encoders, which are loaded only for what the latent cache lacks."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import AceStepTransformer1DModel
from safetensors import SafetensorError

from ..adapters.settings import LoraSettings
from ..adapters.trainable import add_lora
from ..checkpoint_conversion import OriginalCheckpoint, load_dit_components
from ..checkpoint_source import open_checkpoint
from ..data.encoders import Encoders
from ..errors import UsageError
from ..masked_attention import use_masked_attention
from ..pipeline import ACEStepPipeline
from ..progress import quiet_loading
from ..quantization import leave_base_out_of_ddp, quantize_base
from .compilation import CompiledBlocks, check_compile_hardware
from .memory import check_offload_hardware, check_quantization_hardware, enable_gradient_checkpointing
from .offload import BlockOffloading


def check_hardware(accelerator: Accelerator, *, base_quantization: str, offload: bool, torch_compile: bool) -> None:
    """Raise `UsageError` if what these flags ask for can't run on the accelerator's device, or where its processes
    divide the weights among them."""
    device = accelerator.device
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    check_quantization_hardware(base_quantization, device, sharded=sharded)
    if offload:
        check_offload_hardware(device, sharded=sharded)
    if torch_compile:
        check_compile_hardware(device, sharded=sharded)


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


def add_adapter(
    transformer: AceStepTransformer1DModel,
    lora: LoraSettings,
    *,
    base_quantization: str,
    offload: bool,
    device: torch.device,
    seed: int,
) -> list[torch.nn.Parameter]:
    """Quantise the DiT if so asked, and put an adapter on it, all that trains from here on.

    Args:
        transformer: the DiT, on the CPU.
        lora: the adapter's settings.
        base_quantization: the flag.
        offload: whether `set_up_blocks` will keep the base in the host's memory.
        device: where the base is quantised.
        seed: of the adapter's first values.

    Returns:
        The adapter's parameters.

    Raises:
        UsageError: a target is not in this DiT, or the base can't be quantised so.
    """
    use_masked_attention(transformer)
    quantize_base(transformer, base_quantization, device=device)
    parameters = add_lora(transformer, lora, seed=seed)
    if base_quantization != "none" or offload:
        leave_base_out_of_ddp(transformer)
    return parameters


def set_up_blocks(
    accelerator: Accelerator,
    transformer: AceStepTransformer1DModel,
    *,
    torch_compile: bool,
    gradient_checkpointing: float,
    offload: bool,
) -> CompiledBlocks | None:
    """Let the blocks compute as the flags have it: compiled, a share of them a second time instead of keeping what
    they computed, their base fetched from the host's memory. Returns what is compiled, with `torch_compile`."""
    compiled = CompiledBlocks(transformer) if torch_compile else None
    if gradient_checkpointing:
        enable_gradient_checkpointing(transformer, gradient_checkpointing)
    if offload:
        BlockOffloading(transformer, accelerator.device)
        if accelerator.device.type == "cpu":
            accelerator.print("warning: --offload saves nothing on a CPU, whose memory the base lies in anyway.")
    return compiled


def is_turbo(transformer: AceStepTransformer1DModel) -> bool:
    """Whether a DiT was distilled for few steps, as `AceStepPipeline.is_turbo` says of its own."""
    return bool(transformer.config.get("is_turbo")) or transformer.config.get("model_version") == "turbo"
