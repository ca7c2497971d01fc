"""How far generated music is from the training music in sound: a Fréchet distance over MFCCs and spectral contrast.

Each second of music is a point; two sets of clips are compared as if their points were normally distributed, as the
Fréchet Audio Distance does with learned features (Kilgour et al. 2019, arXiv:1812.08466). The features here are made
by hand, from librosa: they hear timbre and density, neither melody nor words. Scaled by their spread in the training
music, they count alike.

Nothing here imports torch or librosa before it measures.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

NUM_MFCCS = 12
NUM_CONTRASTS = 7
NUM_FEATURES = NUM_MFCCS + NUM_CONTRASTS
SEGMENT_S = 1.0
# A set's covariance needs some more points than features, and points of one clip are much alike. Of sets of 8 clips of
# 30 s, in three styles of real music, 99 % were nearer to the rest of their own style than sets of another style were;
# of sets of 2 clips, 91 % (`benchmarks/style_distance.py`). A paired permutation test of fewer than 6 finds nothing.
MIN_CLIPS = 8
MIN_SEGMENTS = 3 * NUM_FEATURES
NUM_RESAMPLES = 999
SIGNIFICANT = 0.05
_FFT, _HOP = 2048, 1024


@dataclass(frozen=True)
class StyleDistance:
    """Distances to the training music, without unit; 0 is alike.

    `low` and `high` bound 95 % of the changes by the adapter when the generated clips are drawn anew from themselves
    (paired bootstrap). `p` is how often as large a change comes about if with and without are swapped at random, clip
    by clip (paired permutation test): unlike the bootstrap it is exact for few clips. `within` is the distance between
    two halves of the training music, for comparison.
    """

    clips: int
    training_clips: int
    without: float
    with_adapter: float
    low: float
    high: float
    p: float
    within: float

    @property
    def change(self) -> float:
        """Below 0: the adapter brings the music nearer."""
        return self.with_adapter - self.without


def check_style_distance(clips: int | None, duration_s: float) -> None:
    """Refuse a number of clips (None: it isn't measured) that is too small, or a missing librosa.

    Raises:
        UsageError: with the fix.
    """
    if clips is None:
        return
    if clips < MIN_CLIPS:
        raise UsageError(
            f"--style_distance compares sets, and takes {MIN_CLIPS} clips or more, not {clips}: with fewer the "
            "distance depends on which clips they are."
        )
    if clips * duration_s < MIN_SEGMENTS * SEGMENT_S:
        raise UsageError(
            f"--style_distance needs {MIN_SEGMENTS * SEGMENT_S:g} s of music, not {clips} clips of {duration_s:g} s; "
            "raise it or --validation_duration_s."
        )
    if importlib.util.find_spec("librosa") is None:
        raise UsageError("--style_distance needs librosa: pip install 'ace-step-lora[style-distance]'.")


def too_small(durations_s: Sequence[float]) -> str | None:
    """Why training music in clips of these lengths is no set to compare with; None if it is one."""
    seconds = sum(int(duration_s / SEGMENT_S) * SEGMENT_S for duration_s in durations_s)
    if len(durations_s) >= MIN_CLIPS and seconds >= MIN_SEGMENTS * SEGMENT_S:
        return None
    return (
        f"not measured: the training music makes {len(durations_s)} clips and {seconds:g} s, and a distance between "
        f"sets takes {MIN_CLIPS} clips and {MIN_SEGMENTS * SEGMENT_S:g} s; with less it would depend on which they are"
    )


def style_features(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """The points of a clip.

    Args:
        waveform: `[channels, samples]`.
        sample_rate: in Hz, above 25,600 (the highest band of the spectral contrast).

    Returns:
        float64 `[whole seconds, NUM_FEATURES]`: MFCCs but the first, which is loudness, and spectral contrast.
    """
    import librosa

    magnitudes = np.abs(librosa.stft(waveform.mean(0), n_fft=_FFT, hop_length=_HOP))
    mel = librosa.feature.melspectrogram(S=magnitudes**2, sr=sample_rate)
    mfccs = librosa.feature.mfcc(S=librosa.power_to_db(mel), n_mfcc=NUM_MFCCS + 1)[1:]
    contrasts = librosa.feature.spectral_contrast(S=magnitudes, sr=sample_rate)
    frames = np.concatenate([mfccs, contrasts]).astype(np.float64)
    size = round(SEGMENT_S * sample_rate / _HOP)
    segments = frames.shape[1] // size
    return frames[:, : segments * size].reshape(NUM_FEATURES, segments, size).mean(2).T


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½) of the means and covariances of two sets of points `[n, features]`
    (Dowson and Landau 1982)."""
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # Similar to a positive semidefinite matrix: its eigenvalues are real and not negative, but for rounding.
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0))
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def compare_styles(
    training: list[np.ndarray], without: list[np.ndarray], with_adapter: list[np.ndarray], *, seed: int
) -> StyleDistance:
    """Compare the points (`style_features`) of generated clips with those of the training music.

    Clip by clip, `without` and `with_adapter` are of the same prompt and noise. The training music is taken as it is:
    chance lies in which clips were generated.
    """
    from scipy.stats import bootstrap, permutation_test

    scale = np.concatenate(training).std(0)
    scale[scale == 0] = 1.0
    training = [points / scale for points in training]
    target = np.concatenate(training)
    generated = [points / scale for points in (*without, *with_adapter)]
    first, second = np.arange(len(without)), np.arange(len(without)) + len(without)

    def distance(chosen: np.ndarray) -> float:
        return frechet_distance(np.concatenate([generated[index] for index in chosen]), target)

    def change(before: np.ndarray, after: np.ndarray) -> float:
        return distance(after) - distance(before)

    drawn = {"n_resamples": NUM_RESAMPLES, "vectorized": False, "rng": np.random.default_rng(seed)}
    spread = bootstrap((first, second), change, paired=True, method="percentile", **drawn).confidence_interval
    p = permutation_test((first, second), change, permutation_type="samples", **drawn).pvalue
    return StyleDistance(
        clips=len(without),
        training_clips=len(training),
        without=distance(first),
        with_adapter=distance(second),
        low=float(spread.low),
        high=float(spread.high),
        p=float(p),
        within=frechet_distance(np.concatenate(training[::2]), np.concatenate(training[1::2])),
    )


def describe_style(style: StyleDistance) -> str:
    """The distances, and what they mean, for a person."""
    direction = "nearer" if style.change < 0 else "farther"
    if style.p > SIGNIFICANT:
        direction = "not clearly nearer or farther"
    return (
        f"{direction} with the adapter: distance to the training music {style.without:.1f} without it, "
        f"{style.with_adapter:.1f} with it ({style.change:+.1f}, bootstrap 95 % {style.low:+.1f} to {style.high:+.1f} "
        f"over {style.clips} clips, p = {style.p:.2g}); two halves of the training music are {style.within:.1f} apart"
    )
