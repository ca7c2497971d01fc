"""Keyed draws: the same numbers as ever without options; with them, right for each slot and better for each update."""

import pytest
import torch
from scipy.stats import kstest

from acestep_pipeline.data.draws import DrawSettings, draw_noise, draw_timestep, keyed_generator, loss_weighting
from acestep_pipeline.timesteps import TimestepDistribution

PLAIN = DrawSettings(seed=0, cfg_dropout=0.1)
MIX = TimestepDistribution(shares=(("logit_normal_max", 1.0), ("discrete", 1.0)), num_inference_steps=8, shift=3.0)


def timestep(settings: DrawSettings, update: int, slot: int) -> float:
    return draw_timestep(settings, update, slot, keyed_generator(0, "update", update, slot)).item()


def noise(settings: DrawSettings, frames: int, update: int, slot: int) -> torch.Tensor:
    return draw_noise(settings, (frames, 4), update, slot, keyed_generator(0, "update", update, slot))


def test_the_draws_of_a_seed_never_change():
    """Runs of earlier versions are resumed and repeated: these numbers are part of what a seed means."""
    generator = keyed_generator(0, "update", 3, 2)
    torch.randn(50, 3, generator=generator)  # the posterior's sample
    first = draw_noise(PLAIN, (50, 3), 3, 2, generator)[0].tolist()
    sigma = draw_timestep(PLAIN, 3, 2, generator).item()
    assert [*first, sigma, torch.rand((), generator=generator).item()] == pytest.approx(
        [1.3992, -0.3271, -0.6236, 0.6204, 0.5158], abs=1e-4
    )
    assert loss_weighting(PLAIN) is None


@pytest.mark.parametrize("timesteps", [TimestepDistribution(), MIX], ids=["logit_normal_max", "mix"])
@pytest.mark.parametrize("parts", [1, 4, 7])
def test_strata_hold_one_slot_each_and_every_slot_has_the_whole_distribution(timesteps, parts):
    settings = DrawSettings(0, 0.0, timesteps=timesteps, stratified_timesteps=True, items_per_update=parts)
    # Uniform timesteps show the uniform numbers themselves, in float32.
    bare = DrawSettings(0, 0.0, timesteps=TimestepDistribution(shares=(("uniform", 1.0),)), stratified_timesteps=True,
                        items_per_update=parts)  # fmt: skip
    numbers = torch.tensor([[timestep(bare, update, slot) for slot in range(parts)] for update in range(400)])
    middles = torch.arange(parts) + 0.5
    assert ((numbers * parts).sort(dim=1).values - middles).abs().max() <= 0.5 + 1e-6
    assert len({tuple(order.tolist()) for order in numbers.argsort(dim=1)}) > 1 or parts == 1
    for slot in range(parts):
        assert kstest(numbers[:, slot], "uniform").pvalue > 1e-3
        expected = timesteps.from_uniform(numbers[5, slot].double()).item()
        assert timestep(settings, 5, slot) == pytest.approx(expected, abs=1e-6)


def test_stratified_timesteps_of_an_update_have_a_mean_that_varies_less():
    means = []
    for stratified in (False, True):
        settings = DrawSettings(0, 0.0, stratified_timesteps=stratified, items_per_update=4)
        drawn = torch.tensor([[timestep(settings, update, slot) for slot in range(4)] for update in range(300)])
        means.append(drawn.mean(dim=1))
    independent, stratified = means
    assert stratified.mean().item() == pytest.approx(independent.mean().item(), abs=0.02)
    assert stratified.var() < independent.var() / 4


def test_antithetic_pairs_cancel_and_everything_else_stays():
    settings = DrawSettings(0, 0.0, antithetic_noise=True)
    for update, pair in ((0, 0), (0, 1), (9, 0)):
        first, second = (noise(settings, 300, update, 2 * pair + place) for place in (0, 1))
        assert torch.equal(first, -second)
        assert torch.equal(noise(settings, 120, update, 2 * pair + 1), second[:120]), "the shorter hears the beginning"
        assert kstest(first.flatten(), "norm").pvalue > 1e-3
    assert not torch.equal(noise(settings, 300, 0, 0), noise(settings, 300, 0, 2))
    assert not torch.equal(noise(settings, 300, 0, 0), noise(settings, 300, 1, 0))
    generators = [keyed_generator("any"), keyed_generator("any")]
    for each, generator in zip((PLAIN, settings), generators, strict=True):
        draw_noise(each, (300, 4), 0, 0, generator)
    assert draw_timestep(PLAIN, 0, 0, generators[0]) == draw_timestep(settings, 0, 0, generators[1])
