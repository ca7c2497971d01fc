"""The benchmark of variances, small: its statistics are right, and it would notice draws that are not."""

import json

import numpy as np
import pytest

from acestep_pipeline.timesteps import TimestepDistribution
from benchmarks import timestep_variance as benchmark

SMALL = {"sizes": [2], "updates": 40, "warm_up_updates": 20, "seconds": 2, "max_tracks": 6, "rank": 2}


def samples(number, *, spread=1.0, shift=0.0, seed=0):
    """Independent rows of 30 dimensions, whose covariance has the trace `spread**2 * 3 * 30`."""
    return (shift + spread * np.random.default_rng(seed).normal(0, 3**0.5, (number, 30))).astype(np.float32)


def test_the_trace_of_a_covariance_and_its_ratio():
    plain = 5 + samples(2000)
    assert benchmark.trace_of_covariance(plain) == pytest.approx(90, rel=0.03)
    assert benchmark.trace_of_covariance(plain) == pytest.approx(np.trace(np.cov(plain.T)), rel=1e-6)
    ratio, (low, high) = benchmark.variance_ratio(plain, samples(2000, spread=0.5, seed=1))
    assert low < 0.25 < high and low < ratio < high and high - low < 0.03
    inside = sum(
        low < 1 < high
        for seed in range(20)
        for _, (low, high) in [benchmark.variance_ratio(samples(100, seed=2 * seed), samples(100, seed=2 * seed + 1))]
    )
    assert inside >= 16, "19 of 20 in the mean"


def test_a_bias_is_found_and_none_is_not():
    plain = 1 + samples(500)
    share, p_value = benchmark.bias(plain, 1 + samples(500, seed=1))
    assert abs(share) < 0.05 and p_value > 0.01
    share, p_value = benchmark.bias(plain, 1.5 + samples(500, seed=1))
    assert share == pytest.approx(0.25, rel=0.3) and p_value < 0.001


@pytest.fixture(scope="module")
def measured(demo_dir):
    return benchmark.measure(demo_dir, **SMALL)


def test_a_small_run_finds_what_is_known(measured):
    """No bias; and the loss, which depends on the timestep, varies less where timesteps are stratified."""
    json.dumps(measured)
    found = measured["effective_batch_size"][2]
    for what in ("loss", "gradient"):
        for name in ("stratified", "antithetic", "both"):
            row = found[what][name]
            low, high = row["interval_95"]
            assert 0 < low <= row["variance_ratio"] <= high and row["bias_p"] > 0.005, (what, name, row)
    assert "stratified" in benchmark.describe(measured)


@pytest.mark.slow
def test_larger_updates_vary_less(demo_dir):
    """A mean of n independent items has an n-th of the variance of one."""
    inputs = benchmark.load_inputs(demo_dir, seconds=2, max_tracks=6, rank=2)
    one, four = (
        benchmark.losses_and_gradients(inputs, benchmark.drawn_updates(inputs, size, range(150), {}))
        for size in (1, 4)
    )
    for part in (0, 1):
        ratio = benchmark.trace_of_covariance(one[part]) / benchmark.trace_of_covariance(four[part])
        assert 2.2 < ratio < 8, "about 4; more where the tracks differ, as an update has each at most once"


@pytest.mark.slow
def test_wrong_timesteps_are_noticed(demo_dir, monkeypatch):
    original = TimestepDistribution.from_uniform
    monkeypatch.setattr(TimestepDistribution, "from_uniform", lambda self, u: original(self, u**8))
    found = benchmark.measure(demo_dir, **SMALL)["effective_batch_size"][2]
    assert found["loss"]["stratified"]["bias_p"] < 0.005 or found["gradient"]["stratified"]["bias_p"] < 0.005
    assert found["loss"]["antithetic"]["bias_p"] > 0.005
