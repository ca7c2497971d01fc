"""From a prompt to audio files: one request, or the same one with and without an adapter."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from .data.audio import write_audio
from .errors import UsageError
from .pipeline import ACEStepPipeline
from .prompt_fields import PromptFields


@dataclass(frozen=True)
class SamplingSettings:
    """How the flow is integrated. None takes the variant's default; raises `UsageError` for an impossible value."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    seed: int = 0

    def __post_init__(self):
        for name, lowest in (("num_inference_steps", 1), ("guidance_scale", 0)):
            value = getattr(self, name)
            if value is not None and not lowest <= value < math.inf:
                raise UsageError(f"--{name} must be at least {lowest}, not {value}.")
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise UsageError(f"--shift must be positive, not {self.shift}.")

    def resolved(self, *, is_turbo: bool) -> "SamplingSettings":
        """Defaults filled in: turbo 8 steps, no guidance, shift 3; base and sft 50 steps, guidance 7, shift 1.

        Source: the official inference guide (steps, shift) and `AceStepPipeline.__call__` (guidance).
        """
        steps, guidance, shift = (8, 1.0, 3.0) if is_turbo else (50, 7.0, 1.0)
        return SamplingSettings(
            num_inference_steps=steps if self.num_inference_steps is None else self.num_inference_steps,
            guidance_scale=guidance if self.guidance_scale is None else self.guidance_scale,
            shift=shift if self.shift is None else self.shift,
            seed=self.seed,
        )


def generate(pipeline: ACEStepPipeline, fields: PromptFields, sampling: SamplingSettings) -> np.ndarray:
    """Generate one clip.

    Returns:
        float32 `[channels, samples]` at the VAE's rate (48 kHz), peak -1 dBFS. The noise comes from a CPU generator,
        so a seed names the same noise on every device.
    """
    sampling = sampling.resolved(is_turbo=pipeline.is_turbo)
    audio = pipeline(
        **asdict(fields),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        shift=sampling.shift,
        generator=torch.Generator("cpu").manual_seed(sampling.seed),
    ).audios
    return audio[0].float().cpu().numpy()


def write_comparison(
    pipeline: ACEStepPipeline, fields: PromptFields, sampling: SamplingSettings, directory: Path, name: str
) -> tuple[Path, Path]:
    """Write `<name>_with_adapter.wav` and `<name>_without_adapter.wav`: same prompt, same seed, same noise.

    The pipeline has its adapter loaded and active, and has it so again afterwards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with_adapter = directory / f"{name}_with_adapter.wav"
    without_adapter = directory / f"{name}_without_adapter.wav"
    rate = pipeline.sample_rate
    write_audio(with_adapter, generate(pipeline, fields, sampling), sample_rate=rate)
    pipeline.disable_lora()
    try:
        write_audio(without_adapter, generate(pipeline, fields, sampling), sample_rate=rate)
    finally:
        pipeline.enable_lora()
    return with_adapter, without_adapter
