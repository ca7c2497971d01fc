"""Fine-tune ACE-Step 1.5 with LoRA on Accelerate and diffusers, and use what was trained."""

import logging

from .version import __version__

__all__ = ["ACEStepPipeline", "__version__"]

# Where these are installed, diffusers imports them, and each warns of kernels that are not for this machine.
for _name in (
    "torchao",
    "torch.utils._pytree",
    "bitsandbytes.backends.cpu.ops",
    "diffusers.quantizers.torchao.torchao_quantizer",
):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str):
    # Loaded on first use: importing diffusers takes seconds, which `--help` should not cost.
    if name == "ACEStepPipeline":
        from .pipeline import ACEStepPipeline

        return ACEStepPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
