"""Weights of the squared velocity error by timestep.

Signal-to-noise here is `SNR(t) = ((1 - t) / t)²`, from `x_t = (1 - t) * x0 + t * noise`: infinite at t = 0 (clean), 1
at t = ½, 0 at t = 1 (noise). A velocity v says `x0 = x_t - t * v` and `noise = x_t + (1 - t) * v`, so that an error of
the velocity is one of x0 times t and one of the noise times 1 - t:

    |error of x0|² = t² |error of v|²,        |error of the noise|² = (1 - t)² |error of v|².

A weight that a paper puts on the x0 error is multiplied by t² to become one of the velocity error; a weight on the
noise error by (1 - t)². Taking a weight for another error than its own turns it round: `min(SNR, γ) / SNR` is min-SNR
where the noise is predicted; on the velocity error it weights the clean half down, and min-SNR weights that half up.
"""

from collections.abc import Callable

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3


def min_snr(sigmas: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR-γ (Hang et al., arXiv:2303.09556): the x0 error weighted by `min(SNR, γ)`, so on the velocity error

        w(t) = t² min(SNR(t), γ) = min((1 - t)², γ t²).

    Of two timesteps as far from the clean as from the noisy end, the clean one is weighted up: for t ≤ ½,
    `w(t) / w(1 - t) = min(SNR(t), γ) ≥ 1` (γ ≥ 1). Both ends go to 0: noise because nothing about x0 can be told
    there, clean because that is what γ is for, as the plain velocity error weights the x0 error by 1 / t². The peak is
    at `t = 1 / (1 + √γ)`, 0.31 for γ = 5.
    """
    return torch.minimum((1 - sigmas).square(), gamma * sigmas.square())


def truncated_snr(sigmas: torch.Tensor, gamma: float) -> torch.Tensor:
    """Truncated SNR (Salimans & Ho, arXiv:2202.00512, section 4): the x0 error weighted by `max(SNR, 1)`, so

        w(t) = t² max(SNR(t), 1) = max((1 - t)², t²).

    The larger of the x0 and the noise error. Both ends are weighted up alike, four times the middle; γ is not used.
    """
    return torch.maximum((1 - sigmas).square(), sigmas.square())


def cosmap(sigmas: torch.Tensor, gamma: float) -> torch.Tensor:
    """SD3's cosmap (arXiv:2403.03206, section 3.1) as diffusers weights with it: `w(t) = 2 / (π (1 - 2t + 2t²))`.

    The middle is weighted up, twice either end. γ is not used.
    """
    return compute_loss_weighting_for_sd3("cosmap", sigmas)


def sigma_sqrt(sigmas: torch.Tensor, gamma: float) -> torch.Tensor:
    """diffusers' `sigma_sqrt`: `w(t) = 1 / t²`.

    The clean end is weighted up, without a bound. In SD3's script it belongs to the x0 error (`precondition_outputs`),
    where it gives back the plain velocity error; here it makes the x0 error count 1 / t⁴. γ is not used.
    """
    return compute_loss_weighting_for_sd3("sigma_sqrt", sigmas)


WEIGHTINGS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "min_snr": min_snr,
    "truncated_snr": truncated_snr,
    "cosmap": cosmap,
    "sigma_sqrt": sigma_sqrt,
}


def normalised_weighting(
    name: str, *, gamma: float, timesteps_from_uniform: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A weighting whose mean over the timesteps that training draws is 1.

    The divisor is a constant of the run (a mean over 10,000 quantiles), and not the sum of a batch's weights: so an
    update's gradient is the same however it is divided, and learning rates keep their meaning.

    Args:
        name: one of `WEIGHTINGS`.
        gamma: γ of `min_snr`.
        timesteps_from_uniform: the distribution of timesteps, see `TimestepDistribution.from_uniform`.

    Returns:
        A function from timesteps `[batch]` to weights, float32 `[batch]`.
    """
    weighting = WEIGHTINGS[name]
    quantiles = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    mean = weighting(timesteps_from_uniform(quantiles).double(), gamma).mean()
    return lambda sigmas: (weighting(sigmas.double(), gamma) / mean).float()
