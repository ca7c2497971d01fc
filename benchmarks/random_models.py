"""Models of the published shapes, and smaller ones, with random weights: what the benchmarks run on."""

import torch
from diffusers import AceStepTransformer1DModel

from acestep_pipeline.estimation import model_shapes
from acestep_pipeline.estimation.model_shapes import SHAPES

# A third of the blocks, a quarter of the width; "xl" is to "2b" as "mid-xl" is to "mid". "wide" is two blocks of "2b".
SMALL_SHAPES = {
    "mid": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64},
    "mid-xl": {"hidden_size": 640, "intermediate_size": 2432, "num_hidden_layers": 10, "num_attention_heads": 16,
               "num_key_value_heads": 4, "head_dim": 64, "encoder_hidden_size": 512},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 64},
    "wide": {"num_hidden_layers": 2},
}  # fmt: skip
SIZES = (*SMALL_SHAPES, *SHAPES)


def transformer_shape(size: str) -> dict:
    """Constructor arguments of a size of `SIZES`."""
    return SHAPES[size].transformer if size in SHAPES else SMALL_SHAPES[size]


def random_transformer(size: str, *, device: torch.device, dtype: torch.dtype) -> AceStepTransformer1DModel:
    """`model_shapes.random_transformer` of a size of `SIZES`."""
    return model_shapes.random_transformer(transformer_shape(size), device=device, dtype=dtype)


def condition_width(transformer: torch.nn.Module) -> int:
    """Width of the conditions that a DiT takes."""
    return transformer.config.encoder_hidden_size or transformer.config.hidden_size


def random_module(module: torch.nn.Module, *, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A VAE or an encoder that was built on the meta device, with random weights, in evaluation mode."""
    for part in module.modules():  # what a weight norm left behind there
        if hasattr(part, "weight_g"):
            del part.weight
    # diffusers' own `to` warns of modules to keep in float32, of which there are none.
    torch.nn.Module.to(module, dtype)
    module = module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        parameter.detach().normal_(mean=1.0 if "norm" in name else 0.0, std=0.02)
        if name.endswith("weight_g"):  # the length of a filter, or deep stacks die out
            parameter.detach().fill_(1.0)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.normal_(std=0.02)
    if rotary := getattr(module, "rotary_emb", None):  # a text encoder's frequencies are no weights
        module.rotary_emb = type(rotary)(module.config).to(device)
    return module.eval()
