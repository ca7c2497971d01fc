"""The flagship script with eyes: each process writes down what it saw, encoded, held, wrote and ended with.

`FORCE_BF16=1` has it train in bf16 where that is slow; `BROKEN_UPDATE=N` makes an item of update N infinite.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import train_ace_step_lora
from acestep_pipeline import flow_matching
from acestep_pipeline.adapters.trainable import lora_state_dict
from acestep_pipeline.data import batching, latent_cache
from acestep_pipeline.training import base_model, parallelism, setup

rank = os.environ.get("RANK", "0")
noises, adapters, encoded, written, held = [], [], [], [], {}
interpolate, add_lora, find_latents = flow_matching.interpolate, base_model.add_lora, latent_cache.LatentCache._latents
choose_parallelism, draw = parallelism.choose_parallelism, batching.BatchLoader._draw


def watch_noise(latents, noise, sigmas):
    """Keep the noise of every micro-batch that is trained on."""
    if torch.is_grad_enabled():
        noises.append(noise.clone())
    return interpolate(latents, noise, sigmas)


def watch_adapter(transformer, *args, **kwargs):
    """Keep the model that the LoRA was added to."""
    adapters.append(transformer)
    return add_lora(transformer, *args, **kwargs)


def watch_encoding(cache, track, decoded):
    """Keep the names of the files that are encoded."""
    if not cache._latents_path(track).is_file():
        encoded.append(track.audio.name)
    return find_latents(cache, track, decoded)


def watch_parallelism(*args, **kwargs):
    """Keep how large the model is, as `prepare` gets it, and how much of it is left in this process."""
    parallel = choose_parallelism(*args, **kwargs)
    prepare = parallel.prepare

    def watched(transformer, optimizer):
        held["bytes"] = sum(p.nbytes for p in transformer.parameters() if not p.requires_grad)
        model, prepared = prepare(transformer, optimizer)
        local = [p.to_local() if isinstance(p, DTensor) else p for p in transformer.parameters()]
        held["local_bytes"] = sum(p.nbytes for p in local if not p.requires_grad)
        held["trained"] = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
        held["optimized"] = sum(p.numel() for group in prepared.param_groups for p in group["params"])
        held["dtypes"] = sorted({f"{p.dtype} {p.requires_grad}" for p in transformer.parameters()})
        return model, prepared

    parallel.prepare = watched
    return parallel


def draw_broken(loader, item, update, slot):
    """The first item of one update has infinite latents, whichever process it falls to."""
    drawn = draw(loader, item, update, slot)
    if (update, slot) == (int(os.environ["BROKEN_UPDATE"]), 0):
        drawn["latents"] = drawn["latents"] + float("inf")
    return drawn


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
    flow_matching.interpolate, base_model.add_lora = watch_noise, watch_adapter
    latent_cache.LatentCache._latents, parallelism.choose_parallelism = watch_encoding, watch_parallelism
    if os.environ.get("FORCE_BF16"):
        setup.bf16_is_fast = lambda device: True
    if os.environ.get("BROKEN_UPDATE"):
        batching.BatchLoader._draw = draw_broken
    args = train_ace_step_lora.arguments.parse_args(sys.argv[1:])
    directory = Path(args.output_dir).parent
    watch_files(Path(args.output_dir))
    train_ace_step_lora.train(args)
    save_file({str(index): noise for index, noise in enumerate(noises)}, directory / f"noise-{rank}.safetensors")
    save_file(lora_state_dict(adapters[0]), directory / f"adapter-{rank}.safetensors")
    (directory / f"seen-{rank}.json").write_text(json.dumps({"encoded": encoded, "written": written, "held": held}))
