"""Every random number that training needs, keyed rather than drawn in turn.

What an item draws depends on (seed, update, slot) alone: see `batching`.
"""

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from ..flow_matching import sample_timesteps
from ..loss_weighting import normalised_weighting
from ..timesteps import TimestepDistribution

NOISE_BLOCK_FRAMES = 256


def keyed_seed(*key: Hashable) -> int:
    """A 63-bit seed that depends on `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_generator(*key: Hashable) -> torch.Generator:
    """A CPU generator whose state depends on `key` alone."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def shuffled(number: int, *key: Hashable) -> list[int]:
    """0 to `number` - 1 in an order that depends on `key` alone."""
    return torch.randperm(number, generator=keyed_generator(*key)).tolist()


@dataclass(frozen=True)
class DrawSettings:
    """What is random about a training item, and how its error is weighted.

    Attributes:
        cfg_dropout: probability that an item loses its condition.
        timesteps: their distribution.
        sample_posterior: a fresh sample of the VAE's posterior each time, or its mean.
        stratified_timesteps: each slot of an update gets a timestep from a part of the distribution of its own. The
            parts are dealt out anew in every update, so that the timesteps of each slot have the right distribution.
        items_per_update: how many parts there are; where an update has fewer items, some stay empty.
        antithetic_noise: slots 2k and 2k + 1 of an update hear the same noise with opposite signs.
        weighting_scheme: `none` for the plain squared error, or one of `loss_weighting.WEIGHTINGS`.
        snr_gamma: γ of `min_snr`.
        tag_shuffle, caption_dropout: those of the `TextOptions` that the tracks were cached with; by themselves they
            are off, so that what is measured is told the given words.
    """

    seed: int
    cfg_dropout: float
    timesteps: TimestepDistribution = TimestepDistribution()
    sample_posterior: bool = True
    stratified_timesteps: bool = False
    items_per_update: int = 1
    antithetic_noise: bool = False
    weighting_scheme: str = "none"
    snr_gamma: float = 5.0
    tag_shuffle: int = 1
    caption_dropout: float = 0.0


def draw_timestep(settings: DrawSettings, update: int, slot: int, generator: torch.Generator) -> torch.Tensor:
    """The timestep of a slot: float32, without dimensions. `generator` is the slot's own."""
    distribution = settings.timesteps
    if distribution.is_logit_normal_max and not settings.stratified_timesteps:
        return sample_timesteps(1, mu=distribution.mu, sigma=distribution.sigma, generator=generator)[0]
    u = torch.rand((), generator=generator, dtype=torch.float64)
    if settings.stratified_timesteps:
        parts = settings.items_per_update
        u = (shuffled(parts, settings.seed, "strata", update)[slot] + u) / parts
    return distribution.from_uniform(u)


def draw_noise(
    settings: DrawSettings, shape: torch.Size, update: int, slot: int, generator: torch.Generator
) -> torch.Tensor:
    """The noise of a slot, of `shape` (frames, channels). `generator` is the slot's own.

    With `antithetic_noise` it is that of a pair of slots, drawn in blocks: of two windows of unequal length the
    shorter hears the beginning of the longer one's. Everything else that the slot draws stays as it is without.
    """
    noise = torch.randn(shape, generator=generator)
    if not settings.antithetic_noise:
        return noise
    generator = keyed_generator(settings.seed, "noise", update, slot // 2)
    frames, channels = shape
    blocks = range(0, frames, NOISE_BLOCK_FRAMES)
    noise = torch.cat([torch.randn(NOISE_BLOCK_FRAMES, channels, generator=generator) for _ in blocks])[:frames]
    return -noise if slot % 2 else noise


def loss_weighting(settings: DrawSettings) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Weights of timesteps, of mean 1 over the run; None for the plain squared error."""
    if settings.weighting_scheme == "none":
        return None
    return normalised_weighting(
        settings.weighting_scheme,
        gamma=settings.snr_gamma,
        timesteps_from_uniform=settings.timesteps.from_uniform,
    )
