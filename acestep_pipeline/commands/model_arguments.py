"""The arguments of commands that use the model: which checkpoint, in what precision, which adapters how strongly."""

import argparse
import math
from pathlib import Path

from ..errors import UsageError
from ..paths import default_model


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """Add `--pretrained_model_name_or_path` and what belongs to it."""
    command.add_argument(
        "--pretrained_model_name_or_path",
        help="tiny, a folder, s3://… or Hub id; unset: $ACESTEP_MODEL, else /model, else the published base",
    )
    command.add_argument("--variant_dir", help="which DiT of an original-layout checkpoint, e.g. acestep-v15-base")
    command.add_argument("--revision", help="branch, tag or commit on the Hub")
    command.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16", help="bf16 where it is fast")


def load_pipeline(args: argparse.Namespace):
    """The pipeline on this machine's device."""
    from ..pipeline import ACEStepPipeline

    checkpoint, dtype, device = _chosen(args)
    return ACEStepPipeline.from_pretrained(**checkpoint, torch_dtype=dtype).to(device)


def open_encoders(args: argparse.Namespace, latent_cache_dir: Path):
    """The encoders, on this machine's device and with the VAE in float32 once something asks for them."""
    import torch

    from ..checkpoint_source import open_checkpoint
    from ..data.encoders import Encoders
    from ..pipeline import ACEStepPipeline

    checkpoint, dtype, device = _chosen(args)

    def load() -> ACEStepPipeline:
        pipeline = ACEStepPipeline.from_pretrained(**checkpoint, torch_dtype=dtype, vae_dtype=torch.float32)
        pipeline.move_encoders(device)
        return pipeline

    encoders_id = open_checkpoint(**checkpoint).encoders_id
    return Encoders.of_checkpoint(encoders_id, latent_cache_dir=latent_cache_dir, dtype=dtype, load=load)


def _chosen(args: argparse.Namespace) -> tuple:
    """What names the checkpoint, the precision and the device, having said so."""
    import torch

    from ..hardware import bf16_is_fast, default_device

    device = default_device()
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" and bf16_is_fast(device) else torch.float32
    name, said = default_model(args.pretrained_model_name_or_path)
    print(f"Model: {name} ({said}), {dtype} on {device}", flush=True)
    where = {"variant_dir": args.variant_dir, "revision": args.revision}
    return {"pretrained_model_name_or_path": name, **where}, dtype, device


def split_weight(source: str) -> tuple[str, float]:
    """`SRC:0.8` -> (`SRC`, 0.8); without a number at the end the weight is 1.

    Raises:
        UsageError: the weight is no number, or not finite.
    """
    name, colon, number = source.rpartition(":")
    try:
        name, weight = (name, float(number)) if colon else (source, 1.0)
    except ValueError:
        if Path(name).exists() and not Path(source).exists():
            raise UsageError(f"{source}: {number!r} is no weight; write a number, such as {name}:0.8.") from None
        return source, 1.0
    if not math.isfinite(weight):
        raise UsageError(f"{source}: the weight must be a finite number, such as {name}:0.8.")
    return name, weight
