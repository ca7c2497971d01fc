"""The flagship script with eyes: each process writes down the noise it saw and the adapter it ended with."""

import os
import sys
from pathlib import Path

from safetensors.torch import save_file

import train_ace_step_lora
from acestep_pipeline import flow_matching
from acestep_pipeline.adapters import lora_state_dict
from acestep_pipeline.training import setup

seen, adapters = [], []
interpolate = flow_matching.interpolate


def watch_noise(latents, noise, sigmas):
    """Keep the noise of every micro-batch."""
    seen.append(noise.clone())
    return interpolate(latents, noise, sigmas)


def watch_adapter(transformer, *args, **kwargs):
    """Keep the model that the LoRA was added to."""
    adapters.append(transformer)
    return add_lora(transformer, *args, **kwargs)


if __name__ == "__main__":
    add_lora = setup.add_lora
    flow_matching.interpolate = watch_noise
    setup.add_lora = watch_adapter
    args = train_ace_step_lora.arguments.parse_args(sys.argv[1:])
    directory = Path(args.output_dir).parent
    train_ace_step_lora.train(args)
    rank = os.environ.get("RANK", "0")
    save_file({str(index): noise for index, noise in enumerate(seen)}, directory / f"noise-{rank}.safetensors")
    save_file(lora_state_dict(adapters[0]), directory / f"adapter-{rank}.safetensors")
