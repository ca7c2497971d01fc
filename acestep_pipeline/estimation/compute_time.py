"""How long an update takes: floating-point operations and bytes moved, against what a GPU's maker says it can do, or
what was measured on this machine.

The operations are counted by formula (checked against `torch.utils.flop_counter` in `tests/test_compute_time.py`);
the rates that are really reached are assumptions, named below.
"""

from dataclasses import dataclass

from ..quantization import BYTES_PER_LAYER
from ..training.memory import num_checkpointed_blocks
from .gpus import Gpu
from .memory_use import Adapter, Batch, Precision, attention_kinds, block_bytes

# Assumed shares of the published figures: of dense matrix throughput at these sizes in eager mode (published training
# runs of transformers of this size report 40 to 55 %), of memory bandwidth, and of float32 throughput in convolutions.
MATMUL_EFFICIENCY = 0.45
BANDWIDTH_EFFICIENCY = 0.75
CONVOLUTION_EFFICIENCY = 0.3
# And of the link to the host, from pinned memory.
HOST_LINK_EFFICIENCY = 0.8
# Every saved byte of an activation is written once and read once, and about as many pass through elementwise
# operations in each direction.
PASSES_OVER_ACTIVATIONS = 4
# The backward pass of fused attention computes the weights again (FlashAttention, arXiv:2205.14135): 5 products to 2.
ATTENTION_BACKWARD = 2.5
# Kernels can't start faster than this one after another; a block launches some 150 forward and backward, its LoRA 100.
KERNEL_LAUNCH_S = 6e-6
KERNELS_PER_BLOCK = 250


@dataclass(frozen=True)
class Work:
    """What one forward and backward pass does: floating-point operations (a multiplication and an addition are two),
    bytes that go through the GPU's memory, and kernels launched."""

    flops: float
    bytes_moved: float
    kernels: float


def pass_work(
    config,
    adapter: Adapter,
    batch: Batch,
    precision: Precision,
    *,
    base_quantization: str,
    gradient_checkpointing: float,
    attention_backward: float = ATTENTION_BACKWARD,
    windowed: bool = True,
) -> Work:
    """One forward and backward pass of a frozen transformer with an adapter.

    A frozen layer costs 2 operations a weight and token forward, 2 more backward for the gradient of its input; an
    adapter's layer another 2 for its weights' gradient. Checkpointed blocks do their forward pass twice. Attention
    costs 4 · queries · keys · width forward, and backward `attention_backward` times as much (2 without what fused
    kernels compute again). Keys beyond a sliding window don't count, unless they are computed behind a dense mask
    (`windowed` False).
    """
    blocks = config.num_hidden_layers
    again = num_checkpointed_blocks(blocks, gradient_checkpointing)
    forward, backward = _block_flops(config, adapter, batch)
    keys = (mean_window_keys(config, batch) if windowed else batch.item_tokens(config)) + batch.condition_tokens
    attention = 4 * batch.tokens(config) * keys * config.num_attention_heads * config.head_dim
    forward, backward = forward + attention, backward + attention_backward * attention
    ends = (
        batch.tokens(config)
        * config.hidden_size
        * config.patch_size
        * 2
        * (config.in_channels + 2 * config.audio_acoustic_hidden_dim)
    )
    hidden = config.hidden_size
    embedders = 2 * batch.items * 2 * (256 * hidden + 7 * hidden * hidden)
    condition = 2 * batch.items * batch.condition_tokens * (config.encoder_hidden_size or hidden) * hidden
    # The first block's input needs no gradient, so neither do its three projections' inputs through the base.
    unneeded = (
        2
        * batch.tokens(config)
        * hidden
        * config.head_dim
        * (config.num_attention_heads + 2 * config.num_key_value_heads)
    )
    flops = (blocks + again) * forward + blocks * backward + ends + embedders + condition - unneeded
    passes = 2 + again / blocks
    weights = sum(out * into for out, into in _layers(config).values())
    stored = sum(
        BYTES_PER_LAYER[base_quantization](out, into) if base_quantization != "none" else out * into * precision.weight
        for out, into in _layers(config).values()
    )
    # Dequantising writes the weight out, and the product reads it.
    read = stored + (0 if base_quantization == "none" else 2 * weights * precision.weight)
    activations = block_bytes(config, adapter, batch, precision)
    moved = passes * blocks * read + PASSES_OVER_ACTIVATIONS * activations * (blocks + again / 2)
    return Work(flops, moved, KERNELS_PER_BLOCK * (blocks + again / 3))


def _layers(config) -> dict[str, tuple[int, int]]:
    """The linear layers of a block: name -> (out, in)."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    layers = {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
    for attention in ("self_attn", "cross_attn"):
        layers |= {f"{attention}.to_q": (queries, hidden), f"{attention}.to_k": (keys, hidden),
                   f"{attention}.to_v": (keys, hidden), f"{attention}.to_out.0": (hidden, queries)}  # fmt: skip
    return layers


def _block_flops(config, adapter: Adapter, batch: Batch) -> tuple[float, float]:
    """(forward, backward) of one block's linear layers."""
    tokens, conditions = batch.tokens(config), batch.items * batch.condition_tokens
    forward = backward = 0.0
    for name, (out, into) in _layers(config).items():
        of_condition = name in ("cross_attn.to_k", "cross_attn.to_v")  # which needs no gradient
        rows = conditions if of_condition else tokens
        base, lora = 2 * rows * out * into, 2 * rows * adapter.ranks.get(name, 0) * (out + into)
        forward += base + lora
        backward += (0 if of_condition else base + lora) + lora
        if of_condition:
            backward += 2 * rows * adapter.ranks.get(name, 0) * out  # through B, to A's gradient
    return forward, backward


def mean_window_keys(config, batch: Batch) -> float:
    """Keys that a query of self-attention sees, its own included, on the mean over queries and blocks."""
    tokens, window = batch.item_tokens(config), min(config.sliding_window, batch.item_tokens(config) - 1)
    seen = tokens * (2 * window + 1) - window * (window + 1)  # the first and the last queries have one side alone
    kinds = attention_kinds(config)
    sliding = kinds.count("sliding_attention") / len(kinds)
    return sliding * seen / tokens + (1 - sliding) * tokens


def update_bytes(adapter: Adapter, state_bytes: float) -> float:
    """Bytes that clipping and the optimizer move once an update: gradients twice, weights and state in and out."""
    return adapter.num_parameters * (2 * 4 + 2 * 4 + 2 * state_bytes)


def pass_seconds(work: Work, gpu: Gpu, precision: Precision) -> float:
    """Time of one pass: products and everything else after each other, or the launching of kernels if that is more."""
    peak = gpu.bf16_tflops if precision.weight == 2 and gpu.bf16_tflops else gpu.fp32_tflops
    computing = work.flops / (peak * 1e12 * (1 if gpu.measured else MATMUL_EFFICIENCY))
    return max(computing + move_seconds(work.bytes_moved, gpu), work.kernels * KERNEL_LAUNCH_S)


def host_seconds(size_bytes: float, gpu: Gpu) -> float:
    """Time to move so many bytes between the host and the GPU, in one direction."""
    return size_bytes / (gpu.host_gb_s * 1e9 * (1 if gpu.measured else HOST_LINK_EFFICIENCY))


def move_seconds(size_bytes: float, gpu: Gpu) -> float:
    """Time to move so many bytes through the GPU's memory."""
    return size_bytes / (gpu.bandwidth_gb_s * 1e9 * (1 if gpu.measured else BANDWIDTH_EFFICIENCY))
