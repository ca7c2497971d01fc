"""What the examples with adapters share: their flags, and one generation with a seed."""

import argparse
from pathlib import Path

import torch

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.data.audio import write_audio
from acestep_pipeline.errors import UsageError
from acestep_pipeline.paths import default_model


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of every example; `--adapter` once for each."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--adapter", action="append", required=True, metavar="NAME=PATH", help="repeat for each adapter")
    p.add_argument("--pretrained_model_name_or_path", help="the checkpoint (default: ACESTEP_MODEL, else the Hub's)")
    p.add_argument("--variant_dir", help="which DiT of an original-layout checkpoint")
    p.add_argument("--prompt", action="append", help="repeat for several")
    p.add_argument("--duration", type=float, default=30.0, help="seconds (default: %(default)s)")
    p.add_argument("--steps", type=int, default=50, help="inference steps (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="the first one's (default: %(default)s)")
    p.add_argument("--output", type=Path, default=Path("output/adapters"), help="folder (default: %(default)s)")
    return p


def load(args: argparse.Namespace, *, at_least: int) -> tuple[ACEStepPipeline, list[str]]:
    """The pipeline with all adapters loaded, and their names."""
    if len(args.adapter) < at_least:
        raise UsageError(f"this example takes at least {at_least} adapters: --adapter NAME=PATH for each.")
    checkpoint, _ = default_model(args.pretrained_model_name_or_path)
    pipeline = ACEStepPipeline.from_pretrained(checkpoint, variant_dir=args.variant_dir)
    names = []
    for given in args.adapter:
        name, equals, path = given.partition("=")
        if not equals:
            raise UsageError(f"--adapter {given}: write NAME=PATH, e.g. jazz=output/jazz.")
        pipeline.load_lora_weights(path, adapter_name=name)
        names.append(name)
    return pipeline, names


def generate(pipeline: ACEStepPipeline, args: argparse.Namespace, prompts: list[str], **options) -> torch.Tensor:
    """Audio `[prompts, channels, samples]`; a prompt's noise depends on its seed alone."""
    return pipeline(
        prompts,
        audio_duration=args.duration,
        num_inference_steps=args.steps,
        generator=[torch.Generator().manual_seed(args.seed + number) for number in range(len(prompts))],
        **options,
    ).audios


def save(args: argparse.Namespace, name: str, audio: torch.Tensor) -> None:
    """Write one clip `[channels, samples]` and say so."""
    path = args.output / f"{name}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_audio(path, audio.float().cpu().numpy())
    print(f"Wrote {path}")
