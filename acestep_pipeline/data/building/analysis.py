"""What a decoded track is like, in numbers, and what is wrong with it, in words."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from ..audio import SAMPLE_RATE
from .fingerprint import Fingerprinter

Severity = Literal["error", "warning", "note"]

# Raise when a measurement changes its meaning: results are kept by file hash and this.
ANALYSIS_VERSION = 2
SILENCE_DB = -60.0
WINDOW_S = 0.05
# Full scale of 16-bit audio is 32767/32768; a run of three such samples is a clipped crest, not a loud one.
CLIP_LEVEL = 0.9999
CLIP_RUN = 3
# ITU-R BS.1770-4, annex 1, tables 1 and 2: the two stages of K-weighting at 48 kHz (b0 b1 b2 a0 a1 a2).
K_WEIGHTING = (
    (1.53512485958697, -2.69169618940638, 1.19839281085285, 1.0, -1.69065929318241, 0.73248077421585),
    (1.0, -2.0, 1.0, 1.0, -1.99004745483398, 0.99007225036621),
)
ENVELOPE_POINTS = 120
SPECTRUM_SECONDS = 16
# An encoder that leaves out what lies above this had few bits.
LOW_BIT_RATE_HZ = 17_500.0
# What the model was trained on.
TRAINED_S = (10.0, 600.0)

_WINDOW = int(WINDOW_S * SAMPLE_RATE)
_LOUDNESS_STEP = SAMPLE_RATE // 10
# Seconds in one call of the loudness filter, whose overhead is a quarter of its work on one.
_WEIGHTED_TOGETHER = 8


@dataclass(frozen=True)
class Finding:
    """One remark about one track. An error rejects it; a warning and a note do not."""

    track: str
    severity: Severity
    reason: str


@dataclass(frozen=True)
class Measurements:
    """Of the 48 kHz stereo waveform that training sees (a mono file's sound is in both channels).

    Attributes:
        duration_s: its length.
        peak_db: highest sample, dBFS; silence is stored as -200.
        rms_db: mean level of both channels, dBFS; silence is stored as -200.
        loudness_lufs: integrated, gated, as ITU-R BS.1770-4 says; None where all of it is below -70 LUFS or it is
            shorter than 0.4 s.
        clipped: share of samples in clipped crests.
        leading_silence_s, trailing_silence_s: below -60 dBFS at either end, in steps of 0.05 s.
        dc_offset: the larger channel's mean, full scale 1.
        balance_db: level of the left channel less that of the right; ±200 at most.
        correlation: of left and right, -1 to 1; 0 where one is silent.
        identical_channels: every sample of left equals right's.
        bandwidth_hz: only 0.01 % of the energy of the loudest seconds lies above it, after a first difference.
        cutoff_hz: of a steep low-pass such as lossy encoders apply, None where the spectrum has no such edge.
        waveform: `ENVELOPE_POINTS` peaks over the track's length, 0 to 99 (full scale), for a picture.
    """

    duration_s: float
    peak_db: float
    rms_db: float
    loudness_lufs: float | None
    clipped: float
    leading_silence_s: float
    trailing_silence_s: float
    dc_offset: float
    balance_db: float
    correlation: float
    identical_channels: bool
    bandwidth_hz: float
    cutoff_hz: float | None
    waveform: list[int]

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)


def to_db(amplitude: float) -> float:
    """20 log10, with silence at -200 dB."""
    return float(20 * np.log10(max(amplitude, 1e-10)))


def analyse(blocks: Iterable[np.ndarray]) -> tuple[Measurements, np.ndarray]:
    """`measure` and the track's fingerprint (uint32 words, see `fingerprint`), from one pass over `stream_audio`."""
    printer = Fingerprinter()
    return measure(printer.listen(blocks)), printer.words()


def measure(blocks: np.ndarray | Iterable[np.ndarray]) -> Measurements:
    """Measure a 48 kHz float32 waveform: `[2, samples]`, or its blocks in order, in memory that does not grow with it.

    The result is the same to the bit however the waveform is divided. Raises `ValueError` where there is no sample.
    """
    meter = _Meter()
    for second in _seconds([blocks] if isinstance(blocks, np.ndarray) else blocks):
        meter.add(second)
    return meter.result()


def _seconds(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same samples `[2, n]` in contiguous blocks of one second, the last one shorter."""
    buffer, filled = np.empty((2, SAMPLE_RATE), np.float32), 0
    for block in blocks:
        position = 0
        while position < block.shape[1]:
            count = min(SAMPLE_RATE - filled, block.shape[1] - position)
            buffer[:, filled : filled + count] = block[:, position : position + count]
            filled, position = filled + count, position + count
            if filled == SAMPLE_RATE:
                yield buffer
                buffer, filled = np.empty((2, SAMPLE_RATE), np.float32), 0
    if filled:
        yield np.ascontiguousarray(buffer[:, :filled])


class _Meter:
    """The sums from which `Measurements` follow. Feed it every second of a track, only the last one shorter."""

    def __init__(self):
        self.samples = 0
        self.sums, self.energies = np.zeros(2), np.zeros(2)
        self.product = 0.0
        self.identical = True
        self.peaks: list[np.ndarray] = []
        self.clipped = self.open_run = 0
        self.weighting = np.array(K_WEIGHTING, np.float32)
        self.filter_state = np.zeros((2, 2, 2), np.float32)
        self.unweighted: list[np.ndarray] = []
        self.loudness_energies: list[np.ndarray] = []
        self.loudest: list[tuple[float, int, np.ndarray]] = []

    def add(self, second: np.ndarray) -> None:
        left, right = second
        energies = np.array([np.dot(left, left), np.dot(right, right)], np.float64)
        self.sums += second.sum(axis=1)
        self.energies += energies
        self.product += float(np.dot(left, right))
        self.identical = self.identical and np.array_equal(left, right)
        whole = second.shape[1] == SAMPLE_RATE
        if whole or self.samples == 0:  # of a shorter track, what there is
            item = (float(energies.sum()), -self.samples, second)
            (heapq.heappush if len(self.loudest) < SPECTRUM_SECONDS else heapq.heappushpop)(self.loudest, item)
        self.unweighted.append(second)
        if len(self.unweighted) == _WEIGHTED_TOGETHER:
            self._add_loudness()
        self.samples += second.shape[1]
        if not whole:
            second = np.pad(second, ((0, 0), (0, -second.shape[1] % _WINDOW)))
        windows = second.reshape(2, -1, _WINDOW)
        peaks = np.maximum(windows.max(axis=2), -windows.min(axis=2)).max(axis=0)
        self.peaks.append(peaks)
        if peaks.max() >= CLIP_LEVEL or self.open_run:
            self._add_clips(np.abs(second).max(axis=0) >= CLIP_LEVEL)

    def _add_clips(self, full: np.ndarray) -> None:
        """Count the samples in runs at full scale; a run that reaches the end stays open for the next second."""
        edges = np.flatnonzero(np.diff(full, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        lengths = ends - starts
        if len(starts) and starts[0] == 0:
            lengths[0] += self.open_run
        else:
            self._close_run()
        self.open_run = 0
        if len(ends) and ends[-1] == len(full):
            self.open_run, lengths = int(lengths[-1]), lengths[:-1]
        self.clipped += int(lengths[lengths >= CLIP_RUN].sum())

    def _close_run(self) -> None:
        self.clipped += self.open_run if self.open_run >= CLIP_RUN else 0

    def _add_loudness(self) -> None:
        """Energy of the K-weighted channels in each whole 0.1 s. (Float32 is out by less than 0.001 LU.)"""
        from scipy.signal import sosfilt

        waveform = np.concatenate(self.unweighted, axis=1)
        self.unweighted = []
        weighted, self.filter_state = sosfilt(self.weighting, waveform, zi=self.filter_state)
        steps = weighted[:, : waveform.shape[1] // _LOUDNESS_STEP * _LOUDNESS_STEP].reshape(2, -1, _LOUDNESS_STEP)
        self.loudness_energies.append(np.einsum("cns,cns->n", steps, steps).astype(np.float64))

    def result(self) -> Measurements:
        if not self.samples:
            raise ValueError("there is no sample to measure")
        self._close_run()
        if self.unweighted:
            self._add_loudness()
        peaks = np.concatenate(self.peaks)
        loud = np.flatnonzero(peaks > 10 ** (SILENCE_DB / 20))
        duration_s = self.samples / SAMPLE_RATE
        leading, trailing = duration_s, duration_s
        if len(loud):
            leading, trailing = loud[0] * WINDOW_S, max(0.0, duration_s - (loud[-1] + 1) * WINDOW_S)
        levels = [to_db(np.sqrt(energy / self.samples)) for energy in self.energies]
        norm = float(np.sqrt(self.energies.prod()))
        spectrum = _spectrum([second for _, _, second in sorted(self.loudest, reverse=True, key=lambda x: x[:2])])
        return Measurements(
            duration_s=duration_s,
            peak_db=to_db(float(peaks.max())),
            rms_db=to_db(np.sqrt(self.energies.sum() / (2 * self.samples))),
            loudness_lufs=integrated_loudness(np.concatenate(self.loudness_energies) / _LOUDNESS_STEP),
            clipped=self.clipped / self.samples,
            leading_silence_s=float(leading),
            trailing_silence_s=float(trailing),
            dc_offset=float(np.abs(self.sums).max() / self.samples),
            balance_db=levels[0] - levels[1],
            correlation=float(np.clip(self.product / norm, -1, 1)) if norm > 0 else 0.0,
            identical_channels=self.identical,
            bandwidth_hz=_bandwidth(spectrum),
            cutoff_hz=_cutoff(spectrum),
            waveform=_envelope(peaks),
        )


def integrated_loudness(energies: np.ndarray) -> float | None:
    """Integrated loudness in LUFS of `[n]` K-weighted mean squares of 0.1 s, summed over channels.

    ITU-R BS.1770-4, annex 1: blocks of 0.4 s every 0.1 s, an absolute gate at -70 LUFS and a relative one 10 LU below
    the mean of what passes it. None where nothing passes.
    """
    if len(energies) < 4:
        return None
    blocks = np.lib.stride_tricks.sliding_window_view(energies, 4).mean(axis=1)
    blocks = blocks[blocks > 10 ** ((-70 + 0.691) / 10)]
    if not len(blocks):
        return None
    return float(-0.691 + 10 * np.log10(blocks[blocks > 0.1 * blocks.mean()].mean()))


def _envelope(peaks: np.ndarray) -> list[int]:
    starts = np.arange(ENVELOPE_POINTS) * len(peaks) // ENVELOPE_POINTS
    return np.minimum(99, np.round(99 * np.maximum.reduceat(peaks, starts))).astype(int).tolist()


def _spectrum(seconds: list[np.ndarray]) -> np.ndarray:
    """Energy per 1 Hz, `[24001]`, of both channels of the seconds, after a first difference.

    The difference (+6 dB an octave) makes up for music's fall towards high frequencies.
    """
    from scipy.fft import rfft

    window = np.hanning(SAMPLE_RATE - 1).astype(np.float32)
    total = np.zeros(SAMPLE_RATE // 2 + 1)
    for second in seconds:
        step = np.diff(np.pad(second, ((0, 0), (0, SAMPLE_RATE - second.shape[1]))), axis=1)
        bins = rfft(step * window, n=SAMPLE_RATE)
        total += (np.square(bins.real) + np.square(bins.imag)).sum(axis=0)
    return total


def _bandwidth(spectrum: np.ndarray) -> float:
    """Frequency below which 99.99 % of the energy of a spectrum per 1 Hz lies."""
    total = spectrum.sum()
    return float(np.searchsorted(np.cumsum(spectrum), 0.9999 * total)) if total > 0 else 0.0


def _cutoff(spectrum: np.ndarray, *, lowest_hz: int = 9_000, drop_db: float = 20.0) -> float | None:
    """Where the spectrum per 1 Hz falls by `drop_db` within 600 Hz and never comes back, None if nowhere.

    An encoder's low-pass does that; music's own fall is slower (see `judge` for what was measured).
    """
    width = 100
    bands = spectrum[: len(spectrum) // width * width].reshape(-1, width).mean(axis=1)
    level = 10 * np.log10(np.maximum(bands, bands.max() * 1e-14 + 1e-30))
    best = None
    for edge in range(lowest_hz // width, len(level) - 8):
        below = level[edge - 5 : edge].mean()
        drop = below - level[edge + 3 : edge + 8].mean()
        if drop >= drop_db and level[edge + 3 :].max() < below - drop_db / 2 and (best is None or drop > best[0]):
            best = (drop, edge * width)
    return None if best is None else float(best[1])


def judge(track: str, measured: Measurements, *, sample_rate: int, channels: int) -> list[Finding]:
    """What a person should know about a track with these measurements, the reason in words.

    Args:
        track: its id.
        measured: of the decoded waveform.
        sample_rate: of the file, Hz.
        channels: of the file.
    """
    if measured.peak_db <= SILENCE_DB:
        return [Finding(track, "error", f"it is silent (peak {measured.peak_db:.0f} dBFS)")]
    found = [*_judge_level(measured), *_judge_spectrum(measured, sample_rate)]
    found += [("note", "it is mono")] if channels == 1 else _judge_channels(measured)
    if measured.duration_s < TRAINED_S[0]:
        found.append(
            (
                "warning",
                f"it is {measured.duration_s:.1f} s long: the model was trained on {TRAINED_S[0]:.0f} s to "
                f"{TRAINED_S[1]:.0f} s",
            )
        )
    return [Finding(track, severity, reason) for severity, reason in found]


def _judge_level(measured: Measurements) -> Iterator[tuple[Severity, str]]:
    if measured.clipped > 1e-3:
        yield "warning", f"it is clipped: {100 * measured.clipped:.1f} % of its samples are cut off"
    for where, silence_s in (("begins", measured.leading_silence_s), ("ends", measured.trailing_silence_s)):
        if silence_s > 3:
            yield "warning", f"it {where} with {silence_s:.1f} s of silence"
    if measured.dc_offset > 0.01:
        yield "warning", f"it has a DC offset of {measured.dc_offset:.3f} of full scale"
    if measured.loudness_lufs is None:
        if measured.rms_db < -40:
            yield "warning", f"it is very quiet ({measured.rms_db:.0f} dBFS on average)"
    elif measured.loudness_lufs < -40:
        yield "warning", f"it is very quiet ({measured.loudness_lufs:.0f} LUFS)"
    elif measured.loudness_lufs > -5:
        yield "note", f"it is very loud ({measured.loudness_lufs:.1f} LUFS): its dynamics are squashed"


def _judge_spectrum(measured: Measurements, sample_rate: int) -> Iterator[tuple[Severity, str]]:
    if sample_rate < SAMPLE_RATE * 0.9:
        yield "note", f"its sample rate is {sample_rate} Hz: there is no sound above {sample_rate // 2} Hz"
    # The edge of the file's own sample rate is no encoder's.
    elif measured.cutoff_hz is not None and measured.cutoff_hz < LOW_BIT_RATE_HZ:
        yield "note", f"it has next to nothing above {measured.cutoff_hz / 1000:.1f} kHz: a low bit rate at some time"


def _judge_channels(measured: Measurements) -> Iterator[tuple[Severity, str]]:
    """Of a file with several channels, as mixed to stereo."""
    if abs(measured.balance_db) > 40:
        yield "warning", f"its {'right' if measured.balance_db > 0 else 'left'} channel is silent"
    elif abs(measured.balance_db) > 6:
        side = "left" if measured.balance_db > 0 else "right"
        yield "note", f"its {side} channel is {abs(measured.balance_db):.0f} dB louder than the other"
    elif measured.identical_channels:
        yield "note", "both channels are the same: mono in a stereo file"
    elif measured.correlation < -0.5:
        yield "warning", f"its channels are out of phase (correlation {measured.correlation:.2f}): mono cancels it"
