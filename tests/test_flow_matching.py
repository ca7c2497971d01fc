"""The objective's maths against closed forms."""

import math

import pytest
import torch

from acestep_pipeline.flow_matching import (
    TIMESTEP_MU,
    TIMESTEP_SIGMA,
    interpolate,
    sample_timesteps,
    shift_sigmas,
    squared_error_sum,
    velocity_target,
)


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("mu, sigma", [(TIMESTEP_MU, TIMESTEP_SIGMA), (0.0, 0.5)])
def test_timesteps_are_the_larger_of_two_logit_normal_draws(mu, sigma):
    """P(max ≤ t) = Φ((logit t − μ) / σ)², to within four standard errors."""
    n = 200_000
    t = sample_timesteps(n, mu=mu, sigma=sigma, generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32 and t.shape == (n,) and t.min() > 0 and t.max() < 1
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.83, 0.9, 0.97):
        expected = normal_cdf((math.log(threshold / (1 - threshold)) - mu) / sigma) ** 2
        error = math.sqrt(expected * (1 - expected) / n)
        assert (t <= threshold).float().mean().item() == pytest.approx(expected, abs=4 * error + 1e-6)


def test_the_larger_draw_reaches_the_noisy_end():
    """A single draw has P(t > 0.9) of 0.5 %; the larger of two has twice that (1 − 0.99531²)."""
    t = sample_timesteps(400_000, generator=torch.Generator().manual_seed(1))
    single = 1 - normal_cdf(math.log(9) - TIMESTEP_MU)
    assert single == pytest.approx(0.0047, abs=2e-4)
    assert (t > 0.9).float().mean().item() == pytest.approx(1 - (1 - single) ** 2, rel=0.05)


def test_timesteps_repeat_with_the_generator_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    first = sample_timesteps(8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, sample_timesteps(8, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, sample_timesteps(8, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(before, torch.get_rng_state())


def test_shift_gives_turbos_inference_steps():
    sigmas = torch.linspace(1, 0, 9, dtype=torch.float64)[:-1]
    expected = torch.tensor([1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3], dtype=torch.float64)
    assert torch.allclose(shift_sigmas(sigmas, 3.0), expected, atol=5e-5)
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)


def test_interpolation_ends_and_velocity_is_its_derivative():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 10, 4, generator=generator, dtype=torch.float64)
    assert torch.equal(interpolate(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3)), noise)
    t, step = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), 1e-6
    derivative = (interpolate(x0, noise, t + step) - interpolate(x0, noise, t - step)) / (2 * step)
    assert torch.allclose(derivative, velocity_target(x0, noise), atol=1e-8)


def test_a_model_that_knows_the_answer_has_zero_loss_and_arrives_at_the_data():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 10, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.7], dtype=torch.float64)
    x_t = interpolate(x0, noise, t)
    knows = (x_t - x0) / t.view(-1, 1, 1)  # from x_t = x0 + t (noise − x0)
    assert squared_error_sum(knows, velocity_target(x0, noise)) == pytest.approx(0, abs=1e-10)
    assert torch.allclose(x_t - t.view(-1, 1, 1) * knows, x0)


def test_sums_over_any_division_make_the_same_mean():
    prediction, target = torch.randn(2, 4, 10, 3, generator=torch.Generator().manual_seed(0))
    whole = squared_error_sum(prediction, target) / prediction.numel()
    parts = sum(squared_error_sum(prediction[i : i + 1], target[i : i + 1]) for i in range(4)) / prediction.numel()
    assert torch.allclose(whole, parts) and torch.allclose(whole, torch.nn.functional.mse_loss(prediction, target))
