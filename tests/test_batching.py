"""Plans and keyed randomness: every visit and window in its turn, the same draws however an update is divided."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_pipeline.conditioning import PromptFields
from acestep_pipeline.data.batching import (
    BatchLoader,
    DrawSettings,
    EpochPlanner,
    Item,
    MicroBatch,
    Visits,
    keyed_generator,
)
from acestep_pipeline.data.latent_cache import CachedTrack, Window, load_condition, plan_windows
from acestep_pipeline.errors import RunError
from acestep_pipeline.files import write_tensors

SHAPES = [(50, 9), (50, 9), (100, 9), (50, 11), (50, 9), (100, 9), (100, 12), (50, 9), (50, 9), (100, 9)]
SETTINGS = DrawSettings(seed=0, cfg_dropout=0.5)
DIVISIONS = [(1, 1, 1), (4, 1, 1), (1, 4, 2), (3, 1, 3)]
weights_of_a_set = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40)


def track(
    crop_frames=50,
    *,
    num_frames=None,
    tokens=(9,),
    weight=1.0,
    repeats=1,
    latents=Path("latents"),
    condition="condition",
):
    """A track with as many windows as its length needs; `tokens` are those of its windows, in turn."""
    starts = plan_windows(num_frames or crop_frames, crop_frames)
    windows = tuple(
        Window(start, PromptFields("x"), Path(condition), tokens[index % len(tokens)])
        for index, start in enumerate(starts)
    )
    return CachedTrack("song", latents, num_frames or crop_frames, crop_frames, windows, weight, repeats)


# Tracks of one to four windows, some of which have conditions of different lengths.
TRACKS = [
    track(frames, num_frames=(1 + index % 4) * frames, tokens=(tokens, 9)) for index, (frames, tokens) in
    enumerate(SHAPES)
]  # fmt: skip


def planner(tracks=TRACKS, *, seed=0, micro_batch_size=1, accumulation=4, num_processes=1, lock_step=True):
    return EpochPlanner(
        tracks,
        seed=seed,
        effective_batch_size=micro_batch_size * accumulation * num_processes,
        micro_batch_size=micro_batch_size,
        num_processes=num_processes,
        lock_step=lock_step,
    )


def visited(plan):
    """The items of an epoch that count."""
    return [item for update in plan for process in update for micro in process if micro.weight for item in micro.items]


# --- Windows


def test_windows_are_the_fewest_that_cover_a_track_and_no_frame_is_in_three():
    for crop in (1, 2, 7, 50):
        for num_frames in range(crop, 12 * crop + 1):
            starts = plan_windows(num_frames, crop)
            assert len(starts) == -(-num_frames // crop)
            assert (starts[0], starts[-1]) == (0, num_frames - crop)
            heard = Counter(frame for start in starts for frame in range(start, start + crop))
            assert set(heard) == set(range(num_frames)) and max(heard.values()) <= 2
            gaps = {after - before for before, after in zip(starts, starts[1:], strict=False)}
            assert len(starts) < 2 or max(gaps) - min(gaps) <= 1, "they are spaced evenly"


def test_a_minute_and_a_second_is_two_windows_of_a_minute():
    assert plan_windows(61 * 25, 60 * 25) == (0, 25)
    assert plan_windows(60 * 25, 60 * 25) == (0,)
    assert plan_windows(10 * 60 * 25, 240 * 25) == (0, 4500, 9000)


@pytest.mark.parametrize("weights", [[1.0] * 3, [2.5, 0.7, 1.3]])
def test_as_many_visits_as_windows_hear_each_window_once(weights):
    num_windows = (1, 3, 5)
    visits = Visits(num_windows, weights, seed=0)
    heard = [[], [], []]
    for epoch in range(300):
        for item in sorted(visits.items(epoch), key=lambda item: item.track):
            heard[item.track].append(item.window)
    for windows, number in zip(heard, num_windows, strict=True):
        rounds = [windows[start : start + number] for start in range(0, len(windows) - number + 1, number)]
        if weights[0] == weights[1]:  # else two visits of one epoch may come in any order
            assert len(rounds) == 300 // number and all(sorted(each) == list(range(number)) for each in rounds)
        assert max(Counter(windows).values()) - min(Counter(windows).values()) <= 1
        assert len({tuple(each) for each in rounds}) > 1 or number == 1, "rounds differ in their order"


# --- Epochs


@pytest.mark.parametrize("micro_batch_size, accumulation, num_processes", DIVISIONS)
def test_every_track_once_an_epoch(micro_batch_size, accumulation, num_processes):
    plans = planner(micro_batch_size=micro_batch_size, accumulation=accumulation, num_processes=num_processes)
    epoch = plans.plan(0)
    assert Counter(item.track for item in visited(epoch)) == Counter(range(len(TRACKS)))
    assert len(epoch) == plans.updates_per_epoch == -(-10 // (micro_batch_size * accumulation * num_processes))
    for update in epoch:
        assert len({len(process) for process in update}) == 1, "every process takes part in every step"
    for micro in (micro for update in epoch for process in update for micro in process):
        assert len(micro.items) <= micro_batch_size
        tracks = [TRACKS[item.track] for item in micro.items]
        assert len({entry.crop_frames for entry in tracks}) == 1, "no latents need padding"


def test_an_update_holds_the_same_items_and_slots_however_it_is_divided():
    def contents(**division):
        return [
            {pair for process in update for m in process if m.weight for pair in zip(m.items, m.slots, strict=True)}
            for update in planner(**division).plan(3)
        ]

    whole = contents(micro_batch_size=4, accumulation=1)
    assert whole == contents(micro_batch_size=1, accumulation=4)
    assert whole == contents(micro_batch_size=1, accumulation=1, num_processes=4)
    assert whole == contents(micro_batch_size=2, accumulation=1, num_processes=2)


def test_epochs_and_seeds_shuffle_differently_and_repeat():
    order = visited(planner().plan(0))
    assert order == visited(planner().plan(0))
    assert order != visited(planner().plan(1))
    assert order != visited(planner(seed=1).plan(0))
    assert planner().plan(1)[0][0][0].update == 3, "updates are counted over epochs"


def test_a_planner_that_starts_anywhere_gives_the_same_plan():
    """A resumed run begins in the middle; what it needs of the past is replayed."""
    tracks = [track(num_frames=50 * number, weight=weight) for number, weight in [(4, 2.5), (3, 0.2), (7, 0.9)]]
    in_turn = planner(tracks)
    plans = [in_turn.plan(epoch) for epoch in range(12)]
    assert [planner(tracks).plan(epoch) for epoch in range(12)] == plans
    assert [in_turn.plan(epoch) for epoch in (5, 5, 2, 11)] == [plans[epoch] for epoch in (5, 5, 2, 11)]


def test_tracks_of_one_length_share_updates():
    """40 tracks of three lengths in updates of 4: only what is left over of each length is mixed."""
    tracks = [track(frames) for frames in [50] * 18 + [100] * 13 + [150] * 9]
    for epoch in range(3):
        lengths = [{tracks[item.track].crop_frames for item in items} for items in planner(tracks).updates(epoch)]
        assert len(lengths) == 10 and [len(found) for found in lengths].count(1) >= 9
        assert lengths != sorted(lengths, key=max), "long and short updates are in no order"


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([50, 100, 150, 200]), st.floats(0.1, 10)), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 9),
    st.none() | st.integers(1, 900),
    st.booleans(),
)
def test_no_visit_is_repeated_or_dropped(tracks, effective, processes, micro, frames_in_pass, lock_step):
    tracks = [track(frames, weight=weight) for frames, weight in tracks]
    plans = EpochPlanner(tracks, seed=3, effective_batch_size=effective, micro_batch_size=micro,
                         num_processes=processes, lock_step=lock_step)  # fmt: skip
    plans.frames_in_pass = frames_in_pass
    for epoch in range(2):
        plan = plans.plan(epoch)
        assert len(plan) == plans.updates_per_epoch
        assert Counter(visited(plan)) == Counter(plans.visits.items(epoch))
        assert all(len(items) == effective for items in plans.updates(epoch)[:-1]) or len(tracks) % effective
        for number, update in enumerate(plan):
            slots = [slot for process in update for m in process if m.weight for slot in m.slots]
            assert sorted(slots) == list(range(len(slots))) and len(slots) <= effective
            for m in (m for process in update for m in process):
                assert m.update == epoch * len(plan) + number and len(m.items) <= micro
                assert len(m.items) == 1 or frames_in_pass is None or plans.frames(m) <= frames_in_pass
                assert len({tracks[item.track].crop_frames for item in m.items}) == 1
            if lock_step:
                assert len({len(process) for process in update}) == 1
            else:
                assert all(m.weight for process in update for m in process)


def test_updates_from_anywhere_go_on_over_the_epochs():
    plans = planner()
    whole = [update for epoch in range(3) for update in plans.plan(epoch)]
    assert plans.updates_per_epoch == 3
    assert list(plans.plans_from(0, 9)) == whole
    assert list(plans.plans_from(4, 8)) == whole[4:8]
    assert list(plans.plans_from(5, 5)) == []


def test_work_is_shared_out_by_its_length():
    tracks = [track(frames) for frames in (200, 100, 100, 50, 50)]
    ((first, second),) = planner(tracks, accumulation=3, num_processes=2, lock_step=False).plan(0)
    assert {sum(planner(tracks).frames(micro) for micro in process) for process in (first, second)} == {250}


def test_half_of_what_did_not_fit_until_one_window_is_left():
    tracks = [track(100)] * 8
    plans = planner(tracks, micro_batch_size=8, accumulation=1)
    sizes = []
    while True:
        (update,) = plans.plan(0)
        sizes.append([len(micro.items) for micro in update[0]])
        try:
            assert plans.halve(update) == 100 * max(sizes[-1]) // 2
        except RunError as error:
            assert "one window" in str(error) and "--max_duration_s" in str(error)
            break
    assert sizes == [[8], [4, 4], [2, 2, 2, 2], [1] * 8]


# --- Weights


def test_a_genre_of_80_does_not_drown_one_of_8():
    """Each genre gets half of the visits, whose number stays that of the tracks."""
    weights = [88 / 2 / 80] * 80 + [88 / 2 / 8] * 8
    visits = Visits([1] * 88, weights, seed=0)
    totals = Counter()
    for epoch in range(200):
        counts = Counter(item.track for item in visits.items(epoch))
        assert sum(counts.values()) == 88
        assert all(counts[number] in (0, 1) for number in range(80))
        assert all(counts[number] in (5, 6) for number in range(80, 88))
        totals += counts
    assert sum(totals[number] for number in range(80, 88)) / 200 == pytest.approx(44, abs=0.5)
    # 0.55 visits an epoch, drawn 200 times: a standard deviation of 0.035.
    assert all(totals[number] / 200 == pytest.approx(0.55, abs=0.14) for number in range(80))
    assert all(totals[number] / 200 == pytest.approx(5.5, abs=0.14) for number in range(80, 88))


@settings(derandomize=True, max_examples=200, deadline=None)
@given(weights_of_a_set, st.integers(0, 50))
def test_an_epoch_is_never_a_visit_short_and_each_share_is_rounded_down_or_up(weights, epoch):
    counts = Visits([1] * len(weights), weights, seed=0).counts(epoch)
    assert sum(counts) == len(weights)
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight / sum(weights) * len(weights)) < 1 + 1e-9


@pytest.mark.parametrize("weight", [1.0, 0.1, 1 / 3, 1e-300, 5e300])
def test_equal_weights_are_exactly_one_visit_each(weight):
    visits = Visits([1] * 97, [weight] * 97, seed=0)
    assert all(visits.counts(epoch) == [1] * 97 for epoch in range(20))


def test_weights_far_apart_are_exact():
    counts = Visits([1] * 3, [1e-300, 1e300, 1e300], seed=0).counts(0)
    assert counts[0] == 0 and sorted(counts[1:]) == [1, 2]


@pytest.mark.parametrize("micro_batch_size, accumulation, num_processes", DIVISIONS)
def test_repeats_make_an_epoch_longer_and_each_is_a_visit(micro_batch_size, accumulation, num_processes):
    tracks = [track(num_frames=100, repeats=repeats) for repeats in (3, 1, 1, 5)]
    plans = planner(tracks, micro_batch_size=micro_batch_size, accumulation=accumulation, num_processes=num_processes)
    assert plans.updates_per_epoch == -(-10 // plans.effective_batch_size)
    for epoch in range(4):
        plan = plans.plan(epoch)
        assert len(plan) == plans.updates_per_epoch and plan[0][0][0].update == epoch * len(plan)
        assert Counter(item.track for item in visited(plan)) == {0: 3, 1: 1, 2: 1, 3: 5}
    assert planner(tracks).plan(2) == planner(tracks, seed=0).plan(2) != planner(tracks, seed=1).plan(2)


def test_weights_share_out_what_repeats_made_longer():
    """Half of the visits each, though one is repeated: weights say the share of a repeat."""
    visits = Visits([1, 1], [1 / 3, 1.0], [3, 1], seed=0)
    assert [visits.counts(epoch) for epoch in range(5)] == [[2, 2]] * 5
    assert Visits([1] * 3, [2.0, 1.0, 1.0], [2, 2, 2], seed=0).visits_per_epoch == 6
    totals = [sum(counts) for counts in zip(*(Visits([1] * 3, [2.0, 1.0, 1.0], [2, 2, 2], seed=0).counts(epoch)
                                             for epoch in range(100)), strict=True)]  # fmt: skip
    assert totals == [300, pytest.approx(150, abs=10), pytest.approx(150, abs=10)]


@pytest.mark.parametrize("micro_batch_size, accumulation, num_processes", DIVISIONS)
def test_weighted_epochs_divide_like_others(micro_batch_size, accumulation, num_processes):
    """Two visits of one track in one update have slots, and so noise, of their own."""
    tracks = [track(num_frames=100, weight=weight) for weight in (5.0, 1.0, 0.5, 0.5)]
    plans = planner(tracks, micro_batch_size=micro_batch_size, accumulation=accumulation, num_processes=num_processes)
    whole = planner(tracks, micro_batch_size=1, accumulation=micro_batch_size * accumulation * num_processes)
    for epoch in range(4):
        assert Counter(visited(plans.plan(epoch))) == Counter(visited(whole.plan(epoch)))
        for update in plans.plan(epoch):
            slots = [slot for process in update for micro in process if micro.weight for slot in micro.slots]
            assert sorted(slots) == list(range(len(slots)))


# --- Draws


@pytest.fixture
def tracks(tmp_path):
    generator = keyed_generator("tracks")
    entries = []
    for index in range(2):
        latents, condition = tmp_path / f"latents-{index}", tmp_path / f"condition-{index}"
        mean = torch.arange(120).view(-1, 1).expand(-1, 3) + 0.0  # the frame's number: a window shows its place
        write_tensors(latents, {"mean": mean.contiguous(), "std": torch.full((120, 3), 1e-3)})
        write_tensors(condition, {"encoder_hidden_states": torch.randn(5, 4, generator=generator)})
        entries.append(track(50, num_frames=120, tokens=(5,), latents=latents, condition=condition))
    return entries


def draw(tracks, micro):
    return BatchLoader(tracks, SETTINGS).load(micro)


def test_an_items_draws_depend_on_update_and_slot_alone(tracks):
    whole = draw(tracks, planner(tracks, micro_batch_size=2, accumulation=1).plan(0)[0][0][0])
    halves = planner(tracks, accumulation=1, num_processes=2).plan(0)[0]
    for position, process in enumerate(halves):
        for name, tensor in draw(tracks, process[0]).items():
            assert torch.equal(tensor[0], whole[name][position]), name
    assert not torch.equal(whole["noise"][0], whole["noise"][1]), "two processes see different noise"
    assert whole["sigmas"][0] != whole["sigmas"][1]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_stream_is_what_load_gives_in_order_whatever_reads_it(tracks, num_workers):
    micros = [micro for update in planner(tracks, accumulation=1).plans_from(0, 30) for micro in update[0]]
    loader = BatchLoader(tracks, SETTINGS)
    for micro, batch in zip(micros, loader.stream(iter(micros), num_workers=num_workers), strict=True):
        assert all(torch.equal(tensor, batch[name]) for name, tensor in loader.load(micro).items())


def test_conditions_of_unequal_length_come_with_a_mask(tracks, tmp_path):
    assert "condition_mask" not in draw(tracks, planner(tracks, micro_batch_size=2, accumulation=1).plan(0)[0][0][0])
    write_tensors(tmp_path / "longer", {"encoder_hidden_states": torch.ones(7, 4)})
    tracks[1] = track(50, num_frames=120, tokens=(7,), latents=tracks[1].latents_file, condition=tmp_path / "longer")
    batch = draw(tracks, MicroBatch(update=0, items=(Item(0, 0), Item(1, 0)), slots=(0, 1)))
    assert batch["condition_mask"].sum(dim=1).tolist() == [5, 7]
    assert batch["encoder_hidden_states"].shape == (2, 7, 4) and not batch["encoder_hidden_states"][0, 5:].any()
    assert torch.equal(batch["encoder_hidden_states"][0, :5], load_condition(tracks[0].windows[0]))


def test_the_shape_of_a_pass_is_known_without_reading_it(tracks):
    for bucketed, tokens in ((False, 5), (True, 8)):
        loader = BatchLoader(tracks, SETTINGS, bucket_conditions=bucketed)
        micro = MicroBatch(update=0, items=(Item(0, 0), Item(1, 0)), slots=(0, 1))
        assert loader.shape(micro) == (2, 50, tokens)
        batch = loader.load(micro)
        assert batch["latents"].shape[:2] == (2, 50) and batch["encoder_hidden_states"].shape[1] == tokens
        assert ("condition_mask" in batch) == bucketed


def test_draws_differ_between_updates_and_each_is_of_its_window(tracks):
    starts, sigmas, dropped = Counter(), set(), []
    plans = planner(tracks, accumulation=1)
    for epoch in range(300):
        for update in plans.plan(epoch):
            ((micro,),) = update
            batch = draw(tracks, micro)
            assert batch["latents"].shape == (1, 50, 3)
            start = round(batch["latents"][0, 0, 0].item())
            assert torch.allclose(batch["latents"][0, :, 0], start + torch.arange(50.0), atol=0.02)
            starts[micro.items[0].track, start] += 1
            sigmas.add(batch["sigmas"].item())
            dropped.append(batch["dropped"].item())
    assert starts == {(number, start): 100 for number in (0, 1) for start in (0, 35, 70)}
    assert len(sigmas) == 600
    assert 240 < sum(dropped) < 360, "half of the conditions are dropped at 0.5"
    assert SETTINGS.cfg_dropout == 0.5


def test_the_two_visits_of_an_update_to_one_track_differ(tracks):
    batch = draw(tracks, MicroBatch(update=0, items=(Item(0, 1), Item(0, 1)), slots=(0, 1)))
    assert not torch.equal(batch["noise"][0], batch["noise"][1])
    assert batch["latents"][0, 0, 0].round() == batch["latents"][1, 0, 0].round() == 35
