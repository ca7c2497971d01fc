"""The same fixed draws with and without the adapter: how much lower the loss is, where, and how sure that is."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from ..data.draws import shuffled
from ..data.latent_cache import CachedTrack
from ..progress import progress_bar
from .update_norms import ModuleNorm, measure_update_norms
from .validation_loss import LossMeter
from .validator import DEFAULT_COST, PASSES_OF_AN_ITEM


def percent(share: float, *, signed: bool = True) -> str:
    """A share for a person: three digits and a sign."""
    digits = f"{100 * share:.3g}" if abs(share) < 10 else f"{100 * share:.0f}"
    return f"{'+' if signed and share >= 0 else ''}{digits} %"


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval, infinitely wide where one value is all there is."""

    mean: float
    low: float
    high: float


def interval_of_mean(values: np.ndarray) -> Interval:
    """Student's t interval of the mean of `[n]` values."""
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, -np.inf, np.inf)
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Comparison:
    """Losses of fixed draws: each value of `with_adapter` is of the same window, noise and timestep as in `without`.

    Attributes:
        tracks: their names.
        without, with_adapter: float64 `[tracks, draws]`.
        bins: `[draws]`, the group of timesteps of each draw, rising.
        timesteps: `t_min` and `t_max` of each group.
    """

    tracks: tuple[str, ...]
    without: np.ndarray
    with_adapter: np.ndarray
    bins: np.ndarray
    timesteps: tuple[dict[str, float], ...]

    @property
    def loss_without(self) -> float:
        """Mean loss without the adapter."""
        return float(self.without.mean())

    @property
    def loss_with(self) -> float:
        """Mean loss with it."""
        return float(self.with_adapter.mean())

    @property
    def change(self) -> Interval:
        """Of the loss, by the adapter."""
        return self._change(slice(None))

    def change_by_bin(self) -> list[tuple[float, Interval]]:
        """For each group of timesteps, the loss without the adapter, and its change."""
        groups = [self.bins == number for number in range(len(self.timesteps))]
        return [(float(self.without[:, group].mean()), self._change(group)) for group in groups]

    def _change(self, draws: slice | np.ndarray) -> Interval:
        """Paired by draw. The draws of a track are not independent, so that the interval is over the tracks' means;
        for a single track it is over its draws, and says nothing of other tracks."""
        differences = (self.with_adapter - self.without)[:, draws]
        return interval_of_mean(differences.mean(1) if len(self.tracks) > 1 else differences[0])


@dataclass(frozen=True)
class Measured:
    """What a run's adapter does to the loss, on held-out tracks (None if there are none) and on training tracks, and
    how large its update of each layer is (empty except on the main process)."""

    held_out: Comparison | None
    trained_on: Comparison
    norms: tuple[ModuleNorm, ...]


def affordable_tracks(num_items: int, *, num_draws: int) -> int:
    """How many tracks can be measured with and without the adapter in a tenth of a training's time; 2 at least, since
    fewer have no interval.

    Args:
        num_items: those of all updates together.
        num_draws: of each track.
    """
    return max(2, int(DEFAULT_COST * PASSES_OF_AN_ITEM * num_items / (2 * num_draws)))


@contextlib.contextmanager
def without_adapter(transformer: torch.nn.Module) -> Iterator[None]:
    """The base model within this context, the adapter again afterwards."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def measure_effect(
    meter: LossMeter,
    transformer: torch.nn.Module,
    *,
    held_out: Sequence[CachedTrack],
    trained_on: Sequence[CachedTrack],
    max_train_tracks: int,
    num_items: int,
) -> Measured:
    """Measure held-out tracks (any number) and some of the training tracks, each draw with and without the adapter;
    call it on all processes: they share the forward passes out.

    Nothing random that training uses is touched.

    Args:
        transformer: the meter's model as it is without the accelerator's wrapping.
        max_train_tracks, num_items: at most so many training tracks, and as many as keep their cost within a tenth of
            the training's on so many items (`affordable_tracks`). Which ones depends on the meter's seed and their
            number alone.
    """
    number = min(max_train_tracks, affordable_tracks(num_items, num_draws=meter.num_draws))
    chosen = sorted(shuffled(len(trained_on), meter.seed, "effect")[:number])
    groups = [meter.draws(tracks) for tracks in (held_out, [trained_on[index] for index in chosen]) if len(tracks)]
    is_main = meter.accelerator.is_main_process
    passes = 2 * sum(len(draws) for draws in groups)
    compared = []
    with progress_bar(total=passes, desc="Measuring the effect", unit="pass", disable=not is_main) as bar:
        for draws in groups:
            with_adapter = meter.measure(draws, bar=bar)
            with without_adapter(transformer):
                without = meter.measure(draws, bar=bar)
            names = tuple(track.id for track in draws.tracks)
            compared.append(Comparison(names, without, with_adapter, draws.bins, tuple(draws.describe_bins())))
    norms = measure_update_norms(transformer)
    return Measured(
        held_out=compared[0] if len(held_out) else None,
        trained_on=compared[-1],
        norms=norms if is_main else (),
    )
