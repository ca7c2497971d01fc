"""What this machine reaches, measured in a few seconds: for `acestep-lora estimate --gpu this`.

A device that is in no table (`gpus.py`), or shared with others, or throttled, is estimated by what it really does.
"""

import dataclasses

import torch

from ..adapters.settings import LoraSettings
from ..adapters.trainable import add_lora
from ..hardware import bf16_is_fast, default_device, describe_device, median_s, memory_total_bytes
from ..masked_attention import use_masked_attention
from ..paths import GIB
from .compute_time import pass_seconds, pass_work
from .gpus import Gpu
from .memory_use import Batch, Precision, inspect_adapter
from .model_shapes import SHAPES, random_transformer

# A product as a block of the 2 B model does it on a minute of music, and the blocks that are timed.
_TOKENS, _WIDTH = 750, 2048
_BATCH = Batch(items=1, frames=2 * _TOKENS, condition_tokens=150)
_NUM_BLOCKS = 2
# More than processors keep in their caches.
_COPIED_BYTES = 256 << 20


def measure(device: torch.device | None = None, *, mixed_precision: str = "bf16") -> Gpu:
    """The device that training would run on here (or `device`), with the rates that it reaches at this moment.

    Matrix products of the model's own size, in float32 and in the precision of training; copies within memory, which
    read and write each byte; copies from pinned memory of the host. Then two blocks of the 2 B model with an adapter
    go forward and backward in that precision, and its rates are multiplied by what the formulas predict over what that
    took, so that what the formulas leave out is in them. Medians; some seconds on a GPU, some twenty on a CPU.
    """
    device = device or default_device()
    dtype = torch.float16 if mixed_precision == "fp16" else torch.float32
    if mixed_precision == "bf16" and bf16_is_fast(device):
        dtype = torch.bfloat16
    half = dtype != torch.float32
    if device.type == "cuda":
        memory, host = torch.cuda.get_device_properties(device).total_memory, _host_rate(device)
    else:
        memory, host = memory_total_bytes(), _copy_rate(device)
    bare = Gpu(
        name=f"this machine ({describe_device(device)})",
        memory_gb=round(memory / GIB, 1),
        bf16_tflops=_matmul_rate(device, dtype) / 1e12 if half else None,
        fp32_tflops=_matmul_rate(device, torch.float32) / 1e12,
        bandwidth_gb_s=_copy_rate(device) / 1e9,
        host_gb_s=host / 1e9,
        source="measured just now",
        measured=True,
    )
    share = _share_reached(bare, device, dtype)
    rates = ("bf16_tflops" if half else "fp32_tflops", "bandwidth_gb_s")
    return dataclasses.replace(bare, **{name: getattr(bare, name) * share for name in rates})


def _share_reached(bare: Gpu, device: torch.device, dtype: torch.dtype) -> float:
    """What two blocks are predicted to take, forward and backward, over what they take."""
    shape = SHAPES["2b"].transformer | {"num_hidden_layers": _NUM_BLOCKS}
    model = random_transformer(shape, device=device, dtype=dtype)
    use_masked_attention(model)
    add_lora(model, LoraSettings(r=64, lora_dropout=0.05), seed=0)
    model.train()
    tensors = {
        "hidden_states": torch.randn(1, _BATCH.frames, model.config.audio_acoustic_hidden_dim, device=device),
        "context_latents": torch.randn(1, _BATCH.frames, 2 * model.config.audio_acoustic_hidden_dim, device=device),
        "encoder_hidden_states": torch.randn(1, _BATCH.condition_tokens, _WIDTH, device=device),
        "timestep": torch.full((1,), 0.5, device=device),
        "timestep_r": torch.full((1,), 0.5, device=device),
    }
    inputs = {name: tensor.to(dtype) for name, tensor in tensors.items()}

    def once() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model(**inputs, return_dict=False)[0].float().square().mean().backward()
        model.zero_grad()

    precision = Precision(weight=dtype.itemsize, mask=1 if device.type == "cuda" else 4)
    adapter = inspect_adapter(model, dropout=0.05)
    work = pass_work(model.config, adapter, _BATCH, precision, base_quantization="none", gradient_checkpointing=0.0)
    return pass_seconds(work, bare, precision) / median_s(once, device, rounds=3)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second."""
    rows = torch.randn(_TOKENS, _WIDTH, device=device, dtype=dtype)
    weight = torch.randn(_WIDTH, _WIDTH, device=device, dtype=dtype)
    return 2 * _TOKENS * _WIDTH * _WIDTH / median_s(lambda: torch.mm(rows, weight), device)


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written a second."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / median_s(lambda: target.copy_(source), device)


def _host_rate(device: torch.device) -> float:
    """Bytes a second from the host's pinned memory to the device."""
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return _COPIED_BYTES / median_s(lambda: target.copy_(source, non_blocking=True), device)
