"""Measurements of known signals, whatever blocks they come in, and what is said of them."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import soxr

from acestep_pipeline.data.audio import SAMPLE_RATE, read_audio, stream_audio
from acestep_pipeline.data.building.analysis import (
    CLIP_LEVEL,
    ENVELOPE_POINTS,
    NATIVE_RATES,
    Measurements,
    analyse,
    analysis_rate,
    judge,
    measure,
)


def noise(seconds: float = 12.0, level: float = 0.1, seed: int = 0) -> np.ndarray:
    return np.float32(level * np.random.default_rng(seed).standard_normal((2, int(seconds * SAMPLE_RATE))))


def tone(seconds: float, dbfs: float, hz: float = 1000.0, rate: int = SAMPLE_RATE) -> np.ndarray:
    """A stereo sine whose crest is at `dbfs`."""
    wave = 10 ** (dbfs / 20) * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.float32(np.stack([wave, wave]))


def reasons(waveform, sample_rate=SAMPLE_RATE, channels=2) -> list[str]:
    found = judge("x", measure(waveform), sample_rate=sample_rate, channels=channels)
    return [f"{finding.severity}: {finding.reason}" for finding in found]


def divided(waveform: np.ndarray, seed: int) -> list[np.ndarray]:
    """In blocks of any length, some of them empty."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, waveform.shape[1], 40))
    return [waveform[:, a:b] for a, b in pairwise([0, 0, *cuts.tolist(), waveform.shape[1]])]


