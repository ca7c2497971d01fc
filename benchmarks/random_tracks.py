"""Tracks of random numbers in a latent cache: what the training benchmark trains on."""

from pathlib import Path

import torch

from acestep_pipeline.data.cache_files import write_cache_file
from acestep_pipeline.data.latent_cache import CachedTrack, Window
from acestep_pipeline.prompt_fields import PromptFields
from benchmarks.training_cases import FRAMES_PER_SECOND, Case


def write_tracks(case: Case, width: int, folder: Path, dtype: torch.dtype) -> list[CachedTrack]:
    """A latent cache of random tracks, as the package writes it."""
    generator = torch.Generator().manual_seed(0)
    frames, tracks = case.seconds * FRAMES_PER_SECOND, []
    for number, tokens in enumerate(case.tokens()):
        latents, condition = folder / f"latents-{number}.safetensors", folder / f"condition-{number}.safetensors"
        mean = torch.randn(frames, 64, generator=generator)
        write_cache_file(latents, {"mean": mean, "std": 0.1 + torch.rand(frames, 64, generator=generator)}, {})
        states = torch.randn(tokens, width, generator=generator).to(dtype)
        write_cache_file(condition, {"encoder_hidden_states": states}, {})
        window = Window(0, PromptFields(prompt="random", audio_duration=float(case.seconds)), condition, tokens)
        tracks.append(CachedTrack(str(number), latents, frames, frames, (window,)))
    return tracks
