"""K-weighting in blocks is K-weighting sample by sample, at either rate."""

import numpy as np
import pytest
from scipy.signal import sosfilt, sosfreqz

from acestep_pipeline.data.loudness import LoudnessMeter, integrated_loudness, k_weighting

RATES = (44_100, 48_000)


def signals(rate: int) -> dict[str, np.ndarray]:
    """Twelve seconds `[2, samples]` of what is easy, and of what a high-pass at 38 Hz in float32 is bad at."""
    seconds = np.arange(12 * rate) / rate
    noise = 0.1 * np.random.default_rng(0).standard_normal((2, len(seconds)))
    return {
        "noise": noise,
        "quiet, on a large DC offset": 0.01 * noise + 0.9,
        "mostly infrasound": 0.8 * np.sin(2 * np.pi * 8 * seconds) + 0.01 * noise,
        "bursts": noise * (seconds % 1 < 0.05),
        "one channel": noise * [[1], [0]],
    }


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", signals(48_000))
def test_it_is_that_of_the_filter_whatever_comes_together(rate, name):
    waveform = np.float32(signals(rate)[name])
    meter, step = LoudnessMeter(rate), rate // 10
    for begin, end in ((0, 1), (1, 3), (3, 40), (40, 119)):
        meter.add(waveform[:, begin * step : end * step])
    meter.add(waveform[:, 119 * step : -1])  # less than a step: not counted
    exact = sosfilt(k_weighting(rate), np.float64(waveform))[:, : 119 * step].reshape(2, 119, step)
    expected = integrated_loudness(np.square(exact).sum(axis=(0, 2)) / step)
    assert meter.result() == pytest.approx(expected, abs=1e-3)


def test_the_filter_is_the_standards_at_48_khz_and_has_its_response_at_44_1_khz():
    stages = [
        [1.53512485958697, -2.69169618940638, 1.19839281085285, 1.0, -1.69065929318241, 0.73248077421585],
        [1.0, -2.0, 1.0, 1.0, -1.99004745483398, 0.99007225036621],
    ]
    np.testing.assert_allclose(k_weighting(48_000), stages, atol=1e-9)
    hz = np.geomspace(10, 15_000, 300)
    gains = [20 * np.log10(np.abs(sosfreqz(k_weighting(rate), hz, fs=rate)[1])) for rate in RATES]
    np.testing.assert_allclose(*gains, atol=0.01)


def test_loudness_is_none_of_nothing():
    assert LoudnessMeter(48_000).result() is None
    with pytest.raises(ValueError):
        LoudnessMeter(11_025)
