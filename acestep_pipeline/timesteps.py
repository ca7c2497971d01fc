"""Which timesteps training draws: distributions over t in [0, 1], each as a function of a uniform number.

Being functions of a uniform number, all of them can be stratified: let u run through equal parts of [0, 1).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .flow_matching import TIMESTEP_MU, TIMESTEP_SIGMA, logit_normal_max_quantile, shift_sigmas


def inference_sigmas(num_inference_steps: int, shift: float) -> torch.Tensor:
    """The timesteps at which inference asks for a velocity: `shift_sigmas(1 - k / n, shift)`, k = 0 … n - 1.

    t = 1 is among them and t = 0 is not: nothing is left to predict there. How many count depends on how the model
    will be run. Turbo's eight steps (shift 3) are the only ones it was distilled to and is asked for, so they are its
    whole set: 1, .9545, .9, .8333, .75, .6429, .5, .3. Base and sft run with some 50 (shift 1): a set so dense that it
    serves other numbers of steps as well. Trained on a few steps only, they would get worse at all others.

    Returns:
        float64 `[num_inference_steps]`, falling, in (0, 1].
    """
    return shift_sigmas(1 - torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps, shift)


@dataclass(frozen=True)
class TimestepDistribution:
    """A distribution over timesteps: one of `COMPONENTS`, or a mix of several.

    Attributes:
        shares: component -> its share of the draws; they are divided by their sum.
        mu, sigma: of `logit_normal_max`, in logits.
        num_inference_steps, shift: of `discrete`, see `inference_sigmas`.
    """

    shares: tuple[tuple[str, float], ...] = (("logit_normal_max", 1.0),)
    mu: float = TIMESTEP_MU
    sigma: float = TIMESTEP_SIGMA
    num_inference_steps: int = 50
    shift: float = 1.0

    @property
    def is_logit_normal_max(self) -> bool:
        """Whether this is the distribution of `sample_timesteps`, and no mix."""
        return [name for name, _ in self.shares] == ["logit_normal_max"]

    def from_uniform(self, u: torch.Tensor) -> torch.Tensor:
        """Timesteps of uniform numbers.

        One component alone is its inverse distribution function. In a mix, the first component takes u below its
        share, the next the u that follow, and so on, so that even parts of [0, 1) are even parts of every component.

        Args:
            u: float64, any shape, in [0, 1).

        Returns:
            float32, the same shape, in [0, 1].
        """
        names, shares = zip(*self.shares, strict=True)
        edges = torch.tensor([0.0, *shares], dtype=torch.float64).cumsum(0) / sum(shares)
        component = torch.bucketize(u, edges[1:-1], right=True)
        within = (u - edges[component]) / (edges[component + 1] - edges[component])
        timesteps = torch.empty_like(u)
        for index, name in enumerate(names):
            timesteps[component == index] = COMPONENTS[name](self, within[component == index])
        return timesteps.float()


def _logit_normal_max(distribution: TimestepDistribution, u: torch.Tensor) -> torch.Tensor:
    return logit_normal_max_quantile(u, mu=distribution.mu, sigma=distribution.sigma)


def _discrete(distribution: TimestepDistribution, u: torch.Tensor) -> torch.Tensor:
    rising = inference_sigmas(distribution.num_inference_steps, distribution.shift).flip(0)
    return rising[(u * len(rising)).long().clamp(max=len(rising) - 1)]


def _uniform(distribution: TimestepDistribution, u: torch.Tensor) -> torch.Tensor:
    return u


COMPONENTS: dict[str, Callable[[TimestepDistribution, torch.Tensor], torch.Tensor]] = {
    "logit_normal_max": _logit_normal_max,
    "discrete": _discrete,
    "uniform": _uniform,
}
