"""The arguments of commands that use the model: which checkpoint, in what precision, which adapters how strongly."""

import argparse
import math

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


def load_pipeline(args: argparse.Namespace, *, to_encode: bool = False):
    """The pipeline on this machine's device; if it is to encode, its encoders alone, and the VAE in float32."""
    import torch

    from ..hardware import bf16_is_fast, default_device
    from ..pipeline import ACEStepPipeline

    device = default_device()
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" and bf16_is_fast(device) else torch.float32
    name, said = default_model(args.pretrained_model_name_or_path)
    print(f"Model: {name} ({said}), {dtype} on {device}", flush=True)
    pipeline = ACEStepPipeline.from_pretrained(
        name,
        variant_dir=args.variant_dir,
        revision=args.revision,
        torch_dtype=dtype,
        vae_dtype=torch.float32 if to_encode else dtype,
    )
    if to_encode:
        pipeline.move_encoders(device)
        return pipeline
    return pipeline.to(device)


def split_weight(source: str) -> tuple[str, float]:
    """`SRC:0.8` -> (`SRC`, 0.8); without a number at the end the weight is 1.

    Raises:
        UsageError: the weight is not finite.
    """
    name, colon, number = source.rpartition(":")
    try:
        name, weight = (name, float(number)) if colon else (source, 1.0)
    except ValueError:
        return source, 1.0
    if not math.isfinite(weight):
        raise UsageError(f"{source}: the weight must be a finite number, such as {name}:0.8.")
    return name, weight
