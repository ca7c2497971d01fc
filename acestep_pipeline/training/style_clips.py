"""The clips of a style distance: training music as the VAE plays it, and music generated with and without the adapter.

The training music goes through the VAE, too, so that the VAE's own sound is in both sets and not in their distance.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..data.latent_cache import CachedTrack, Window, load_latents
from ..generation import SamplingSettings, generate
from ..pipeline import ACEStepPipeline
from ..progress import progress_bar
from .style_distance import StyleDistance, compare_styles, style_features, too_small
from .validation import choose_prompts

# Enough for a stable target, and decoded in less time than a few clips are generated.
MAX_TRAINING_CLIPS = 64


def measure_style(
    pipeline: ACEStepPipeline,
    tracks: Sequence[CachedTrack],
    *,
    clips: int,
    duration_s: float,
    num_inference_steps: int | None,
    seed: int,
) -> StyleDistance | str:
    """Generate `clips` clips of the training tracks' texts with and without the loaded adapter, and compare.

    Args:
        pipeline: with its adapter loaded and active; so again afterwards.
        tracks: what was trained on.
        duration_s: of each clip; training windows that are shorter make shorter ones.
        num_inference_steps: denoising steps, None for the variant's default.
        seed: of the first clip; the next ones count up.

    Returns:
        The distances, or why they aren't measured: there is too little training music.
    """
    frames = int(duration_s * pipeline.latents_per_second)
    chosen = training_clips(tracks)
    if reason := too_small([min(frames, track.crop_frames) / pipeline.latents_per_second for track, _ in chosen]):
        return reason
    texts = [track.windows[0].fields for track in tracks]
    prompts = choose_prompts(texts, prompt=None, num_samples=clips, duration_s=duration_s)
    pipeline.set_progress_bar_config(disable=True)
    with progress_bar(total=len(chosen) + 2 * clips, desc="Measuring the style distance", unit="clip") as bar:

        def features(waveform: np.ndarray) -> np.ndarray:
            bar.update()
            return style_features(waveform, pipeline.sample_rate)

        def sample() -> list[np.ndarray]:
            settings = [SamplingSettings(num_inference_steps=num_inference_steps, seed=seed + i) for i in range(clips)]
            return [features(generate(pipeline, *pair)) for pair in zip(prompts, settings, strict=True)]

        training = [
            features(decode(pipeline, load_latents(track, window)["mean"][:frames])) for track, window in chosen
        ]
        with_adapter = sample()
        pipeline.disable_lora()
        try:
            without = sample()
        finally:
            pipeline.enable_lora()
    return compare_styles(training, without, with_adapter, seed=seed)


def training_clips(tracks: Sequence[CachedTrack]) -> list[tuple[CachedTrack, Window]]:
    """At most `MAX_TRAINING_CLIPS` windows: the first of each track, then the second of each, and so on; of more
    tracks evenly many in their order."""
    longest = max(len(track.windows) for track in tracks)
    by_turns = [
        (track, track.windows[turn]) for turn in range(longest) for track in tracks if turn < len(track.windows)
    ]
    if len(tracks) > MAX_TRAINING_CLIPS:
        return [by_turns[index * len(tracks) // MAX_TRAINING_CLIPS] for index in range(MAX_TRAINING_CLIPS)]
    return by_turns[:MAX_TRAINING_CLIPS]


@torch.no_grad()
def decode(pipeline: ACEStepPipeline, latents: torch.Tensor) -> np.ndarray:
    """Latents `[frames, channels]` -> waveform, float32 `[channels, samples]`."""
    vae = pipeline.vae
    return vae.decode(latents.T[None].to(vae.device, vae.dtype)).sample[0].float().cpu().numpy()
