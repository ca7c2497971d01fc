"""Read any supported audio file as 48 kHz stereo, completely or not at all.

libsndfile decodes and soxr resamples. libsndfile shortens damaged files without a word, so `containers` compares each
container's own record of its length with what is there before anything is decoded, and what is decoded is counted.
All of it is deterministic and keeps no state: call it from any number of threads or processes.
"""

import contextlib
import io
import os
import stat
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from .containers import (
    CHUNKED,
    CONVERT,
    MAGIC,
    MP3_SLACK,
    AudioError,
    check_chunks,
    check_mp3,
    check_ogg,
    id3_size,
    is_mp3,
    read_at,
    refuse_unreadable,
)

SAMPLE_RATE = 48_000
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff"})

_READABLE = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "MP3", "OGG", "AIFF"}
_WRITABLE = {
    ".wav": ("WAV", "PCM_24"),
    ".flac": ("FLAC", "PCM_24"),
    ".aif": ("AIFF", "PCM_24"),
    ".aiff": ("AIFF", "PCM_24"),
    ".ogg": ("OGG", "VORBIS"),
    ".oga": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
_BLOCK_FRAMES = 1 << 18
_MAX_DURATION_S = 24 * 3600.0
# Frames that may be missing at the end: what an MP3's count is out by, and odd encoders' empty last Vorbis packets.
_TAIL_SLACK_FRAMES = {"MP3": MP3_SLACK * 1152, "OGG": 8192}
# ITU-R BS.775-3, annex 4, table 2 (3/2 to 2/0): L' = L + 0.7071 C + 0.7071 Ls, the same on the right.
_BS775 = 0.5**0.5


@dataclass(frozen=True)
class AudioInfo:
    """What a file is before any conversion. `format` is libsndfile's "CONTAINER/CODEC", such as "WAV/PCM_16"."""

    duration_s: float
    sample_rate: int
    channels: int
    format: str
    frames: int


def probe_audio(source: Path | bytes) -> AudioInfo:
    """Read a file's headers (of an MP3: all frame headers), without decoding.

    Finds every reason for refusal that `read_audio` finds except damage inside the compressed data, a FLAC file's
    truncation and NaN or infinite samples. Raises `AudioError`.
    """
    with _open(source) as sound:
        format_name = f"{sound.format}/{sound.subtype}"
        duration_s = sound.frames / sound.samplerate
        return AudioInfo(duration_s, sound.samplerate, sound.channels, format_name, sound.frames)


def read_audio(source: Path | bytes, *, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Decode a whole file (or a file's bytes) to a float32 waveform `[2, samples]` at `sample_rate` Hz.

    Full scale is ±1; float files and lossy codecs may go beyond it and are not clipped. Channels are mixed as
    `to_stereo` says and resampled with soxr HQ (THD+N below -130 dB), to within one sample of the exact length.
    Raises `AudioError` where the file can't be read to its end or holds NaN or infinite samples.
    """
    with _open(source) as sound:
        waveform = np.empty((2, _samples(sound, sample_rate)), np.float32)
        position = 0
        for chunk in _stream(sound, sample_rate):
            waveform[:, position : position + chunk.shape[1]] = chunk
            position += chunk.shape[1]
    return waveform if position == waveform.shape[1] else np.ascontiguousarray(waveform[:, :position])


def stream_audio(source: Path | bytes, *, sample_rate: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """The waveform of `read_audio` in order, in blocks `[2, samples]` of a few seconds, so that memory stays flat."""
    with _open(source) as sound:
        yield from _stream(sound, sample_rate)


def _samples(sound: soundfile.SoundFile, sample_rate: int) -> int:
    return round(sound.frames * sample_rate / sound.samplerate)


def _stream(sound: soundfile.SoundFile, sample_rate: int) -> Iterator[np.ndarray]:
    """Stereo blocks `[2, samples]` at `sample_rate`, no more of them in all than the exact length."""
    left = _samples(sound, sample_rate)
    resampler = soxr.ResampleStream(sound.samplerate, sample_rate, 2, dtype="float32", quality="HQ")
    for block in _blocks(sound):
        chunk = to_stereo(block.T).T if len(block) else np.empty((0, 2), np.float32)
        if sound.samplerate != sample_rate:
            chunk = resampler.resample_chunk(np.ascontiguousarray(chunk), last=not len(block))
        chunk = chunk[:left]
        left -= len(chunk)
        yield chunk.T


def to_stereo(waveform: np.ndarray) -> np.ndarray:
    """Mix `[channels, samples]` to `[2, samples]`, keeping the dtype; stereo is returned as it is.

    Mono is duplicated. Six channels are taken as 5.1 in WAV order (FL FR FC LFE BL BR) and mixed with the
    coefficients of ITU-R BS.775, the LFE dropped, scaled by 1 / (1 + 0.7071 + 0.7071) so that it can't clip. Any other
    number of channels has no known meaning: its mean is duplicated. Raises `ValueError` on a wrong shape.
    """
    if waveform.ndim != 2 or not len(waveform):
        raise ValueError(f"expected a waveform [channels, samples], got shape {waveform.shape}")
    if len(waveform) == 2:
        return waveform
    if len(waveform) == 6:
        front, centre, back = waveform[0:2], waveform[2], waveform[4:6]
        return ((front + _BS775 * centre + _BS775 * back) / (1 + 2 * _BS775)).astype(waveform.dtype)
    return np.repeat(waveform.mean(axis=0, keepdims=True, dtype=waveform.dtype), 2, axis=0)


def write_audio(path: Path, waveform: np.ndarray, *, sample_rate: int = SAMPLE_RATE) -> None:
    """Write a float waveform `[channels, samples]` in the format of `path`'s suffix, one of `AUDIO_SUFFIXES`.

    wav, flac and aiff are 24-bit; ogg is Vorbis. Values beyond ±1 are clipped to ±1. The file appears under its name
    only when complete. Raises `ValueError` on a wrong shape or dtype, NaN or infinite samples, or an unknown suffix,
    and `AudioError` where the codec refuses (Opus has five sample rates, MP3 nine).
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITABLE:
        raise ValueError(f"cannot write {path.name}: its suffix is none of {', '.join(sorted(_WRITABLE))}")
    if waveform.ndim != 2 or not waveform.size or not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(f"expected a float waveform [channels, samples], got {waveform.dtype} {waveform.shape}")
    if not np.isfinite(waveform).all():
        raise ValueError(f"cannot write {path.name}: the waveform has NaN or infinite samples")
    container, codec = _WRITABLE[path.suffix.lower()]
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with soundfile.SoundFile(
            os.fsencode(temporary), "w", sample_rate, len(waveform), codec, format=container
        ) as sound:
            # In blocks: libsndfile's Vorbis encoder overflows the stack on one long call.
            for start in range(0, waveform.shape[1], _BLOCK_FRAMES):
                block = waveform[:, start : start + _BLOCK_FRAMES].T
                sound.write(np.ascontiguousarray(block.clip(-1, 1), np.float32))
        os.replace(temporary, path)
    except soundfile.LibsndfileError as error:
        reason = error.error_string
        raise AudioError(f"it can't be written as {container}/{codec} at {sample_rate} Hz: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _blocks(sound: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """Yield `[frames, channels]` float32 blocks in WAV channel order, then one empty block when all was decoded."""
    # libsndfile keeps the order of Vorbis I 4.3.9 and RFC 7845 5.1.1.2: FL FC FR BL BR LFE.
    order = [0, 2, 1, 5, 3, 4] if sound.format == "OGG" and sound.channels == 6 else slice(None)
    position, ended = 0, False
    while True:
        damaged = False
        try:
            block = sound.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)
            # A short block with more behind it is a gap (a bad Ogg page); none with frames missing is an early end.
            damaged = ended if len(block) else position < sound.frames - _TAIL_SLACK_FRAMES.get(sound.format, 0)
        except soundfile.LibsndfileError:
            position, damaged = sound.tell(), True
        if damaged:
            have_s, full_s = position / sound.samplerate, sound.frames / sound.samplerate
            raise AudioError(f"the file is truncated or damaged: {have_s:.2f} s of {full_s:.2f} s can be read")
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            frame = int(np.argmin(finite))
            kind = "NaN" if np.isnan(block[frame]).any() else "infinite"
            raise AudioError(f"it has {kind} samples, the first at {(position + frame) / sound.samplerate:.2f} s")
        yield block[:, order]
        if not len(block):
            return
        position, ended = position + len(block), len(block) < _BLOCK_FRAMES


@contextlib.contextmanager
def _open(source: Path | bytes) -> Iterator[soundfile.SoundFile]:
    """Open a source that has passed every check which needs no decoding. Raises `AudioError`."""
    try:
        with _open_bytes(source) as handle:
            size = handle.seek(0, os.SEEK_END)
            if not size:
                raise AudioError("the file is empty")
            start = id3_size(read_at(handle, 0, 10))
            if start >= size:
                raise AudioError("the file is truncated inside its ID3 tag")
            head = read_at(handle, start, 512)
            refuse_unreadable(head, tagged=start > 0)
            repaired = None
            try:
                if head[:4] in CHUNKED:
                    repaired = check_chunks(handle, start, size)
                elif head[:4] == b"OggS":
                    check_ogg(handle, size)
                elif head[:4] != b"fLaC" and (start or is_mp3(head)):
                    repaired = check_mp3(read_at(handle, start, size))
            except (struct.error, IndexError):  # a header that ends where it says something follows
                raise AudioError("the file is truncated inside its header") from None
        if repaired is not None or isinstance(source, bytes):
            playable = io.BytesIO(source if repaired is None else repaired)
        else:
            playable = os.fsencode(source)
        with _open_sound(playable, head) as sound:
            yield sound
    except FileNotFoundError:
        raise AudioError("the file does not exist") from None
    except OSError as error:
        raise AudioError(f"it cannot be read: {(error.strerror or str(error)).lower()}") from error


def _open_bytes(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    mode = os.stat(source).st_mode
    if not stat.S_ISREG(mode):  # opening a named pipe would wait for ever
        raise AudioError("it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file")
    return open(source, "rb")


def _open_sound(playable: bytes | BinaryIO, head: bytes) -> soundfile.SoundFile:
    """Open a path (as bytes) or file and check the header. libsndfile's own error texts mislead, so they go unused."""
    try:
        sound = soundfile.SoundFile(playable)
    except soundfile.LibsndfileError:
        if head.startswith(MAGIC) or is_mp3(head):
            raise AudioError("it is damaged or cut off near its start, or holds no audio that can be read") from None
        known = f"its format is not known: {CONVERT}" if any(head) else "it is not audio: it starts with zero bytes"
        raise AudioError(known) from None
    reason = None
    if sound.format not in _READABLE:
        reason = f"{sound.format_info} is not supported: {CONVERT}"
    elif sound.frames <= 0 or sound.channels <= 0:
        reason = "it holds no samples"
    elif not 4_000 <= sound.samplerate <= 768_000:
        reason = f"its header claims a sample rate of {sound.samplerate} Hz"
    elif sound.frames >= 1 << 62:  # libsndfile can't read the end of a FLAC stream that was written to a pipe
        reason = "its header does not say how long it is (written to a pipe): encode it again to a file"
    elif sound.frames / sound.samplerate > _MAX_DURATION_S:
        reason = f"its header claims {sound.frames / sound.samplerate / 3600:.0f} hours of sound; the most is 24"
    if reason is not None:
        sound.close()
        raise AudioError(reason)
    return sound
