"""What a decoded track is like, in numbers, and what is wrong with it, in words."""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from .audio import SAMPLE_RATE

Severity = Literal["error", "warning", "note"]

# Raise when a measurement changes its meaning: results are kept by file hash and this.
ANALYSIS_VERSION = 1
SILENCE_DB = -60.0
WINDOW_S = 0.05
# Full scale of 16-bit audio is 32767/32768; a run of three such samples is a clipped crest, not a loud one.
CLIP_LEVEL = 0.9999
CLIP_RUN = 3


@dataclass(frozen=True)
class Finding:
    """One remark about one track. An error rejects it; a warning and a note do not."""

    track: str
    severity: Severity
    reason: str


@dataclass(frozen=True)
class Measurements:
    """Of the 48 kHz stereo waveform that training sees.

    `peak_db` and `rms_db` are dBFS (-inf is stored as -200), `clipped` the share of samples in clipped crests,
    silences seconds below -60 dBFS at either end, `dc_offset` the larger channel's mean (full scale 1),
    `bandwidth_hz` the frequency above which only 0.01 % of the energy of the loudest second-long blocks lies.
    """

    duration_s: float
    peak_db: float
    rms_db: float
    clipped: float
    leading_silence_s: float
    trailing_silence_s: float
    dc_offset: float
    bandwidth_hz: float

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)


def to_db(amplitude: float) -> float:
    """20 log10, with silence at -200 dB."""
    return float(20 * np.log10(max(amplitude, 1e-10)))


def measure(waveform: np.ndarray) -> Measurements:
    """Measure a float32 `[2, samples]` waveform at 48 kHz."""
    magnitude = np.abs(waveform).max(axis=0)
    window = int(WINDOW_S * SAMPLE_RATE)
    blocks = magnitude[: len(magnitude) // window * window].reshape(-1, window).max(axis=1)
    loud = np.flatnonzero(blocks > 10 ** (SILENCE_DB / 20))
    leading, trailing = (loud[0], len(blocks) - 1 - loud[-1]) if len(loud) else (len(blocks), len(blocks))
    return Measurements(
        duration_s=waveform.shape[1] / SAMPLE_RATE,
        peak_db=to_db(float(magnitude.max(initial=0))),
        rms_db=to_db(float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))),
        clipped=_clipped_share(magnitude),
        leading_silence_s=float(leading * WINDOW_S),
        trailing_silence_s=float(trailing * WINDOW_S),
        dc_offset=float(np.abs(waveform.mean(axis=1, dtype=np.float64)).max()),
        bandwidth_hz=_bandwidth(waveform.mean(axis=0)),
    )


def _clipped_share(magnitude: np.ndarray) -> float:
    """Share of samples in runs of at least `CLIP_RUN` at full scale."""
    full = magnitude >= CLIP_LEVEL
    run = full[: len(full) - CLIP_RUN + 1].copy()
    for shift in range(1, CLIP_RUN):
        run &= full[shift : len(full) - CLIP_RUN + 1 + shift]
    starts = np.flatnonzero(np.diff(run, prepend=False) & run)
    return float((run.sum() + (CLIP_RUN - 1) * len(starts)) / max(1, len(full)))


def _bandwidth(mono: np.ndarray, blocks: int = 16) -> float:
    """Frequency below which 99.99 % of the energy of the loudest seconds lies, after a first difference.

    The difference (+6 dB an octave) makes up for music's fall towards high frequencies, so that a codec's low-pass
    shows and a dark mix does not look like one.
    """
    seconds = mono[: len(mono) // SAMPLE_RATE * SAMPLE_RATE].reshape(-1, SAMPLE_RATE)
    if not len(seconds):
        seconds = np.pad(mono, (0, SAMPLE_RATE - len(mono)))[None]
    loudest = seconds[np.argsort(np.square(seconds).sum(axis=1))[-blocks:]]
    spectrum = np.square(np.abs(np.fft.rfft(np.diff(loudest, axis=1) * np.hanning(SAMPLE_RATE - 1)))).sum(axis=0)
    total = spectrum.sum()
    if total <= 0:
        return 0.0
    index = int(np.searchsorted(np.cumsum(spectrum), 0.9999 * total))
    return float(index * SAMPLE_RATE / (SAMPLE_RATE - 1))


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
    findings: list[tuple[Severity, str]] = []
    if measured.clipped > 1e-3:
        findings.append(("warning", f"it is clipped: {100 * measured.clipped:.1f} % of its samples are cut off"))
    for where, silence_s in (("begins", measured.leading_silence_s), ("ends", measured.trailing_silence_s)):
        if silence_s > 3:
            findings.append(("warning", f"it {where} with {silence_s:.1f} s of silence"))
    if measured.dc_offset > 0.01:
        findings.append(("warning", f"it has a DC offset of {measured.dc_offset:.3f} of full scale"))
    if measured.rms_db < -40:
        findings.append(("warning", f"it is very quiet ({measured.rms_db:.0f} dBFS on average)"))
    # What the file could hold, and no more than 20 kHz, which encoders of good quality leave out as well.
    possible = min(sample_rate / 2, 20_000)
    if measured.bandwidth_hz < 0.82 * possible:
        findings.append(
            (
                "note",
                f"it has next to nothing above {measured.bandwidth_hz / 1000:.1f} kHz: a low bit rate, or dark music",
            )
        )
    if sample_rate < SAMPLE_RATE * 0.9:
        findings.append(
            ("note", f"its sample rate is {sample_rate} Hz: there is no sound above {sample_rate // 2} Hz")
        )
    if channels == 1:
        findings.append(("note", "it is mono"))
    return [Finding(track, severity, reason) for severity, reason in findings]
