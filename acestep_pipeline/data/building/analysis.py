"""What a decoded track is like, in numbers, and what is wrong with it, in words."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from ..audio import SAMPLE_RATE
from ..loudness import LoudnessMeter
from .fingerprint import Fingerprinter
from .spectrum import bandwidth, cutoff, energy_spectrum

Severity = Literal["error", "warning", "note"]

# Raise when a measurement changes its meaning: results are kept by file hash and this.
ANALYSIS_VERSION = 3
# Sample rates that are measured as they are; sound at any other is resampled to 48 kHz first.
NATIVE_RATES = (44_100, SAMPLE_RATE)
SILENCE_DB = -60.0
WINDOW_S = 0.05
# Full scale of 16-bit audio is 32767/32768; a run of three such samples is a clipped crest, not a loud one.
CLIP_LEVEL = 0.9999
CLIP_RUN = 3
ENVELOPE_POINTS = 120
SPECTRUM_SECONDS = 16
# An encoder that leaves out what lies above this had few bits.
LOW_BIT_RATE_HZ = 17_500.0
# What the model was trained on.
TRAINED_S = (10.0, 600.0)

# Seconds that are looked at together: numpy's overhead is small, and the sound is still in the processor's cache.
_CHUNK_S = 2


@dataclass(frozen=True)
class Finding:
    """One remark about one track. An error rejects it; a warning and a note do not."""

    track: str
    severity: Severity
    reason: str


@dataclass(frozen=True)
class Measurements:
    """Of a file's sound in stereo (mono is in both channels), resampled to 48 kHz unless its rate is 44.1 or 48 kHz.

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


def analysis_rate(sample_rate: int) -> int:
    """The rate at which a file of this rate, Hz, is measured."""
    return sample_rate if sample_rate in NATIVE_RATES else SAMPLE_RATE


def analyse(blocks: Iterable[np.ndarray], *, sample_rate: int = SAMPLE_RATE) -> tuple[Measurements, np.ndarray]:
    """`measure` and the track's fingerprint (uint32 words, see `fingerprint`), from one pass over `stream_audio`."""
    meter, printer = _Meter(sample_rate), Fingerprinter(sample_rate)
    for chunk in _chunks(blocks, sample_rate):
        meter.add(chunk)
        printer.add(chunk)
    return meter.result(), printer.words()


def measure(blocks: np.ndarray | Iterable[np.ndarray], *, sample_rate: int = SAMPLE_RATE) -> Measurements:
    """Measure a float32 waveform: `[2, samples]`, or its blocks in order, in memory that does not grow with it.

    The result is the same to the bit however the waveform is divided. `sample_rate` is one of `NATIVE_RATES`. Raises
    `ValueError` where there is no sample.
    """
    meter = _Meter(sample_rate)
    for chunk in _chunks([blocks] if isinstance(blocks, np.ndarray) else blocks, sample_rate):
        meter.add(chunk)
    return meter.result()


def _chunks(blocks: Iterable[np.ndarray], sample_rate: int) -> Iterator[np.ndarray]:
    """The same samples `[2, n]`, each channel contiguous, `_CHUNK_S` at a time; the last one is shorter.

    Each is gone when the next is asked for.
    """
    length = _CHUNK_S * sample_rate
    buffer, filled = np.empty((2, length), np.float32), 0
    for block in blocks:
        position = 0
        while position < block.shape[1]:
            count = min(length - filled, block.shape[1] - position)
            buffer[:, filled : filled + count] = block[:, position : position + count]
            filled, position = filled + count, position + count
            if filled == length:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:, :filled]


