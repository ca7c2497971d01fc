"""Plans and keyed randomness: every item once, the same draws however an update is divided."""

from collections import Counter

import pytest
import torch

from acestep_pipeline.conditioning import PromptFields
from acestep_pipeline.data.batching import (
    DrawSettings,
    MicroBatchDataset,
    keyed_generator,
    plan_epoch,
    updates_per_epoch,
)
from acestep_pipeline.data.latent_cache import CachedTrack
from acestep_pipeline.files import write_tensors

SHAPES = [(50, 9), (50, 9), (100, 9), (50, 11), (50, 9), (100, 9), (100, 12), (50, 9), (50, 9), (100, 9)]
SETTINGS = DrawSettings(seed=0, cfg_dropout=0.5, mu=-0.4, sigma=1.0)


def plan(**changes):
    arguments = {"epoch": 0, "seed": 0, "micro_batch_size": 1, "accumulation": 4, "num_processes": 1} | changes
    return plan_epoch(SHAPES, **arguments)


@pytest.mark.parametrize("micro_batch_size, accumulation, num_processes", [(1, 1, 1), (4, 1, 1), (1, 4, 2), (3, 1, 3)])
def test_every_item_once_an_epoch(micro_batch_size, accumulation, num_processes):
    sizes = {"micro_batch_size": micro_batch_size, "accumulation": accumulation, "num_processes": num_processes}
    epoch = plan(**sizes)
    micro_batches = [micro for update in epoch for process in update for micro in process]
    visits = Counter(item for micro in micro_batches if micro.weight for item in micro.items)
    assert visits == Counter(range(len(SHAPES)))
    assert len(epoch) == updates_per_epoch(len(SHAPES), micro_batch_size * accumulation * num_processes)
    for update in epoch:
        assert len({len(process) for process in update}) == 1, "every process takes part in every step"
    for micro in micro_batches:
        assert len(micro.items) <= micro_batch_size
        assert len({SHAPES[item] for item in micro.items}) == 1, "nothing needs padding"


def test_an_update_holds_the_same_items_and_slots_however_it_is_divided():
    def contents(epoch):
        return [
            {pair for process in update for m in process if m.weight for pair in zip(m.items, m.slots, strict=True)}
            for update in epoch
        ]

    whole = contents(plan(micro_batch_size=4, accumulation=1))
    assert whole == contents(plan(micro_batch_size=1, accumulation=4))
    assert whole == contents(plan(micro_batch_size=1, accumulation=1, num_processes=4))
    assert whole == contents(plan(micro_batch_size=2, accumulation=1, num_processes=2))


def test_epochs_and_seeds_shuffle_differently_and_repeat():
    order = [micro.items for update in plan() for micro in update[0]]
    assert order == [micro.items for update in plan() for micro in update[0]]
    assert order != [micro.items for update in plan(epoch=1) for micro in update[0]]
    assert order != [micro.items for update in plan(seed=1) for micro in update[0]]
    assert plan(epoch=1)[0][0][0].update == 3, "updates are counted over epochs"


@pytest.fixture
def tracks(tmp_path):
    generator = keyed_generator("tracks")
    entries = []
    for index in range(2):
        latents, condition = tmp_path / f"latents-{index}", tmp_path / f"condition-{index}"
        mean = torch.arange(80).view(-1, 1).expand(-1, 3) + 0.0  # the frame's number, so that a crop shows its place
        write_tensors(latents, {"mean": mean.contiguous(), "std": torch.full((80, 3), 1e-3)})
        write_tensors(condition, {"encoder_hidden_states": torch.randn(5, 4, generator=generator)})
        entries.append(CachedTrack(str(index), PromptFields("x"), latents, condition, 80, 50, 5))
    return entries


def draw(tracks, micro):
    return MicroBatchDataset(tracks, [micro], SETTINGS)[0]


def test_an_items_draws_depend_on_update_and_slot_alone(tracks):
    whole = draw(
        tracks, plan_epoch([0, 0], epoch=0, seed=0, micro_batch_size=2, accumulation=1, num_processes=1)[0][0][0]
    )
    halves = plan_epoch([0, 0], epoch=0, seed=0, micro_batch_size=1, accumulation=1, num_processes=2)[0]
    for position, process in enumerate(halves):
        for name, tensor in draw(tracks, process[0]).items():
            assert torch.equal(tensor[0], whole[name][position]), name
    assert not torch.equal(whole["noise"][0], whole["noise"][1]), "two processes see different noise"
    assert whole["sigmas"][0] != whole["sigmas"][1]


def test_draws_differ_between_updates_and_crops_cover_the_track(tracks):
    starts, sigmas, dropped = set(), set(), []
    for epoch in range(400):
        micro = plan_epoch([0, 0], epoch=epoch, seed=0, micro_batch_size=1, accumulation=1, num_processes=1)[0][0][0]
        batch = draw(tracks, micro)
        assert batch["latents"].shape == (1, 50, 3)
        start = round(batch["latents"][0, 0, 0].item())
        assert torch.allclose(batch["latents"][0, :, 0], start + torch.arange(50.0), atol=0.02), "a crop is contiguous"
        starts.add(start)
        sigmas.add(batch["sigmas"].item())
        dropped.append(batch["dropped"].item())
    assert starts == set(range(31)), "every place of the track is trained on, none beyond its end"
    assert len(sigmas) == 400
    assert 150 < sum(dropped) < 250, "half of the conditions are dropped at 0.5"
    assert SETTINGS.cfg_dropout == 0.5
