"""The loss on fixed draws: the same at every look, an estimate of the training loss, shared over processes."""

import functools

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import train_ace_step_lora
from acestep_pipeline.adapters.trainable import LoraSettings, add_lora
from acestep_pipeline.condition_mask import ConditionMask
from acestep_pipeline.data.batching import keyed_generator
from acestep_pipeline.data.encoders import Encoders
from acestep_pipeline.data.latent_cache import LatentCache, load_condition, load_latents, prepare_tracks
from acestep_pipeline.data.tracks import load_tracks
from acestep_pipeline.flow_matching import sample_timesteps, timestep_quantiles
from acestep_pipeline.training.validation_loss import FixedDraws, LossMeter


@pytest.fixture
def meter_and_tracks(demo_dir, tiny_pipeline, tmp_path):
    """A meter on a tiny model with an adapter that does something, and two tracks of two windows each."""
    tracks, _ = load_tracks(demo_dir, min_duration_s=1, show_progress=False)
    cache = LatentCache(tmp_path, Encoders.of(tiny_pipeline))
    cached, _ = prepare_tracks(cache, tracks[:2], max_duration_s=2, show_progress=False)
    transformer = tiny_pipeline.transformer
    for parameter in add_lora(transformer, LoraSettings(r=2, lora_dropout=0.5), seed=0):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    encoder = tiny_pipeline.condition_encoder
    squared_error = functools.partial(
        train_ace_step_lora.squared_error,
        condition_mask=ConditionMask(transformer),
        silence_latent=encoder.silence_latent,
        null_condition_emb=encoder.null_condition_emb,
    )
    accelerator = Accelerator(cpu=True)
    settings = {"config": transformer.config, "num_draws": 6, "seed": 0}
    return LossMeter(accelerator, transformer.train(), squared_error, **settings), cached


def test_quantiles_are_the_middles_of_equally_likely_parts():
    drawn = sample_timesteps(200_000, mu=-0.2, sigma=0.8, generator=torch.Generator().manual_seed(0))
    for t, below in zip(timestep_quantiles(4, mu=-0.2, sigma=0.8), (1 / 8, 3 / 8, 5 / 8, 7 / 8), strict=True):
        assert (drawn < t).float().mean().item() == pytest.approx(below, abs=0.005)


def test_a_measurement_repeats_to_the_bit_and_disturbs_nothing(meter_and_tracks):
    meter, tracks = meter_and_tracks
    state = torch.random.get_rng_state()
    first = meter.measure(meter.draws(tracks))
    assert first.shape == (2, 6) and meter.model.training
    assert torch.equal(state, torch.random.get_rng_state()), "nothing is drawn from the global generator"
    assert not any(parameter.grad is not None for parameter in meter.model.parameters())
    torch.manual_seed(1)
    assert np.array_equal(first, meter.measure(meter.draws(tracks))), "no dropout, whatever the generator's state"
    assert np.array_equal(first[1:], meter.measure(meter.draws(tracks[1:]))), "a track's draws are its own"


def test_windows_take_turns_and_draws_differ(meter_and_tracks):
    meter, tracks = meter_and_tracks
    draws = meter.draws(tracks)
    batches = [draws.batch(index) for index in range(len(draws))]
    assert len({float(batch["noise"][0, 0, 0]) for batch, _ in batches}) == len(draws) == 12
    for first in (0, 6):
        sigmas = torch.cat([batch["sigmas"] for batch, _ in batches[first : first + 6]])
        assert torch.equal(sigmas, draws.sigmas) and bool((sigmas.diff() > 0).all())
    batch, elements = batches[0]
    assert batch["latents"].shape == (1, 50, 16) and elements == 800 and not batch["dropped"].any()
    # Two windows of a track differ by far more than two samples of the narrow posterior of one.
    gaps = [(batches[a][0]["latents"] - batches[b][0]["latents"]).abs().mean() for a, b in ((0, 1), (0, 2))]
    assert gaps[0] > 5 * gaps[1]


def test_bins_are_rising_groups():
    config = object()
    for number, expected in ((1, [0]), (4, [0, 1, 2, 3]), (6, [0, 0, 1, 2, 2, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3])):
        draws = FixedDraws([], num_draws=number, seed=0, config=config)
        assert draws.bins.tolist() == expected and len(draws) == 0
        described = draws.describe_bins()
        assert len(described) == expected[-1] + 1
        assert all(a["t_max"] < b["t_min"] for a, b in zip(described, described[1:], strict=False))


def test_few_fixed_draws_estimate_the_loss_of_many_random_ones(meter_and_tracks):
    """The mean over 6 draws of 2 tracks lies within the spread of 300 random training items without dropout."""
    meter, tracks = meter_and_tracks
    fixed = meter.measure(meter.draws(tracks)).mean()
    losses = []
    meter.model.eval()
    for update in range(150):
        for track in (0, 1):
            generator = keyed_generator("random", update, track)
            window = tracks[track].windows[update % 2]
            posterior = load_latents(tracks[track], window)
            noise = torch.randn(posterior["mean"].shape, generator=generator)
            sigmas = sample_timesteps(1, generator=generator)
            batch = {"latents": posterior["mean"], "noise": noise, "dropped": torch.tensor(False)}
            batch |= {"encoder_hidden_states": load_condition(window)}
            batch = {name: tensor[None] for name, tensor in batch.items()} | {"sigmas": sigmas}
            with torch.no_grad():
                losses.append(float(meter.squared_error(meter.model, batch)) / noise.numel())
    assert fixed == pytest.approx(np.mean(losses), abs=4 * np.std(losses) / len(losses) ** 0.5 + 0.02 * fixed)
