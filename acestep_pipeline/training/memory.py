"""What trades time for memory: whether it can work here, and gradient checkpointing of a share of the blocks.

Imports torch only where it is used, so that a command line is checked quickly.
"""

import functools
import importlib.util
import math
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    import torch

# --base_quantization -> the package that does it, of the extra [quantization].
QUANTIZATION_PACKAGES = {"none": None, "nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}


def check_quantization_installed(method: str) -> None:
    """Raise `UsageError` if the package that quantises by `method` is not installed."""
    package = QUANTIZATION_PACKAGES[method]
    if package is not None and importlib.util.find_spec(package) is None:
        raise UsageError(
            f"--base_quantization {method} needs {package}, which is not installed: "
            "pip install 'ace-step-lora[quantization]'."
        )


def check_quantization_hardware(method: str, device: "torch.device", *, sharded: bool) -> None:
    """Raise `UsageError` if `method` can't run on `device`, or if the weights are to be `sharded` over processes."""
    if method == "none":
        return
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--base_quantization {method} runs on CUDA and CPU, and this is {device.type}; use none.")
    if sharded:
        raise UsageError(
            f"--base_quantization {method} works with one process or DDP; FSDP and DeepSpeed divide weights that "
            "it has packed. Use none with them."
        )


def check_offload_hardware(device: "torch.device", *, sharded: bool) -> None:
    """Raise `UsageError` if the base can't come from the host's memory to `device`, or is to be `sharded`."""
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--offload is for CUDA devices, and this is {device.type}, which shares the host's memory.")
    if sharded:
        raise UsageError(
            "--offload works with one process or DDP; FSDP and DeepSpeed offload by settings of their own."
        )


def samples_one_by_one(base_quantization: str, *, offload: bool) -> bool:
    """Whether the samples at the end are generated with one model on the device at a time: where the run itself saves
    on the base, since they are of the original one, as a user will hear it."""
    return base_quantization != "none" or offload


def num_checkpointed_blocks(num_blocks: int, ratio: float) -> int:
    """How many blocks a share in [0, 1] is, rounded up."""
    return math.ceil(num_blocks * ratio)


def enable_gradient_checkpointing(transformer: "torch.nn.Module", ratio: float) -> None:
    """Keep of the first blocks, a share `ratio` of all, only their input, and compute the rest again when needed.

    The first and not the last: backward passes start at the last block, so that what those keep is gone by the time
    the first ones are computed again.
    """
    from torch.utils.checkpoint import checkpoint

    for block in transformer.layers[: num_checkpointed_blocks(len(transformer.layers), ratio)]:
        # Within the block's call and not around it: FSDP fetches the weights there, once for both.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
