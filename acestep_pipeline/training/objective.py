"""The objective's flags: which timesteps, which weighting. Free of torch, so that they are checked at once."""

import math

from ..errors import UsageError

# The names in `timesteps.COMPONENTS` and `loss_weighting.WEIGHTINGS`, which import torch.
TIMESTEP_COMPONENTS = ("logit_normal_max", "discrete", "uniform")
WEIGHTING_SCHEMES = ("none", "min_snr", "truncated_snr", "cosmap", "sigma_sqrt")


def timestep_shares(distribution: str, mix: str) -> tuple[tuple[str, float], ...]:
    """The components of the distribution of timesteps and their shares.

    Args:
        distribution: one of `TIMESTEP_COMPONENTS`, or `mix`.
        mix: its shares, e.g. `logit_normal_max=0.5,discrete=0.5`; they need not add up to 1.

    Raises:
        UsageError: `mix` names something else, names it twice, or a share is not positive.
    """
    if distribution != "mix":
        return ((distribution, 1.0),)
    shares: dict[str, float] = {}
    for part in mix.split(","):
        name, _, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if name not in TIMESTEP_COMPONENTS or name in shares or not 0 < share < math.inf:
            raise UsageError(
                f"--timestep_mix {mix!r}: {part.strip()!r} is not one of {', '.join(TIMESTEP_COMPONENTS)}, named once "
                "and with a positive share, as in logit_normal_max=0.5,discrete=0.5."
            )
        shares[name] = share
    return tuple(shares.items())


def check_objective(distribution: str, mix: str, weighting_scheme: str) -> None:
    """Raise a `UsageError` for an impossible mix, or a weighting whose mean over the timesteps is infinite."""
    names = [name for name, _ in timestep_shares(distribution, mix)]
    if weighting_scheme == "sigma_sqrt" and "uniform" in names:
        raise UsageError(
            "--weighting_scheme sigma_sqrt is 1 / t², whose mean over uniform timesteps is infinite; choose another "
            "--weighting_scheme or --timestep_distribution."
        )
