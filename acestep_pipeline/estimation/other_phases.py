"""How many bytes the phases before and after training take: filling the cache, and generating samples."""

import functools
import math

from ..pipeline import DECODE_TILE_FRAMES, ENCODE_TILE_FRAMES
from .memory_use import CUDA_CONTEXT_BYTES, GIB, Precision
from .model_shapes import ModelShape, num_parameters

# Peak of the VAE's encoder and of its decoder on one tile over the bytes of their widest activation, counted on fake
# tensors (`benchmarks/memory_accounting.py`).
ENCODE_TILE_TENSORS = 5.1
DECODE_TILE_TENSORS = 4.6


def encoding_tile_bytes(shape: ModelShape, element: int) -> int:
    """Bytes that the VAE's encoder takes beside its parameters, for audio of any length, of `element` bytes a number:
    a tile's activations, and its weights once more, as the weight norm scales them."""
    widest = shape.vae["encoder_hidden_size"] * ENCODE_TILE_FRAMES * math.prod(shape.vae["downsampling_ratios"])
    return math.ceil((ENCODE_TILE_TENSORS * widest + vae_parameters(shape)["encoder"]) * element)


def decoding_tile_bytes(shape: ModelShape, element: int) -> int:
    """The same of the VAE's decoder."""
    frames = DECODE_TILE_FRAMES * math.prod(shape.vae["downsampling_ratios"])
    return math.ceil(
        (DECODE_TILE_TENSORS * shape.vae["decoder_channels"] * frames + vae_parameters(shape)["decoder"]) * element
    )


def encoding_bytes(shape: ModelShape, weights: dict[str, int], precision: Precision) -> int:
    """Bytes while the cache is filled: encoders (the VAE in float32, in tiles), and no DiT."""
    encoders = (weights["text_encoder"] + weights["condition_encoder"]) * precision.weight + weights["vae"] * 4
    return math.ceil(encoders + encoding_tile_bytes(shape, 4) + CUDA_CONTEXT_BYTES)


def samples_bytes(
    shape: ModelShape, weights: dict[str, int], transformer: int, precision: Precision, *, one_by_one: bool
) -> int:
    """Bytes while the samples at the end are generated, in the run's precision, unquantised: the whole pipeline, or
    the largest of its models; and what a step of the DiT takes, or a tile that is decoded."""
    models = [*weights.values(), transformer]
    parameters = max(models) if one_by_one else sum(models)
    working = max(0.5 * GIB, decoding_tile_bytes(shape, precision.weight))
    return math.ceil(parameters * precision.weight + working + CUDA_CONTEXT_BYTES)


@functools.cache
def vae_parameters(shape: ModelShape) -> dict[str, int]:
    """How many parameters the VAE's halves have."""
    vae = shape.build("vae")
    return {name: num_parameters(getattr(vae, name)) for name in ("encoder", "decoder")}


@functools.cache
def encoder_parameters(shape: ModelShape) -> dict[str, int]:
    """How many parameters each frozen encoder has."""
    return {name: num_parameters(shape.build(name)) for name in ("text_encoder", "condition_encoder", "vae")}
