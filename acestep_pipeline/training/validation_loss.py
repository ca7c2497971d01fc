"""The flow-matching loss on given tracks with fixed windows, noise and timesteps: a number that can be compared.

A training loss depends mostly on the timesteps that an update drew. Here everything that is random is keyed by (seed,
track, draw), so that two measurements differ by the adapter alone: between updates, between runs, and between a model
with its adapter and without.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..data.batching import keyed_generator, shuffled
from ..data.latent_cache import CachedTrack, load_condition, load_latents
from ..flow_matching import TIMESTEP_MU, TIMESTEP_SIGMA, timestep_quantiles

# The draws of a track are reported in so many groups of rising timesteps.
MAX_BINS = 4
# From the tensors of a forward pass to the sum of its squared errors, a scalar.
SquaredError = Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]


class FixedDraws:
    """The forward passes of a measurement: `num_draws` of every track.

    The draws of a track lie in the middles of equally likely parts of the official training distribution (mu and
    sigma are the checkpoint's), and take turns in its windows. So the mean over them estimates the loss that training
    minimises, with less variance than as many random timesteps, and the same timesteps are compared in every track.
    """

    def __init__(self, tracks: Sequence[CachedTrack], *, num_draws: int, seed: int, config) -> None:
        """Take the tracks (any number), their draws (at least 1), and the transformer's config."""
        self.tracks = tracks
        self.num_draws = num_draws
        self.seed = seed
        mu, sigma = getattr(config, "timestep_mu", TIMESTEP_MU), getattr(config, "timestep_sigma", TIMESTEP_SIGMA)
        self.sigmas = timestep_quantiles(num_draws, mu=mu, sigma=sigma)

    def __len__(self) -> int:
        return len(self.tracks) * self.num_draws

    @property
    def bins(self) -> np.ndarray:
        """The bin of each draw, `[num_draws]`: up to `MAX_BINS` groups of rising timesteps, as equal as can be."""
        number = min(MAX_BINS, self.num_draws)
        return np.arange(self.num_draws) * number // self.num_draws

    def describe_bins(self) -> list[dict[str, float]]:
        """The lowest and the highest timestep of each bin."""
        sigmas, bins = self.sigmas.numpy(), self.bins
        groups = [sigmas[bins == number] for number in range(bins[-1] + 1)]
        return [{"t_min": round(float(group[0]), 4), "t_max": round(float(group[-1]), 4)} for group in groups]

    def batch(self, index: int) -> tuple[dict[str, torch.Tensor], int]:
        """The tensors of one forward pass, as training's (batch 1, float32, the condition kept), and its elements."""
        number, draw = divmod(index, self.num_draws)
        track = self.tracks[number]
        turns = shuffled(len(track.windows), self.seed, "validation windows", track.id)
        window = track.windows[turns[draw % len(turns)]]
        generator = keyed_generator(self.seed, "validation", track.id, draw)
        posterior = load_latents(track, window)
        sample, noise = (torch.randn(posterior["mean"].shape, generator=generator) for _ in range(2))
        tensors = {
            "latents": posterior["mean"] + posterior["std"] * sample,
            "noise": noise,
            "sigmas": self.sigmas[draw],
            "encoder_hidden_states": load_condition(window),
            "dropped": torch.tensor(False),
        }
        return {name: tensor[None] for name, tensor in tensors.items()}, noise.numel()


class LossMeter:
    """Measures a model on fixed draws, without dropout of any kind."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        squared_error: SquaredError,
        *,
        config,
        num_draws: int,
        seed: int,
    ) -> None:
        """Take the model as the accelerator prepared it, its forward pass, its transformer's config, and how many
        draws of each track there are and by which seed."""
        self.accelerator = accelerator
        self.model = model
        self.squared_error = squared_error
        self.config = config
        self.num_draws = num_draws
        self.seed = seed

    def draws(self, tracks: Sequence[CachedTrack]) -> FixedDraws:
        """The forward passes that a measurement of these tracks is made of."""
        return FixedDraws(tracks, num_draws=self.num_draws, seed=self.seed, config=self.config)

    @torch.no_grad()
    def measure(self, draws: FixedDraws, *, bar: tqdm | None = None) -> np.ndarray:
        """The mean squared error of every draw; call it on all processes: the passes are dealt out to them.

        The model's training mode and the random state are left as they were. `bar` is moved on by the passes of all
        processes.

        Returns:
            float64 `[tracks, num_draws]`, the same on every process.
        """
        rank, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        losses = torch.zeros(len(draws), device=self.accelerator.device)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(draws), num_processes):
                # A sharded model needs every process in every pass: one that has none left repeats the last.
                own = start + rank
                batch, elements = draws.batch(min(own, len(draws) - 1))
                batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
                error = self.squared_error(self.model, batch) / elements
                if own < len(draws):
                    losses[own] = error
                if bar is not None:
                    bar.update(min(num_processes, len(draws) - start))
        finally:
            self.model.train(was_training)
        losses = self.accelerator.reduce(losses, "sum")
        return losses.double().cpu().numpy().reshape(len(draws.tracks), draws.num_draws)
