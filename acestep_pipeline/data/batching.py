"""Which items make up each optimizer update, and the tensors of their forward passes.

The items of an update (tracks, and the window each is heard in), their noise, timesteps and condition dropout depend
only on (seed, update, slot), where slot is the item's position in the update. So they are the same whatever the
micro-batch size, accumulation and number of processes, and a resumed run replays them without any saved random state.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..condition_mask import pad_conditions
from ..engines import map_in_order
from ..errors import RunError
from .draws import DrawSettings, draw_noise, draw_timestep, keyed_generator, keyed_seed, loss_weighting, shuffled
from .latent_cache import CachedTrack, Window, load_condition, load_latents


@dataclass(frozen=True)
class Item:
    """What one place in an update trains on: the numbers of a track and of one of its windows."""

    track: int
    window: int


@dataclass(frozen=True)
class MicroBatch:
    """Items of one forward pass. `weight` 0 marks a stand-in that keeps processes in step and adds nothing."""

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
        if self.num_windows[track] == 1:
            return 0  # without a generator for each track: a third of the planning of many
        round_number, position = divmod(visit, self.num_windows[track])
        return shuffled(self.num_windows[track], self.seed, "windows", track, round_number)[position]


class EpochPlanner:
    """The micro-batches of any epoch, for every process.

    The visits of an epoch are cut into updates of `effective_batch_size` items over all processes; the last of an
    epoch may hold fewer. As far as the visits allow, the items of an update have one latent length, and so fit into
    one forward pass: latents are never padded. Which items make up an update depends on neither the number of
    processes nor the size of their micro-batches.
    """

    def __init__(
        self,
        tracks: Sequence[CachedTrack],
        *,
        seed: int,
        effective_batch_size: int,
        micro_batch_size: int,
        num_processes: int = 1,
        lock_step: bool = False,
    ) -> None:
        """Take the most items of a forward pass on a process, and whether processes must make equally many of them."""
        self.seed = seed
        self.effective_batch_size = effective_batch_size
        self.micro_batch_size = micro_batch_size
        self.num_processes = num_processes
        self.lock_step = lock_step
        # The most latent frames in a forward pass of several items; None where memory has set no limit yet.
        self.frames_in_pass: int | None = None
        self.resumed_division = num_processes, micro_batch_size
        self.visits = Visits(
            [len(track.windows) for track in tracks],
            [track.weight for track in tracks],
            [track.repeats for track in tracks],
            seed=seed,
        )
        self.updates_per_epoch = -(-self.visits.visits_per_epoch // effective_batch_size)
        self.crop_frames = [track.crop_frames for track in tracks]

    def state_dict(self) -> dict:
        """How updates are divided, for a checkpoint; what memory has taught is kept by a resumed run."""
        return {
            "frames_in_pass": self.frames_in_pass,
            "micro_batch_size": self.micro_batch_size,
            "num_processes": self.num_processes,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave; another number of processes or items in a pass divides anew."""
        self.frames_in_pass = state["frames_in_pass"]
        self.resumed_division = state["num_processes"], state["micro_batch_size"]

    def describe_change(self) -> str | None:
        """What differs from the run that is resumed, for a person; None where nothing does."""
        processes, items = self.resumed_division
        if (processes, items) == (self.num_processes, self.micro_batch_size):
            return None
        return (
            f"the checkpoint is of {processes} processes with up to {items} windows in a forward pass, this run of "
            f"{self.num_processes} with {self.micro_batch_size}: windows, noise and timesteps stay the same, sums are "
            "rounded otherwise, and --lora_dropout draws other masks."
        )

    def updates(self, epoch: int) -> list[list[Item]]:
        """The items of each update of an epoch, every visit once, in the order in which they are trained on."""
        buckets = defaultdict(list)
        updates = []
        for item in self.visits.items(epoch):
            bucket = buckets[self.crop_frames[item.track]]
            bucket.append(item)
            if len(bucket) == self.effective_batch_size:
                updates.append(bucket.copy())
                bucket.clear()
        rest = [item for _, bucket in sorted(buckets.items()) for item in bucket]
        size = self.effective_batch_size
        updates += [rest[start : start + size] for start in range(0, len(rest), size)]
        return [updates[index] for index in shuffled(len(updates), self.seed, "updates", epoch)]

    def plan(self, epoch: int) -> list[list[list[MicroBatch]]]:
        """`[update][process] -> micro-batches`; in lock step each process has as many of them as the others."""
        first = epoch * self.updates_per_epoch
        return [self._divide(items, first + number) for number, items in enumerate(self.updates(epoch))]

    def plans_from(self, update: int, stop: int) -> Iterator[list[list[MicroBatch]]]:
        """`[process] -> micro-batches` of the updates from `update` to before `stop`, over the epochs."""
        while update < stop:
            epoch, position = divmod(update, self.updates_per_epoch)
            for planned in self.plan(epoch)[position:][: stop - update]:
                yield planned
                update += 1

    def frames(self, micro: MicroBatch) -> int:
        """Latent frames of a micro-batch, over its items."""
        return sum(self.crop_frames[item.track] for item in micro.items)

    def halve(self, planned: list[list[MicroBatch]]) -> int:
        """Allow half the frames of the largest forward pass of an update that did not fit into memory.

        Returns:
            The most latent frames in a forward pass of several items from now on.

        Raises:
            RunError: that pass is of one item: there is nothing to halve.
        """
        largest = max((micro for process in planned for micro in process), key=self.frames)
        if len(largest.items) == 1:
            raise RunError(
                "memory ran out in a forward pass of one window, the least there is; train with "
                "--gradient_checkpointing, a shorter --max_duration_s or a smaller --rank."
            )
        self.frames_in_pass = self.frames(largest) // 2
        return self.frames_in_pass

    def _divide(self, items: list[Item], update: int) -> list[list[MicroBatch]]:
        """Micro-batches of equal length, the longest first, each to the process that has the least to do."""
        by_length = defaultdict(list)
        for slot, item in enumerate(items):
            by_length[self.crop_frames[item.track]].append((item, slot))
        per_process = [[] for _ in range(self.num_processes)]
        load = [0] * self.num_processes
        for length in sorted(by_length, reverse=True):
            group, size = by_length[length], self._items_in_pass(length)
            for start in range(0, len(group), size):
                chunk_items, slots = zip(*group[start : start + size], strict=True)
                process = load.index(min(load))
                load[process] += length * len(slots)
                per_process[process].append(MicroBatch(update, chunk_items, slots))
        if self.lock_step:
            steps = max(map(len, per_process))
            for own in per_process:
                stand_in = own[-1] if own else per_process[0][-1]  # the shortest it has
                own += [MicroBatch(update, stand_in.items, stand_in.slots, weight=0.0)] * (steps - len(own))
        return per_process

    def _items_in_pass(self, frames: int) -> int:
        if self.frames_in_pass is None:
            return self.micro_batch_size
        return max(1, min(self.micro_batch_size, self.frames_in_pass // frames))


def draw_wording(window: Window, settings: DrawSettings, update: int, slot: int) -> Window:
    """In which words an item is told: one of `settings.tag_shuffle` orders, or without its tags.

    The generator is not that of the item's other draws, which stay what they are without these options.
    """
    generator = keyed_generator(settings.seed, "text", update, slot)
    dropped = torch.rand((), generator=generator).item() < settings.caption_dropout
    orders = (window, *window.shuffled)[: settings.tag_shuffle]
    order = torch.randint(len(orders), (), generator=generator).item()
    return window.without_tags if dropped else orders[order]


def longest_condition(tracks: Sequence[CachedTrack]) -> int:
    """The most condition tokens of any window, in any wording."""
    windows = (window for track in tracks for window in track.windows)
    return max(wording.num_condition_tokens for window in windows for wording in window.wordings())


def condition_bucket(tokens: int, *, longest: int) -> int:
    """The next power of two from 64 on, but no more than the longest condition there is, rounded up to a multiple of 8
    (which fused attention on CUDA likes its masks to be)."""
    return min(max(64, 1 << (tokens - 1).bit_length()), -(-longest // 8) * 8)


class BatchLoader:
    """From a `MicroBatch` to the tensors of a forward pass (in float32, on the CPU). Several threads may call it."""

    def __init__(
        self,
        tracks: list[CachedTrack],
        settings: DrawSettings,
        *,
        pin_memory: bool = False,
        bucket_conditions: bool = False,
    ) -> None:
        """Take the tracks, what is random about an item, whether to lock its memory, and whether to pad conditions to
        a few lengths (`condition_bucket`), under a mask, so that few shapes occur."""
        self.tracks = tracks
        self.settings = settings
        self.pin_memory = pin_memory
        self.longest_condition = longest_condition(tracks) if bucket_conditions else None
        self.weighting = loss_weighting(settings)

    def stream(self, micro_batches: Iterable[MicroBatch], *, num_workers: int) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of each micro-batch in order, read ahead by `num_workers` threads; 0: when asked for."""
        if num_workers:
            return map_in_order(self.load, micro_batches, num_workers=num_workers)
        return (self.load(micro) for micro in micro_batches)

    def load(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Tensors of one micro-batch.

        Returns:
            `latents` and `noise` `[batch, frames, channels]`, `sigmas` `[batch]`, `encoder_hidden_states`
            `[batch, tokens, dim]`, `dropped` bool `[batch]` (condition replaced by the null embedding); where the
            conditions differ in length, `condition_mask` bool `[batch, tokens]` (see `ConditionMask`); and with a
            weighting scheme, `loss_weights` `[batch]`.
        """
        draws = [self._draw(item, batch.update, slot) for item, slot in zip(batch.items, batch.slots, strict=True)]
        conditions = [draw.pop("encoder_hidden_states") for draw in draws]
        conditions, mask = pad_conditions(conditions, self._bucket(max(map(len, conditions))))
        tensors = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        tensors |= {"encoder_hidden_states": conditions} | ({} if mask is None else {"condition_mask": mask})
        return {name: tensor.pin_memory() for name, tensor in tensors.items()} if self.pin_memory else tensors

    def shape(self, batch: MicroBatch) -> tuple[int, int, int]:
        """Items, latent frames and condition tokens of what `load` makes of a micro-batch, without reading a file."""
        wordings = [
            draw_wording(self.tracks[item.track].windows[item.window], self.settings, batch.update, slot)
            for item, slot in zip(batch.items, batch.slots, strict=True)
        ]
        longest = max(wording.num_condition_tokens for wording in wordings)
        return len(batch.items), self.tracks[batch.items[0].track].crop_frames, self._bucket(longest) or longest

    def _bucket(self, tokens: int) -> int | None:
        return None if self.longest_condition is None else condition_bucket(tokens, longest=self.longest_condition)

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
