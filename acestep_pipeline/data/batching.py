"""Which items make up each optimizer update, and the tensors of their forward passes.

The items of an update (tracks, and the window each is heard in), their noise, timesteps and condition dropout depend
only on (seed, update, slot), where slot is the item's position in the update. So they are the same whatever the
micro-batch size, accumulation and number of processes, and a resumed run replays them without any saved random state.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from ..condition_mask import pad_conditions
from .draws import DrawSettings, draw_noise, draw_timestep, keyed_generator, keyed_seed, loss_weighting, shuffled
from .latent_cache import CachedTrack, Window, load_condition, load_latents


@dataclass(frozen=True)
class Item:
    """What one place in an update trains on: the numbers of a track and of one of its windows."""

    track: int
    window: int


@dataclass(frozen=True)
class MicroBatch:
    """Items of one forward pass. `weight` 0 marks a stand-in that keeps ranks in step and adds nothing."""

    update: int
    items: tuple[Item, ...]
    slots: tuple[int, ...]
    weight: float = 1.0


class Visits:
    """Which track is heard when, and in which window.

    An epoch has as many visits as all tracks have repeats: one for each track, if none has more. A track's share of
    them is in proportion to its weight times its repeats, drawn by systematic sampling
    (https://en.wikipedia.org/wiki/Systematic_sampling): in an epoch the share is rounded down or up, over many epochs
    it is met. With equal weights every track is heard exactly as often as it has repeats. So many visits as a track
    has windows hear each window once, then the next round begins, in another order.
    """

    def __init__(
        self, num_windows: Sequence[int], weights: Sequence[float], repeats: Sequence[int] | None = None, *, seed: int
    ) -> None:
        """Take the number of windows, the weight (finite and above 0) and the repeats (one if None) of every track."""
        self.num_windows = num_windows
        self.seed = seed
        repeats = [1] * len(weights) if repeats is None else repeats
        self.visits_per_epoch = sum(repeats)
        # Fractions of one denominator, as integers: exact, so that no epoch is a visit short.
        ratios = [float(weight).as_integer_ratio() for weight in weights]
        denominator = max(below for _, below in ratios)  # all are powers of two
        self.weights = [
            above * (denominator // below) * times for (above, below), times in zip(ratios, repeats, strict=True)
        ]
        self._epoch, self._before = 0, [0] * len(weights)

    def counts(self, epoch: int) -> list[int]:
        """How often each track is heard in an epoch: its share, rounded down or up."""
        number, total = self.visits_per_epoch, sum(self.weights)
        counts = [0] * len(self.weights)
        walked = keyed_seed(self.seed, "offset", epoch) * total >> 63  # uniform in [0, total)
        for track in shuffled(len(counts), self.seed, "walk", epoch):
            walked_on = walked + self.weights[track] * number
            counts[track] = walked_on // total - walked // total
            walked = walked_on
        return counts

    def items(self, epoch: int) -> list[Item]:
        """The visits of an epoch in their order. Earlier ones are replayed, each once if epochs are asked in turn."""
        if epoch < self._epoch:
            self._epoch, self._before = 0, [0] * len(self.weights)
        while self._epoch < epoch:
            counts = self.counts(self._epoch)
            self._before = [before + count for before, count in zip(self._before, counts, strict=True)]
            self._epoch += 1
        visits = [
            Item(track, self._window(track, self._before[track] + again))
            for track, count in enumerate(self.counts(epoch))
            for again in range(count)
        ]
        return [visits[index] for index in shuffled(len(visits), self.seed, "epoch", epoch)]

    def _window(self, track: int, visit: int) -> int:
        round_number, position = divmod(visit, self.num_windows[track])
        return shuffled(self.num_windows[track], self.seed, "windows", track, round_number)[position]


class EpochPlanner:
    """The micro-batches of any epoch, for every process.

    The visits of an epoch are cut into updates of `micro_batch_size * accumulation * num_processes` items; the last
    may hold fewer. Within an update, items of equal latent length share micro-batches: latents are never padded.
    """

    def __init__(
        self,
        tracks: Sequence[CachedTrack],
        *,
        seed: int,
        micro_batch_size: int,
        accumulation: int,
        num_processes: int,
    ) -> None:
        self.micro_batch_size = micro_batch_size
        self.num_processes = num_processes
        self.items_per_update = micro_batch_size * accumulation * num_processes
        self.visits = Visits(
            [len(track.windows) for track in tracks],
            [track.weight for track in tracks],
            [track.repeats for track in tracks],
            seed=seed,
        )
        self.updates_per_epoch = -(-self.visits.visits_per_epoch // self.items_per_update)
        self.crop_frames = [track.crop_frames for track in tracks]

    def plan(self, epoch: int) -> list[list[list[MicroBatch]]]:
        """`[update][process] -> micro-batches`; each process has the same number of micro-batches in an update."""
        items = self.visits.items(epoch)
        plan = []
        for start in range(0, len(items), self.items_per_update):
            update = epoch * self.updates_per_epoch + len(plan)
            micro_batches = self._micro_batches(items[start : start + self.items_per_update], update)
            per_process = [micro_batches[process :: self.num_processes] for process in range(self.num_processes)]
            steps = max(map(len, per_process))
            for own in per_process:
                stand_in = own[0] if own else micro_batches[0]
                own += [MicroBatch(update, stand_in.items, stand_in.slots, weight=0.0)] * (steps - len(own))
            plan.append(per_process)
        return plan

    def _micro_batches(self, items: list[Item], update: int) -> list[MicroBatch]:
        by_length = defaultdict(list)
        for slot, item in enumerate(items):
            by_length[self.crop_frames[item.track]].append((item, slot))
        batches = []
        for group in by_length.values():
            for start in range(0, len(group), self.micro_batch_size):
                chunk = group[start : start + self.micro_batch_size]
                batches.append(MicroBatch(update, tuple(item for item, _ in chunk), tuple(slot for _, slot in chunk)))
        return batches


def draw_wording(window: Window, settings: DrawSettings, update: int, slot: int) -> Window:
    """In which words an item is told: one of `settings.tag_shuffle` orders, or without its tags.

    The generator is not that of the item's other draws, which stay what they are without these options.
    """
    generator = keyed_generator(settings.seed, "text", update, slot)
    dropped = torch.rand((), generator=generator).item() < settings.caption_dropout
    orders = (window, *window.shuffled)[: settings.tag_shuffle]
    order = torch.randint(len(orders), (), generator=generator).item()
    return window.without_tags if dropped else orders[order]


class MicroBatchDataset(Dataset):
    """Index a list of `MicroBatch`es, get the tensors of a forward pass (in float32, on the CPU)."""

    def __init__(self, tracks: list[CachedTrack], micro_batches: list[MicroBatch], settings: DrawSettings) -> None:
        self.tracks = tracks
        self.micro_batches = micro_batches
        self.settings = settings
        self.weighting = loss_weighting(settings)

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Tensors of one micro-batch.

        Returns:
            `latents` and `noise` `[batch, frames, channels]`, `sigmas` `[batch]`, `encoder_hidden_states`
            `[batch, tokens, dim]`, `dropped` bool `[batch]` (condition replaced by the null embedding); where the
            conditions differ in length, `condition_mask` bool `[batch, tokens]` (see `ConditionMask`); and with a
            weighting scheme, `loss_weights` `[batch]`.
        """
        batch = self.micro_batches[index]
        draws = [self._draw(item, batch.update, slot) for item, slot in zip(batch.items, batch.slots, strict=True)]
        conditions, mask = pad_conditions([draw.pop("encoder_hidden_states") for draw in draws])
        tensors = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        return tensors | {"encoder_hidden_states": conditions} | ({} if mask is None else {"condition_mask": mask})

    def _draw(self, item: Item, update: int, slot: int) -> dict[str, torch.Tensor]:
        settings, generator = self.settings, keyed_generator(self.settings.seed, "update", update, slot)
        track = self.tracks[item.track]
        window = draw_wording(track.windows[item.window], settings, update, slot)
        posterior = load_latents(track, window)
        sample = torch.randn(posterior["mean"].shape, generator=generator)
        noise = draw_noise(settings, posterior["mean"].shape, update, slot, generator)
        sigma = draw_timestep(settings, update, slot, generator)
        dropped = torch.rand((), generator=generator) < settings.cfg_dropout
        latents = posterior["mean"] + (posterior["std"] * sample if settings.sample_posterior else 0)
        weights = {} if self.weighting is None else {"loss_weights": self.weighting(sigma)}
        return weights | {
            "latents": latents,
            "noise": noise,
            "sigmas": sigma,
            "encoder_hidden_states": load_condition(window),
            "dropped": dropped,
        }
