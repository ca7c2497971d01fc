"""An adapter baked into its base: a whole transformer in diffusers' layout, written part by part."""

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from ...errors import UsageError
from ...files import is_taken, replacing_directory
from ...progress import progress_bar
from .base_weights import BaseWeights
from .deltas import delta_weight
from .record import Adapter

# What is in memory at a time is about twice this.
SHARD_SIZE = "500MB"
WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"


@torch.no_grad()
def write_merged(adapter: Adapter, base: BaseWeights, directory: Path, *, scale: float = 1.0) -> None:
    """Write the transformer with `scale` times the adapter's differences added, in the dtype of the base.

    The sums are made in float32. The directory appears under its name when it is complete, and is what
    `AceStepTransformer1DModel.from_pretrained` loads.

    Raises:
        UsageError: the directory exists and is not empty.
    """
    directory = Path(directory)
    if is_taken(directory):
        raise UsageError(f"--output {directory} exists and is not empty; name another.")
    # Of the dtypes in the file, but without any content: the plan of the shards needs no more.
    plan = {name: torch.empty_like(base.get(name), device="meta") for name in base.shapes}
    split = split_torch_state_dict_into_shards(plan, filename_pattern=WEIGHTS_PATTERN, max_shard_size=SHARD_SIZE)
    with replacing_directory(directory) as replacement, replacement() as new:
        base.model.save_config(new)
        bar = progress_bar(total=len(plan), desc="Merging", unit="tensor")
        for file_name, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                weight, layer = base.get(name), name.removesuffix(".weight")
                if layer in adapter.modules:
                    delta = delta_weight(adapter.modules[layer], weight, config=adapter.config)
                    weight = (weight.float() + scale * delta).to(weight.dtype)
                shard[name] = weight.contiguous()
                bar.update()
            save_file(shard, new / file_name, metadata={"format": "pt"})
        bar.close()
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (new / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2))
