"""Fine-tune ACE-Step 1.5 with LoRA on Accelerate and diffusers, and use what was trained."""

from .version import __version__

__all__ = ["__version__"]
