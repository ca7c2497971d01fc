"""How far up the sound of a track reaches, and whether an encoder cut it off."""

import numpy as np


def energy_spectrum(seconds: list[np.ndarray]) -> np.ndarray:
    """Energy per 1 Hz of both channels of seconds `[2, rate]`, all together and after a first difference.

    The difference (+6 dB an octave) makes up for music's fall towards high frequencies. Returns `[rate // 2 + 1]`.
    """
    from scipy.fft import fft

    rate = seconds[0].shape[1]
    window = np.hanning(rate - 1).astype(np.float32)
    total = np.zeros(rate, np.float32)
    signal = np.zeros(rate, np.complex64)
    for left, right in seconds:
        # The spectrum of two real signals as one complex one holds both energies, in either half.
        np.multiply(np.diff(left), window, out=signal.real[:-1])
        np.multiply(np.diff(right), window, out=signal.imag[:-1])
        bins = fft(signal)
        total += np.square(bins.real) + np.square(bins.imag)
    half = total[: rate // 2 + 1].astype(np.float64)
    half[1:] = (half[1:] + total[: -(rate // 2) - 1 : -1]) / 2
    return half


def bandwidth(spectrum: np.ndarray) -> float:
    """Frequency below which 99.99 % of the energy of a spectrum per 1 Hz lies."""
    total = spectrum.sum()
    return float(np.searchsorted(np.cumsum(spectrum), 0.9999 * total)) if total > 0 else 0.0


def cutoff(spectrum: np.ndarray, *, lowest_hz: int = 9_000, drop_db: float = 20.0) -> float | None:
    """Where the spectrum per 1 Hz falls by `drop_db` within 600 Hz and never comes back, None if nowhere.

    An encoder's low-pass does that; music's own fall is slower (see `analysis.judge` for what was measured).
    """
    width = 100
    bands = spectrum[: len(spectrum) // width * width].reshape(-1, width).mean(axis=1)
    level = 10 * np.log10(np.maximum(bands, bands.max() * 1e-14 + 1e-30))
    edges = np.arange(lowest_hz // width, len(level) - 8)
    means = np.lib.stride_tricks.sliding_window_view(level, 5).mean(axis=1)
    below, above = means[edges - 5], means[edges + 3]
    highest_above = np.maximum.accumulate(level[::-1])[::-1][edges + 3]
    falls = np.where(highest_above < below - drop_db / 2, below - above, -np.inf)
    best = int(falls.argmax())
    return float(edges[best] * width) if falls[best] >= drop_db else None
