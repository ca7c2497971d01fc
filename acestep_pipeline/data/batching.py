"""Which items make up each optimizer update, and every random number an item needs, keyed rather than drawn in turn.

The items of an update, their noise, timesteps, crops and condition dropout depend only on (seed, update, slot), where
slot is the item's position in the update. So they are the same whatever the micro-batch size, accumulation and number
of processes, and a resumed run replays them without any saved random state.
"""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from ..flow_matching import sample_timesteps
from .latent_cache import CachedTrack, load_condition, load_latents


@dataclass(frozen=True)
class MicroBatch:
    """Items of one forward pass. `weight` 0 marks a stand-in that keeps ranks in step and adds nothing."""

    update: int
    items: tuple[int, ...]
    slots: tuple[int, ...]
    weight: float = 1.0


def keyed_seed(*key: Hashable) -> int:
    """A 63-bit seed that depends on `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_generator(*key: Hashable) -> torch.Generator:
    """A CPU generator whose state depends on `key` alone."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def updates_per_epoch(num_items: int, items_per_update: int) -> int:
    """Optimizer updates in one pass over the data; the last may hold fewer items."""
    return -(-num_items // items_per_update)


def plan_epoch(
    shapes: Sequence[Hashable], *, epoch: int, seed: int, micro_batch_size: int, accumulation: int, num_processes: int
) -> list[list[list[MicroBatch]]]:
    """Plan one epoch: every item exactly once, on any number of processes.

    Items are shuffled by (seed, epoch) and cut into updates of `micro_batch_size * accumulation * num_processes`.
    Within an update, items of equal shape share micro-batches; no micro-batch ever needs padding.

    Args:
        shapes: one hashable per item; items batch together only if equal (latent length, condition length).

    Returns:
        `[update][process] -> micro-batches`; each process has the same number of micro-batches in an update.
    """
    items_per_update = micro_batch_size * accumulation * num_processes
    order = torch.randperm(len(shapes), generator=keyed_generator(seed, "epoch", epoch)).tolist()
    first_update = epoch * updates_per_epoch(len(shapes), items_per_update)
    plan = []
    for start in range(0, len(order), items_per_update):
        update = first_update + len(plan)
        micro_batches = _micro_batches(order[start : start + items_per_update], shapes, update, micro_batch_size)
        per_process = [micro_batches[process::num_processes] for process in range(num_processes)]
        steps = max(map(len, per_process))
        for own in per_process:
            stand_in = own[0] if own else micro_batches[0]
            own += [MicroBatch(update, stand_in.items, stand_in.slots, weight=0.0)] * (steps - len(own))
        plan.append(per_process)
    return plan


def _micro_batches(items: list[int], shapes: Sequence[Hashable], update: int, size: int) -> list[MicroBatch]:
    by_shape = defaultdict(list)
    for slot, item in enumerate(items):
        by_shape[shapes[item]].append((item, slot))
    batches = []
    for group in by_shape.values():
        for start in range(0, len(group), size):
            chunk = group[start : start + size]
            batches.append(MicroBatch(update, tuple(item for item, _ in chunk), tuple(slot for _, slot in chunk)))
    return batches


@dataclass(frozen=True)
class DrawSettings:
    """What is random about a training item. `mu` and `sigma` are of the timestep's normal in logits."""

    seed: int
    cfg_dropout: float
    mu: float
    sigma: float
    sample_posterior: bool = True


class MicroBatchDataset(Dataset):
    """Index a list of `MicroBatch`es, get the tensors of a forward pass (in float32, on the CPU)."""

    def __init__(self, tracks: list[CachedTrack], micro_batches: list[MicroBatch], settings: DrawSettings) -> None:
        self.tracks = tracks
        self.micro_batches = micro_batches
        self.settings = settings

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Tensors of one micro-batch.

        Returns:
            `latents` and `noise` `[batch, frames, channels]`, `sigmas` `[batch]`, `encoder_hidden_states`
            `[batch, tokens, dim]`, `dropped` bool `[batch]` (condition replaced by the null embedding).
        """
        batch = self.micro_batches[index]
        draws = [
            self._draw(self.tracks[item], keyed_generator(self.settings.seed, "update", batch.update, slot))
            for item, slot in zip(batch.items, batch.slots, strict=True)
        ]
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    def _draw(self, track: CachedTrack, generator: torch.Generator) -> dict[str, torch.Tensor]:
        start = int(torch.randint(track.num_frames - track.crop_frames + 1, (), generator=generator))
        posterior = {name: tensor[start : start + track.crop_frames] for name, tensor in load_latents(track).items()}
        sample = torch.randn(posterior["mean"].shape, generator=generator)
        noise = torch.randn(posterior["mean"].shape, generator=generator)
        sigma = sample_timesteps(1, mu=self.settings.mu, sigma=self.settings.sigma, generator=generator)[0]
        dropped = torch.rand((), generator=generator) < self.settings.cfg_dropout
        latents = posterior["mean"] + (posterior["std"] * sample if self.settings.sample_posterior else 0)
        return {
            "latents": latents,
            "noise": noise,
            "sigmas": sigma,
            "encoder_hidden_states": load_condition(track),
            "dropped": dropped,
        }
