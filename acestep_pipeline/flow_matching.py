"""ACE-Step 1.5's flow-matching objective, in pure torch.

The path is `x_t = t * noise + (1 - t) * x0` with `t` in [0, 1], noise at t = 1; the model predicts the velocity
`v = noise - x0`. Source: the official modelling code (`modeling_acestep_v15_base.py`, `forward`), whose numbers the
vectors in `tests/golden` hold.
"""

import torch

# Defaults of the official checkpoints' config (`timestep_mu`, `timestep_sigma`).
TIMESTEP_MU = -0.4
TIMESTEP_SIGMA = 1.0


def sample_timesteps(
    batch_size: int,
    *,
    mu: float = TIMESTEP_MU,
    sigma: float = TIMESTEP_SIGMA,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw training timesteps: the larger of two logit-normal draws.

    Each draw is `sigmoid(N(mu, sigma))`; taking the larger moves mass to the noisy end, where most inference steps
    lie. Source: the official `sample_t_r`, which orders two draws and keeps the larger as t.

    Args:
        batch_size: number of timesteps.
        mu: mean of the normal, in logits.
        sigma: standard deviation of the normal, > 0.
        generator: a CPU generator, for a repeatable draw.

    Returns:
        float32 `[batch_size]` on the CPU, in (0, 1).
    """
    logits = mu + sigma * torch.randn(2, batch_size, generator=generator, dtype=torch.float32)
    return torch.sigmoid(logits).amax(dim=0)


def logit_normal_max_quantile(
    u: torch.Tensor, *, mu: float = TIMESTEP_MU, sigma: float = TIMESTEP_SIGMA
) -> torch.Tensor:
    """The u-th quantile of the distribution of `sample_timesteps`: `sigmoid(mu + sigma * Φ⁻¹(sqrt(u)))`.

    The larger of two draws is below t with probability F(t)², F being one draw's distribution, so that its u-th
    quantile is one draw's sqrt(u)-th.

    Args:
        u: float64, any shape, in [0, 1].
        mu, sigma: as in `sample_timesteps`.

    Returns:
        float64, the same shape, in (0, 1).
    """
    # Φ⁻¹ is infinite at 0 and 1, which 53 random bits can reach.
    return torch.sigmoid(mu + sigma * torch.special.ndtri(u.sqrt().clamp(2.0**-53, 1 - 2.0**-53)))


def timestep_quantiles(number: int, *, mu: float = TIMESTEP_MU, sigma: float = TIMESTEP_SIGMA) -> torch.Tensor:
    """The middles of `number` equally likely parts of the distribution of `sample_timesteps`, in rising order.

    Returns:
        float32 `[number]`, in (0, 1).
    """
    middles = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    return logit_normal_max_quantile(middles, mu=mu, sigma=sigma).float()


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """The inference schedule's shift: `s * t / (1 + (s - 1) * t)`, for sigmas in [0, 1] and `shift` > 0.

    It is no part of the training distribution. Source: SD3 (arXiv:2403.03206, eq. 23) and `AceStepPipeline`.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def interpolate(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """`x_t = t * noise + (1 - t) * x0`.

    Args:
        latents: clean latents x0, `[batch, frames, channels]`.
        noise: standard normal, the same shape.
        sigmas: t of each item, `[batch]` in [0, 1]; already rounded to the dtype the model is given.
    """
    t = sigmas.to(latents.dtype).view(-1, 1, 1)
    return t * noise + (1 - t) * latents


def velocity_target(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The velocity along the path, `noise - x0`; shapes as in `interpolate`."""
    return noise - latents


def squared_error_sum(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of squared errors over every element, in float32.

    Dividing the sums of all micro-batches and ranks by the number of elements in the whole update gives the plain MSE
    of that update however it was divided; with weights of mean 1, its weighted MSE.

    Args:
        prediction: `[batch, frames, channels]`.
        target: the same shape.
        weights: of each item, `[batch]` (see `loss_weighting`); None: all 1.
    """
    errors = (prediction.float() - target.float()).square()
    return errors.sum() if weights is None else (weights.view(-1, 1, 1) * errors).sum()
