"""The flagship script with eyes: each process writes down what it saw, encoded and wrote, and what it ended with."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import train_ace_step_lora
from acestep_pipeline import flow_matching
from acestep_pipeline.adapters import lora_state_dict
from acestep_pipeline.data import latent_cache
from acestep_pipeline.training import setup

rank = os.environ.get("RANK", "0")
noises, adapters, encoded, written = [], [], [], []
interpolate, add_lora, encode_latents = flow_matching.interpolate, setup.add_lora, latent_cache.encode_latents


def watch_noise(latents, noise, sigmas):
    """Keep the noise of every micro-batch that is trained on."""
    if torch.is_grad_enabled():
        noises.append(noise.clone())
    return interpolate(latents, noise, sigmas)


def watch_adapter(transformer, *args, **kwargs):
    """Keep the model that the LoRA was added to."""
    adapters.append(transformer)
    return add_lora(transformer, *args, **kwargs)


def watch_encoding(vae, audio):
    """Keep the names of the files that are encoded."""
    encoded.append(Path(audio).name)
    return encode_latents(vae, audio)


def watch_files(output_dir: Path):
    """Keep the paths under `output_dir` that this process creates, writes or renames."""

    def hook(event, args):
        if event == "open" and isinstance(args[0], str) and set(str(args[1])) & set("wxa+"):
            paths = args[:1]
        elif event == "os.mkdir":
            paths = args[:1]
        elif event == "os.rename":
            paths = args[1:2]
        else:
            return
        written.extend(str(path) for path in paths if Path(os.fsdecode(path)).is_relative_to(output_dir))

    sys.addaudithook(hook)


if __name__ == "__main__":
    flow_matching.interpolate, setup.add_lora = watch_noise, watch_adapter
    latent_cache.encode_latents = watch_encoding
    args = train_ace_step_lora.arguments.parse_args(sys.argv[1:])
    directory = Path(args.output_dir).parent
    watch_files(Path(args.output_dir))
    train_ace_step_lora.train(args)
    save_file({str(index): noise for index, noise in enumerate(noises)}, directory / f"noise-{rank}.safetensors")
    save_file(lora_state_dict(adapters[0]), directory / f"adapter-{rank}.safetensors")
    (directory / f"seen-{rank}.json").write_text(json.dumps({"encoded": encoded, "written": written}))
