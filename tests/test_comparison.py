"""What is measured with and without the adapter, and that measuring leaves everything as it was."""

import numpy as np
import pytest
import torch

from acestep_pipeline.training.comparison import affordable_tracks, measure_effect, without_adapter
from tests.test_validation_loss import meter_and_tracks  # noqa: F401  a fixture


def test_the_same_draws_with_and_without(meter_and_tracks):  # noqa: F811
    meter, tracks = meter_and_tracks
    transformer = meter.model
    trained = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    state = torch.random.get_rng_state()
    measured = measure_effect(
        meter, transformer, held_out=tracks[:1], trained_on=tracks, max_train_tracks=1, num_items=99
    )
    assert torch.equal(state, torch.random.get_rng_state()) and transformer.training
    assert [name for name, parameter in transformer.named_parameters() if parameter.requires_grad] == trained
    for comparison in (measured.held_out, measured.trained_on):
        chosen = [track for track in tracks if track.id in comparison.tracks]
        assert len(chosen) == 1
        draws = meter.draws(chosen)
        assert np.array_equal(comparison.with_adapter, meter.measure(draws))
        with without_adapter(transformer):
            assert np.array_equal(comparison.without, meter.measure(draws))
        assert np.abs(comparison.without - comparison.with_adapter).min() > 1e-4
    assert measured.trained_on.without.shape == (1, 6) and len(measured.norms) > 0

    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    nothing = measure_effect(meter, transformer, held_out=[], trained_on=tracks, max_train_tracks=9, num_items=0)
    assert nothing.held_out is None and nothing.trained_on.change.mean == pytest.approx(0, abs=1e-7)
    again = nothing.trained_on.without[[track in measured.held_out.tracks for track in nothing.trained_on.tracks]]
    assert np.array_equal(again, measured.held_out.without), "without it, it is the base model, whatever it was"


def test_training_tracks_cost_at_most_a_tenth_of_the_training():
    assert affordable_tracks(20 * 5, num_draws=8) == 2
    assert affordable_tracks(100 * 100, num_draws=8) == 187
    assert 187 * 8 * 2 <= 0.1 * 3 * 10_000
