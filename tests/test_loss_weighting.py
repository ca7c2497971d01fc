"""Weightings: the direction of each, from the error that its paper weights, and their mean."""

import pytest
import torch

from acestep_pipeline.flow_matching import interpolate, squared_error_sum, velocity_target
from acestep_pipeline.loss_weighting import WEIGHTINGS, normalised_weighting
from acestep_pipeline.timesteps import TimestepDistribution
from acestep_pipeline.training.objective import WEIGHTING_SCHEMES

T = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
CLEAN, NOISY = T[T < 0.5], 1 - T[T < 0.5]  # pairs as far from one end as from the other
GAMMA = 5.0


def snr(t: torch.Tensor) -> torch.Tensor:
    return ((1 - t) / t).square()


def weights(name: str, t: torch.Tensor) -> torch.Tensor:
    return WEIGHTINGS[name](t, GAMMA)


def test_the_flags_name_what_exists():
    assert ("none", *WEIGHTINGS) == WEIGHTING_SCHEMES


@pytest.mark.parametrize(
    "name, on_x0", [("min_snr", lambda t: snr(t).clamp(max=GAMMA)), ("truncated_snr", lambda t: snr(t).clamp(min=1))]
)
def test_the_weighted_velocity_error_is_the_papers_weighted_x0_error(name, on_x0):
    """A model's velocity says x0 = x_t - t v; the paper weights the error of that x0."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, velocity = torch.randn(3, len(T), 20, 4, generator=generator, dtype=torch.float64)
    x_t = interpolate(x0, noise, T)
    x0_errors = (x_t - T.view(-1, 1, 1) * velocity - x0).square().sum(dim=(1, 2))
    velocity_errors = (velocity - velocity_target(x0, noise)).square().sum(dim=(1, 2))
    assert torch.allclose(weights(name, T) * velocity_errors, on_x0(T) * x0_errors)


def test_min_snr_weights_the_clean_half_up():
    """Between t and 1 - t by min(SNR, γ), which is above 1 on the clean side."""
    ratio = weights("min_snr", CLEAN) / weights("min_snr", NOISY)
    assert torch.allclose(ratio, snr(CLEAN).clamp(max=GAMMA)) and ratio.min() > 1
    peak = T[weights("min_snr", T).argmax()].item()
    assert peak == pytest.approx(1 / (1 + GAMMA**0.5), abs=0.01)
    assert weights("min_snr", torch.tensor([1e-6, 1 - 1e-6])).max() < 1e-10, "and both ends down"
    inverted = (GAMMA / snr(T)).clamp(max=1)  # min(SNR, γ) / SNR: right for the error of the noise
    assert (inverted[T < 0.5] / inverted[T > 0.5].flip(0)).max() <= 1, "the other direction, or this shows nothing"


def test_the_others_directions():
    assert torch.allclose(weights("truncated_snr", CLEAN), weights("truncated_snr", NOISY))
    ends = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert weights("truncated_snr", ends).tolist() == pytest.approx([1, 0.25, 1])
    assert torch.allclose(weights("cosmap", CLEAN), weights("cosmap", NOISY))
    cosmap = weights("cosmap", ends)
    assert (cosmap / cosmap[1]).tolist() == pytest.approx([0.5, 1, 0.5])
    assert torch.allclose(weights("sigma_sqrt", T).double(), T**-2)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_mean_over_what_is_drawn_is_1(name):
    distribution = TimestepDistribution(shares=(("logit_normal_max", 0.5), ("discrete", 0.5)))
    weighting = normalised_weighting(name, gamma=GAMMA, timesteps_from_uniform=distribution.from_uniform)
    drawn = weighting(distribution.from_uniform(torch.rand(400_000, dtype=torch.float64)))
    assert drawn.dtype == torch.float32 and drawn.mean().item() == pytest.approx(1, abs=0.02)


def test_weighted_sums_over_any_division_make_the_same_mean():
    prediction, target = torch.randn(2, 4, 10, 3, generator=torch.Generator().manual_seed(0))
    by_item = torch.tensor([0.1, 2.0, 1.0, 0.9])
    whole = squared_error_sum(prediction, target, by_item)
    parts = sum(squared_error_sum(prediction[i : i + 1], target[i : i + 1], by_item[i : i + 1]) for i in range(4))
    alone = [by_item[i] * squared_error_sum(prediction[i], target[i]) for i in range(4)]
    assert torch.allclose(whole, parts) and torch.allclose(whole, sum(alone))
    assert torch.equal(squared_error_sum(prediction, target, torch.ones(4)), squared_error_sum(prediction, target))