@pytest.mark.parametrize("rate", NATIVE_RATES)
@pytest.mark.parametrize("seed", range(3))
def test_the_division_into_blocks_changes_nothing(seed, rate):
    waveform = np.clip(noise(7.37, 0.4), -1, 1)
    waveform[:, : SAMPLE_RATE // 3] = 0
    waveform[1, SAMPLE_RATE - 2 : SAMPLE_RATE + 2] = 1  # a clipped crest across the border of two seconds
    measured, words = analyse([waveform], sample_rate=rate)
    again, same_words = analyse(divided(waveform, seed), sample_rate=rate)
    assert again == measured == measure(waveform, sample_rate=rate)
    assert np.array_equal(words, same_words) and len(words)


def test_a_clipped_crest_across_blocks_counts_whole():
    waveform = np.zeros((2, 3 * SAMPLE_RATE), np.float32)
    waveform[0, SAMPLE_RATE - 2 : SAMPLE_RATE + 2] = 1  # 4 samples over a border
    waveform[1, 2 * SAMPLE_RATE - 1 : 2 * SAMPLE_RATE + 1] = -1  # 2: too few
    waveform[0, -5:] = 1  # open at the end
    assert measure(waveform).clipped == pytest.approx(9 / waveform.shape[1])


def test_what_is_counted_does_not_depend_on_where_seconds_end():
    waveform = np.clip(noise(9.2, 1.5), -1, 1)  # three quarters of it at full scale
    full = np.abs(waveform).max(axis=0) >= CLIP_LEVEL
    edges = np.flatnonzero(np.diff(full, prepend=False, append=False)).reshape(-1, 2)
    lengths = edges[:, 1] - edges[:, 0]
    measured = measure(waveform)
    assert measured.clipped == pytest.approx(lengths[lengths >= 3].sum() / waveform.shape[1])
    assert measured.rms_db == pytest.approx(20 * np.log10(np.sqrt(np.square(waveform, dtype=float).mean())), abs=1e-5)
    assert measured.dc_offset == pytest.approx(np.abs(waveform.mean(axis=1, dtype=float)).max(), abs=1e-7)
    assert measured.correlation == pytest.approx(np.corrcoef(waveform)[0, 1], abs=1e-4)


def test_a_file_at_44_1_khz_is_measured_as_it_is(tmp_path):
    assert [analysis_rate(rate) for rate in (44_100, 48_000, 22_050, 96_000)] == [44_100, 48_000, 48_000, 48_000]
    waveform = np.float32(soxr.resample(noise(3).T, 11_025, 44_100).T)  # nothing near either rate's upper edge
    waveform[:, 1000:1100] = 1
    soundfile.write(tmp_path / "a.wav", waveform.T, 44_100, subtype="FLOAT")
    native, resampled = (
        measure(stream_audio(tmp_path / "a.wav", sample_rate=rate), sample_rate=rate) for rate in NATIVE_RATES
    )
    # Resampling makes crests of what was cut off.
    assert native.peak_db == 0 < resampled.peak_db
    assert native.clipped == pytest.approx(100 / waveform.shape[1])
    for name in ("duration_s", "rms_db", "loudness_lufs", "dc_offset", "balance_db", "correlation"):
        assert getattr(native, name) == pytest.approx(getattr(resampled, name), abs=0.02), name


# EBU Tech 3341, table 1: cases 1 to 5 (the peaks of a stereo sine at 1 kHz, and the LUFS that a meter must show).
@pytest.mark.parametrize(
    "parts, lufs",
    [
        ([(20, -23)], -23.0),
        ([(20, -33)], -33.0),
        ([(10, -36), (60, -23), (10, -36)], -23.0),
        ([(10, -72), (10, -36), (60, -23), (10, -36), (10, -72)], -23.0),
        ([(20, -26), (20.1, -20), (20, -26)], -23.0),
    ],
)
def test_loudness_is_that_of_ebu_tech_3341(parts, lufs):
    for rate in NATIVE_RATES:
        blocks = [tone(seconds, dbfs, rate=rate) for seconds, dbfs in parts]
        assert measure(blocks, sample_rate=rate).loudness_lufs == pytest.approx(lufs, abs=0.1)


def test_loudness_weighs_frequencies_as_the_standard_does():
    # BS.1770-4: a full-scale 997 Hz sine in one channel is -3.01 LKFS; bass counts for less, treble for more.
    single = tone(3, 0, 997)
    single[1] = 0
    assert measure(single).loudness_lufs == pytest.approx(-3.01, abs=0.02)
    assert measure(tone(3, -23, 40)).loudness_lufs < -27 < -20 < measure(tone(3, -23, 8000)).loudness_lufs


def test_what_is_too_quiet_or_too_short_has_no_loudness():
    assert measure(tone(2, -80)).loudness_lufs is None
    assert measure(tone(0.3, -6)).loudness_lufs is None
    with pytest.raises(ValueError, match="no sample"):
        measure([])


def test_the_envelope_is_the_shape_of_the_track():
    loud = tone(30, 0)
    loud[:, : 15 * SAMPLE_RATE] *= 0.5
    envelope = measure(loud).waveform
    assert envelope == [50] * (ENVELOPE_POINTS // 2) + [99] * (ENVELOPE_POINTS // 2)
    assert len(measure(tone(0.1, 0)).waveform) == ENVELOPE_POINTS and set(measure(noise(1) * 0).waveform) == {0}


def test_measurements_are_plain_values():
    import json

    stored = json.loads(json.dumps(measure(noise(2)).as_dict()))
    assert Measurements(**stored) == measure(noise(2))


def test_memory_does_not_grow_with_the_track():
    def peak_bytes(seconds: int) -> int:
        block = noise(1)
        tracemalloc.start()
        analyse(block for _ in range(seconds))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(160) < 1.1 * peak_bytes(40) + 2e5


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda w: w * np.float32([[1], [0]]), "warning: its right channel is silent"),
        (lambda w: w * np.float32([[0], [1]]), "warning: its left channel is silent"),
        (lambda w: w * np.float32([[0.3], [1]]), "note: its right channel is 10 dB louder than the other"),
        (lambda w: w[[0, 0]], "note: both channels are the same: mono in a stereo file"),
        (
            lambda w: np.stack([w[0], -w[0]]),
            "warning: its channels are out of phase (correlation -1.00): mono cancels it",
        ),
        (lambda w: w[:, : 4 * SAMPLE_RATE], "warning: it is 4.0 s long: the model was trained on 10 s to 600 s"),
        (lambda w: w * np.float32(0.01), "warning: it is very quiet (-54 LUFS)"),
        (lambda w: w * np.float32(0), "error: it is silent (peak -200 dBFS)"),
        (
            lambda w: np.clip(w * 6, -0.99, 0.99),
            "note: it is very loud (0.9 LUFS): its dynamics are squashed",
        ),
    ],
)
def test_one_trouble_gives_one_finding(change, reason):
    assert reasons(noise()) == []
    assert reasons(change(noise())) == [reason]


def test_mono_files_are_mono_and_not_stereo_with_equal_channels():
    assert reasons(noise()[[0, 0]], channels=1) == ["note: it is mono"]


def test_a_low_bit_rate_is_found_and_a_dark_mix_is_not(tmp_path):
    options = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "CONSTANT"}
    soundfile.write(tmp_path / "low.mp3", noise(5).T, SAMPLE_RATE, compression_level=0.7, **options)
    soundfile.write(tmp_path / "high.mp3", noise(5).T, SAMPLE_RATE, compression_level=0.0, **options)
    assert any("next to nothing above 1" in reason for reason in reasons(read_audio(tmp_path / "low.mp3")))
    assert not any("next to nothing" in reason for reason in reasons(read_audio(tmp_path / "high.mp3")))
    # 24 dB an octave from 4 kHz: dark, but nobody's encoder.
    spectrum = np.fft.rfft(noise())
    hz = np.fft.rfftfreq(12 * SAMPLE_RATE, 1 / SAMPLE_RATE)
    dark = np.fft.irfft(spectrum / (1 + (hz / 4000) ** 4))
    assert reasons(np.float32(dark)) == []


def test_a_low_sample_rate_is_named_once():
    expected = ["note: its sample rate is 22050 Hz: there is no sound above 11025 Hz"]
    assert reasons(noise(), sample_rate=22_050) == expected