class _Meter:
    """The sums from which `Measurements` follow. Feed it every chunk of a track."""

    def __init__(self, sample_rate: int):
        self.sample_rate = sample_rate
        self.window = round(WINDOW_S * sample_rate)
        self.samples = 0
        self.sums, self.energies = np.zeros(2), np.zeros(2)
        self.product = 0.0
        self.identical = True
        self.peaks: list[np.ndarray] = []
        self.clipped = self.run = self.run_end = 0
        self.loudness = LoudnessMeter(sample_rate)
        self.loudest: list[tuple[float, int, np.ndarray]] = []

    def add(self, chunk: np.ndarray) -> None:
        """Take `[2, n]`; only the last chunk may have another length than whole seconds."""
        self.loudness.add(chunk)
        length = chunk.shape[1]
        if length % self.sample_rate:  # silence changes no sum
            chunk = np.pad(chunk, ((0, 0), (0, -length % self.sample_rate)))
        left, right = chunk
        seconds = chunk.reshape(2, -1, self.sample_rate)
        energies = np.vecdot(seconds, seconds).astype(np.float64)
        # A second that is not whole is not compared with others; of a shorter track it is all there is.
        for index in range(length // self.sample_rate or int(not self.samples)):
            self._remember(seconds[:, index], float(energies[:, index].sum()), self.samples + index * self.sample_rate)
        self.sums += chunk.sum(axis=1)
        self.energies += energies.sum(axis=1)
        self.product += float(np.dot(left, right))
        self.identical = self.identical and np.array_equal(left, right)
        windows = chunk.reshape(2, -1, self.window)
        peaks = np.maximum(windows.max(axis=2), -windows.min(axis=2)).max(axis=0)
        self._add_clips(windows, np.flatnonzero(peaks >= CLIP_LEVEL))
        self.peaks.append(peaks[: -(-length // self.window)])
        self.samples += length

    def _remember(self, second: np.ndarray, energy: float, start: int) -> None:
        """Keep a copy of a second that is among the loudest; of equals, the earlier."""
        if len(self.loudest) < SPECTRUM_SECONDS:
            heapq.heappush(self.loudest, (energy, -start, second.copy()))
        elif (energy, -start) > self.loudest[0][:2]:
            heapq.heapreplace(self.loudest, (energy, -start, second.copy()))

    def _add_clips(self, windows: np.ndarray, loud: np.ndarray) -> None:
        """Count the samples in runs at full scale; of `[2, n, window]`, only the windows `loud` have any.

        The last run stays open: the next chunk may go on with it.
        """
        if not len(loud):
            return
        window, sample = np.nonzero(np.abs(windows[:, loud]).max(axis=0) >= CLIP_LEVEL)
        positions = self.samples + loud[window] * self.window + sample
        starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
        lengths = np.diff(starts, append=len(positions))
        if positions[0] == self.run_end:
            lengths[0] += self.run
        else:
            self._close_run()
        self.run, self.run_end = int(lengths[-1]), int(positions[-1]) + 1
        self.clipped += int(lengths[:-1][lengths[:-1] >= CLIP_RUN].sum())

    def _close_run(self) -> None:
        self.clipped += self.run if self.run >= CLIP_RUN else 0

    def result(self) -> Measurements:
        if not self.samples:
            raise ValueError("there is no sample to measure")
        self._close_run()
        peaks = np.concatenate(self.peaks)
        loud = np.flatnonzero(peaks > 10 ** (SILENCE_DB / 20))
        duration_s = self.samples / self.sample_rate
        leading, trailing = duration_s, duration_s
        if len(loud):
            leading, trailing = loud[0] * WINDOW_S, max(0.0, duration_s - (loud[-1] + 1) * WINDOW_S)
        levels = [to_db(np.sqrt(energy / self.samples)) for energy in self.energies]
        norm = float(np.sqrt(self.energies.prod()))
        loudest = sorted(self.loudest, reverse=True, key=lambda item: item[:2])
        spectrum = energy_spectrum([second for *_, second in loudest])
        return Measurements(
            duration_s=duration_s,
            peak_db=to_db(float(peaks.max())),
            rms_db=to_db(np.sqrt(self.energies.sum() / (2 * self.samples))),
            loudness_lufs=self.loudness.result(),
            clipped=self.clipped / self.samples,
            leading_silence_s=float(leading),
            trailing_silence_s=float(trailing),
            dc_offset=float(np.abs(self.sums).max() / self.samples),
            balance_db=levels[0] - levels[1],
            correlation=float(np.clip(self.product / norm, -1, 1)) if norm > 0 else 0.0,
            identical_channels=self.identical,
            bandwidth_hz=bandwidth(spectrum),
            cutoff_hz=cutoff(spectrum),
            waveform=_envelope(peaks),
        )


def _envelope(peaks: np.ndarray) -> list[int]:
    starts = np.arange(ENVELOPE_POINTS) * len(peaks) // ENVELOPE_POINTS
    return np.minimum(99, np.round(99 * np.maximum.reduceat(peaks, starts))).astype(int).tolist()


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
