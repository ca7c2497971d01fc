"""Three flags that say how large an update is and how it is divided."""

import pytest

from acestep_pipeline.errors import UsageError
from acestep_pipeline.training import arguments
from acestep_pipeline.training.argument_checks import check_args
from acestep_pipeline.training.batch_size import BatchSize, choose_batch_size


@pytest.mark.parametrize(
    ("effective", "micro", "accumulation", "processes", "expected"),
    [
        (None, None, None, 1, (1, 1)),
        (None, 4, 1, 1, (4, 4)),
        (None, 1, 4, 2, (8, 1)),
        (None, None, 4, 1, (4, 1)),
        (4, None, None, 1, (4, 4)),
        (4, None, None, 2, (4, 2)),
        (4, None, None, 3, (4, 2)),
        (4, None, None, 8, (4, 1)),
        (4, 1, None, 1, (4, 1)),
        (4, 8, None, 1, (4, 4)),
        (8, None, 2, 1, (8, 4)),
        (8, 2, 2, 2, (8, 2)),
    ],
)
def test_what_is_missing_follows(effective, micro, accumulation, processes, expected):
    size = choose_batch_size(
        effective_batch_size=effective,
        train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        num_processes=processes,
    )
    assert size == BatchSize(*expected)


@pytest.mark.parametrize(("micro", "accumulation"), [(2, 3), (None, 3), (None, 8)])
def test_flags_that_contradict_each_other(micro, accumulation):
    with pytest.raises(
        UsageError, match="--effective_batch_size 4 is not --train_batch_size .* leave one of them out"
    ):
        choose_batch_size(
            effective_batch_size=4, train_batch_size=micro, gradient_accumulation_steps=accumulation, num_processes=1
        )


def test_what_was_chosen_is_said():
    assert BatchSize(4, 4).describe(1) == "4 windows an update, up to 4 of one length in a forward pass"
    assert BatchSize(8, 2).describe(2) == (
        "8 windows an update, up to 2 of one length in a forward pass on each of 2 processes, 2 passes accumulated"
    )
    assert (
        BatchSize(4, 1)
        .describe(8)
        .endswith("; 4 processes have nothing to do (--effective_batch_size 8 would use them)")
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (4, 4, 1)),
        (["--gradient_accumulation_steps", "8"], (8, 1, 8)),
        (["--train_batch_size", "1"], (4, 1, 4)),
        (["--train_batch_size", "8"], (8, 8, 1)),
        (["--train_batch_size", "2", "--gradient_accumulation_steps", "3"], (6, 2, 3)),
        (["--effective_batch_size", "16"], (16, 16, 1)),
        (["--effective_batch_size", "16", "--gradient_accumulation_steps", "2"], (16, 8, 2)),
    ],
)
def test_a_flag_wins_over_the_presets_effective_batch(monkeypatch, flags, expected):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    args = arguments.parse_args(["--preset", "c", *flags])
    check_args(args)
    assert (args.effective_batch_size, args.train_batch_size, args.gradient_accumulation_steps) == expected
