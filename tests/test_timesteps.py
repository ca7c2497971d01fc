"""Distributions of timesteps: each is what it says, alone, mixed and stratified."""

import pytest
import torch

from acestep_pipeline.flow_matching import sample_timesteps
from acestep_pipeline.timesteps import COMPONENTS, TimestepDistribution, inference_sigmas
from acestep_pipeline.training.objective import TIMESTEP_COMPONENTS

TURBO = {"num_inference_steps": 8, "shift": 3.0}
EIGHT = [0.3, 0.5, 0.6429, 0.75, 0.8333, 0.9, 0.9545, 1.0]


def quantiles(number: int) -> torch.Tensor:
    return (torch.arange(number, dtype=torch.float64) + 0.5) / number


def test_the_flags_name_what_exists():
    assert tuple(COMPONENTS) == TIMESTEP_COMPONENTS


@pytest.mark.parametrize("mu, sigma", [(-0.4, 1.0), (0.3, 0.5)])
def test_logit_normal_max_is_the_distribution_of_the_larger_of_two_draws(mu, sigma):
    drawn = sample_timesteps(200_000, mu=mu, sigma=sigma, generator=torch.Generator().manual_seed(0)).sort().values
    computed = TimestepDistribution(mu=mu, sigma=sigma).from_uniform(quantiles(200_000))
    assert computed.dtype == torch.float32 and computed.diff().min() >= 0
    # Kolmogorov-Smirnov: the largest distance between the distribution functions, at 0.1 %.
    ranks = torch.searchsorted(computed, drawn) / 200_000
    assert (ranks - quantiles(200_000)).abs().max() < 1.95 / 200_000**0.5


def test_no_uniform_number_gives_an_impossible_timestep():
    ends = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    for shares in ((("logit_normal_max", 1.0),), (("uniform", 0.3), ("discrete", 0.7))):
        t = TimestepDistribution(shares=shares).from_uniform(ends)
        assert t.isfinite().all() and 0 <= t.min() and t.max() <= 1


def test_discrete_is_turbos_eight_steps_alike_often():
    t = TimestepDistribution(shares=(("discrete", 1.0),), **TURBO).from_uniform(quantiles(8000))
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == pytest.approx(EIGHT, abs=5e-5) and counts.tolist() == [1000] * 8
    assert inference_sigmas(50, 1.0).tolist() == pytest.approx([1 - k / 50 for k in range(50)])


def test_uniform_is_uniform():
    u = quantiles(100)
    assert torch.equal(TimestepDistribution(shares=(("uniform", 3.0),)).from_uniform(u), u.float())


def test_a_mix_has_the_shares_of_its_components():
    shares = (("discrete", 1.0), ("logit_normal_max", 2.0), ("uniform", 1.0))
    u = quantiles(40_000)
    t = TimestepDistribution(shares=shares, **TURBO).from_uniform(u)
    parts = {name: TimestepDistribution(shares=((name, 1.0),), **TURBO) for name, _ in shares}
    first, middle, last = t[:10_000], t[10_000:30_000], t[30_000:]
    assert torch.equal(first, parts["discrete"].from_uniform(quantiles(10_000)))
    assert torch.allclose(middle, parts["logit_normal_max"].from_uniform(quantiles(20_000)), atol=1e-6)
    assert torch.allclose(last, parts["uniform"].from_uniform(quantiles(10_000)), atol=1e-6)
    assert TimestepDistribution(shares=shares).from_uniform(u[7]).shape == (), "numbers without dimensions too"
