"""Balance and hold-out: small genres are heard, held-out tracks are a fair and stable sample."""

from collections import Counter

import pytest

from acestep_pipeline.data.building.splits import choose_holdout, sampling_weights

GENRES = ["rock"] * 80 + ["jazz"] * 8


def tracks(genres, start=0):
    return [(genre, f"hash {start + number}") for number, genre in enumerate(genres)]


@pytest.mark.parametrize("balance", [0, 0.5, 1])
def test_weights_keep_the_epochs_length(balance):
    assert sum(sampling_weights(GENRES, [1] * 88, balance)) == pytest.approx(len(GENRES))


def test_balance_gives_a_small_genre_its_share():
    def share(balance):
        return sum(sampling_weights(GENRES, [1] * 88, balance)[80:]) / len(GENRES)

    assert share(0) == pytest.approx(8 / 88)
    assert share(0.5) == pytest.approx(8**0.5 / (8**0.5 + 80**0.5))
    assert share(1) == pytest.approx(0.5)
    assert set(sampling_weights(GENRES, [1] * 88, 0)) == {1.0}


@pytest.mark.parametrize("balance", [0, 0.5, 1])
def test_repeats_shift_visits_within_a_genre_that_keeps_its_share(balance):
    repeats = [1] * 79 + [9] + [3] + [1] * 7  # as if there were 88 rock and 10 jazz
    weights = sampling_weights(GENRES, repeats, balance)
    visits = [weight * times for weight, times in zip(weights, repeats, strict=True)]
    assert sum(visits) == pytest.approx(98)
    assert sum(visits[80:]) / 98 == pytest.approx(10 ** (1 - balance) / (10 ** (1 - balance) + 88 ** (1 - balance)))
    assert visits[79] == pytest.approx(9 * visits[0]) and visits[80] == pytest.approx(3 * visits[87])


def test_the_same_share_of_every_genre_is_held_out():
    chosen = tracks(["a"] * 40 + ["b"] * 20 + ["c"] * 10)
    held = choose_holdout(chosen, 0.1)
    assert Counter(chosen[index][0] for index in held) == {"a": 4, "b": 2, "c": 1}


def test_small_genres_share_by_the_largest_remainder_and_keep_a_track_to_train_on():
    chosen = tracks(["a"] * 7 + ["b"] * 2 + ["c"])
    held = choose_holdout(chosen, 0.1)
    assert [chosen[index][0] for index in held] == ["a"]
    assert not choose_holdout(tracks(["a", "b", "c"]), 0.9), "one track of a genre is never taken away"
    assert choose_holdout([], 0.5) == choose_holdout(tracks(["a"]), 0.5) == choose_holdout(tracks(GENRES), 0) == set()


def test_the_choice_depends_on_content_and_not_on_order():
    chosen = tracks(GENRES)
    held = {chosen[index][1] for index in choose_holdout(chosen, 0.1)}
    turned = chosen[::-1]
    assert {turned[index][1] for index in choose_holdout(turned, 0.1)} == held
    more = [*chosen, *tracks(["rock"] * 10, start=1000)]
    assert len(held - {more[index][1] for index in choose_holdout(more, 0.1)}) <= 2, "ten more tracks move few"


def test_near_duplicates_stay_together():
    chosen = tracks(["a"] * 20)
    for group in ([0, 1], [2, 3], [18, 19]):
        held = choose_holdout(chosen, 0.5, [group])
        assert len(held & set(group)) in (0, 2)
        assert len(held) == 10
