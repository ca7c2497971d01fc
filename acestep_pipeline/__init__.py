"""Fine-tune ACE-Step 1.5 with LoRA on Accelerate and diffusers, and use what was trained."""

from .version import __version__

__all__ = ["ACEStepPipeline", "__version__"]


def __getattr__(name: str):
    # Loaded on first use: importing diffusers takes seconds, which `--help` should not cost.
    if name == "ACEStepPipeline":
        from .pipeline import ACEStepPipeline

        return ACEStepPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
