"""Read any supported audio file as 48 kHz stereo, completely or not at all.

libsndfile decodes, PyAV what it can't read (`av_audio`), and soxr resamples. libsndfile shortens damaged files without
a word, so `containers` compares each container's own record of its length with what is there before anything is
decoded, and what is decoded is counted. All of it is deterministic and keeps no state: call it from any number of
threads or processes.
"""

import contextlib
import hashlib
import io
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from ..files import write_atomically
from .containers import (
    CHECKS,
    CHUNKED,
    CONVERT,
    MAGIC,
    MP3_SLACK,
    AudioError,
    AvFormat,
    Patched,
    av_format,
    check_chunks,
    check_mp3,
    check_ogg,
    id3_size,
    is_mp3,
    read_at,
    refuse_text,
)

SAMPLE_RATE = 48_000
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff"})
# What PyAV adds (the `av` extra); without it such a file is refused with the reason, never passed over.
AV_SUFFIXES = frozenset(
    {".m4a", ".m4b", ".mp4", ".mov", ".aac", ".alac", ".webm", ".mka", ".mkv", ".wma", ".ac3", ".eac3", ".ape", ".wv",
     ".tta", ".caf"}
)  # fmt: skip

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
BLOCK_FRAMES = 1 << 18
# The integers that each depth of FLAC is decoded to, and how many of their bytes its MD5 is over.
_FLAC_DEPTHS = {"PCM_S8": ("int32", 1), "PCM_16": ("int16", 2), "PCM_24": ("int32", 3)}
_MAX_DURATION_S = 24 * 3600.0
# Frames that may be missing at the end: what an MP3's count is out by, and odd encoders' empty last Vorbis packets.
_TAIL_SLACK_FRAMES = {"MP3": MP3_SLACK * 1152, "OGG": 8192}
# ITU-R BS.775-3, annex 4, table 2 (3/2 to 2/0): L' = L + 0.7071 C + 0.7071 Ls, the same on the right.
_BS775 = 0.5**0.5


@dataclass(frozen=True)
class AudioInfo:
    """What a file is before any conversion. `format` is "CONTAINER/CODEC", such as "WAV/PCM_16" or "MP4/AAC"."""

    duration_s: float
    sample_rate: int
    channels: int
    format: str
    frames: int


@dataclass(frozen=True)
class Decoding:
    """An open file and its samples, to be decoded once.

    `blocks` are `[frames, channels]` float32 in WAV channel order, and one empty block when all was decoded; no more
    than `most_frames` of them are the file's sound, what follows is an encoder's padding.
    """

    info: AudioInfo
    most_frames: int
    blocks: Iterator[np.ndarray]


def probe_audio(source: Path | bytes) -> AudioInfo:
    """Read a file's headers (of an MP3 and of what PyAV reads: those of all frames), without decoding.

    Finds every reason for refusal that `read_audio` finds except damage inside the compressed data, a FLAC file's
    truncation or wrong MD5, and NaN or infinite samples. Raises `AudioError`.
    """
    with _open(source) as decoding:
        return decoding.info


def read_audio(source: Path | bytes, *, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Decode a whole file (or a file's bytes) to a float32 waveform `[2, samples]` at `sample_rate` Hz.

    Full scale is ±1; float files and lossy codecs may go beyond it and are not clipped. Channels are mixed as
    `to_stereo` says and resampled with soxr HQ (THD+N below -130 dB), to within one sample of the exact length (where
    PyAV decodes and the container has no exact length: of what can be decoded). Raises `AudioError` where the file
    can't be read to its end, differs from its own MD5 (FLAC) or holds NaN or infinite samples.
    """
    with _open(source) as decoding:
        waveform = np.empty((2, _samples(decoding, sample_rate)), np.float32)
        position = 0
        for chunk in _stream(decoding, sample_rate):
            waveform[:, position : position + chunk.shape[1]] = chunk
            position += chunk.shape[1]
    return waveform if position == waveform.shape[1] else np.ascontiguousarray(waveform[:, :position])


def stream_audio(source: Path | bytes, *, sample_rate: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """The waveform of `read_audio` in order, in blocks `[2, samples]` of a few seconds, so that memory stays flat."""
    with _open(source) as decoding:
        yield from _stream(decoding, sample_rate)


def _samples(decoding: Decoding, sample_rate: int) -> int:
    return round(decoding.most_frames * sample_rate / decoding.info.sample_rate)


def _stream(decoding: Decoding, sample_rate: int) -> Iterator[np.ndarray]:
    """Stereo blocks `[2, samples]` at `sample_rate`, no more of them in all than the exact length."""
    left, position, rate = _samples(decoding, sample_rate), 0, decoding.info.sample_rate
    resampler = None
    for block in decoding.blocks:
        _check_finite(block, position / rate, rate)
        position += len(block)
        chunk = _mix(block.T).T
        if rate != sample_rate:
            width = chunk.shape[1]
            resampler = resampler or soxr.ResampleStream(rate, sample_rate, width, dtype="float32", quality="HQ")
            chunk = resampler.resample_chunk(np.ascontiguousarray(chunk), last=not len(block)).reshape(-1, width)
        chunk = chunk[:left]
        left -= len(chunk)
        yield chunk.T if chunk.shape[1] == 2 else np.repeat(chunk.T, 2, axis=0)


def _check_finite(block: np.ndarray, start_s: float, rate: int) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(block.sum()):  # many times as fast as looking at each frame
            return
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        frame = int(np.argmin(finite))
        kind = "NaN" if np.isnan(block[frame]).any() else "infinite"
        raise AudioError(f"it has {kind} samples, the first at {start_s + frame / rate:.2f} s")


def to_stereo(waveform: np.ndarray) -> np.ndarray:
    """Mix `[channels, samples]` to `[2, samples]`, keeping the dtype; stereo is returned as it is.

    Mono is duplicated. Six channels are taken as 5.1 in WAV order (FL FR FC LFE BL BR) and mixed with the
    coefficients of ITU-R BS.775, the LFE dropped, scaled by 1 / (1 + 0.7071 + 0.7071) so that it can't clip. Any other
    number of channels has no known meaning: its mean is duplicated. Raises `ValueError` on a wrong shape.
    """
    if waveform.ndim != 2 or not len(waveform):
        raise ValueError(f"expected a waveform [channels, samples], got shape {waveform.shape}")
    mixed = _mix(waveform)
    return mixed if len(mixed) == 2 else np.repeat(mixed, 2, axis=0)


def _mix(waveform: np.ndarray) -> np.ndarray:
    """What `to_stereo` returns, one channel where both are the same: `[1, samples]` or `[2, samples]`."""
    if len(waveform) == 2:
        return waveform
    if len(waveform) == 6:
        front, centre, back = waveform[0:2], waveform[2], waveform[4:6]
        return ((front + _BS775 * centre + _BS775 * back) / (1 + 2 * _BS775)).astype(waveform.dtype)
    return waveform.mean(axis=0, keepdims=True, dtype=waveform.dtype)


def write_audio(
    path: Path, waveform: np.ndarray, *, sample_rate: int = SAMPLE_RATE, tags: Mapping[str, str] | None = None
) -> None:
    """Write a float waveform `[channels, samples]` in the format of `path`'s suffix, one of `AUDIO_SUFFIXES`.

    wav, flac and aiff are 24-bit; ogg is Vorbis. Values beyond ±1 are clipped to ±1. `tags` are written into the file:
    libsndfile's `title`, `artist`, `comment`, `software`, …; in an MP3, whose encoding libsndfile doesn't tell, only
    those in ASCII. The file appears under its name only when complete. Raises `ValueError` on a wrong shape or dtype,
    NaN or infinite samples, or an unknown suffix, `AudioError` where the codec refuses (Opus has five sample rates,
    MP3 nine), and `OSError` where the disk does.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITABLE:
        raise ValueError(f"cannot write {path.name}: its suffix is none of {', '.join(sorted(_WRITABLE))}")
    if waveform.ndim != 2 or not waveform.size or not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(f"expected a float waveform [channels, samples], got {waveform.dtype} {waveform.shape}")
    if not np.isfinite(waveform).all():
        raise ValueError(f"cannot write {path.name}: the waveform has NaN or infinite samples")
    container, codec = _WRITABLE[path.suffix.lower()]
    # In memory first, where it takes less than the waveform: libsndfile keeps a full disk's reason to itself.
    encoded = io.BytesIO()
    try:
        with soundfile.SoundFile(encoded, "w", sample_rate, len(waveform), codec, format=container) as sound:
            for name, text in (tags or {}).items():
                if text and (container != "MP3" or text.isascii()):  # libsndfile refuses an empty one
                    setattr(sound, name, text)
            # In blocks: libsndfile's Vorbis encoder overflows the stack on one long call.
            for start in range(0, waveform.shape[1], BLOCK_FRAMES):
                block = waveform[:, start : start + BLOCK_FRAMES].T
                sound.write(np.ascontiguousarray(block.clip(-1, 1), np.float32))
    except soundfile.LibsndfileError as error:
        reason = error.error_string
        raise AudioError(f"it can't be written as {container}/{codec} at {sample_rate} Hz: {reason}") from error
    write_atomically(path, lambda temporary: temporary.write_bytes(encoded.getbuffer()))


def _blocks(sound: soundfile.SoundFile, head: bytes) -> Iterator[np.ndarray]:
    """What libsndfile decodes, as `Decoding.blocks` says; `head` holds a FLAC file's STREAMINFO."""
    # libsndfile keeps the order of Vorbis I 4.3.9 and RFC 7845 5.1.1.2: FL FC FR BL BR LFE.
    order = [0, 2, 1, 5, 3, 4] if sound.format == "OGG" and sound.channels == 6 else slice(None)
    # RFC 9639, 8.2: the MD5 of the unencoded samples is the last of STREAMINFO, which comes first; zeros: not known.
    declared = head[26:42] if sound.format == "FLAC" and any(head[26:42]) else None
    digest = hashlib.md5(usedforsecurity=False)
    position, ended = 0, False
    while True:
        damaged = False
        try:
            block = _read_hashed(sound, digest) if declared else sound.read(BLOCK_FRAMES, "float32", always_2d=True)
            # A short block with more behind it is a gap (a bad Ogg page); none with frames missing is an early end.
            damaged = ended if len(block) else position < sound.frames - _TAIL_SLACK_FRAMES.get(sound.format, 0)
        except soundfile.LibsndfileError:
            position, damaged = sound.tell(), True
        if damaged:
            have_s, full_s = position / sound.samplerate, sound.frames / sound.samplerate
            raise AudioError(f"the file is truncated or damaged: {have_s:.2f} s of {full_s:.2f} s can be read")
        if declared and not len(block) and digest.digest() != declared:
            raise AudioError("the file is damaged: its MD5 is not that of its sound")
        yield block[:, order]
        if not len(block):
            return
        position, ended = position + len(block), len(block) < BLOCK_FRAMES


def _read_hashed(sound: soundfile.SoundFile, digest) -> np.ndarray:
    """A block as float32, its samples added to the digest as RFC 9639 says: interleaved, signed, little-endian."""
    dtype, width = _FLAC_DEPTHS[sound.subtype]
    block = sound.read(BLOCK_FRAMES, dtype, always_2d=True)
    samples = block.astype(block.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(-1, block.itemsize)
    packed = samples
    if width < block.itemsize:  # libsndfile puts the sound in the upper bytes; this is 8 times as fast as one slice
        packed = np.empty((len(samples), width), np.uint8)
        for byte in range(width):
            packed[:, byte] = samples[:, block.itemsize - width + byte]
    digest.update(packed)
    return np.multiply(block, np.float32(2.0 ** (1 - 8 * block.itemsize)), dtype=np.float32)


@contextlib.contextmanager
def _open(source: Path | bytes) -> Iterator[Decoding]:
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
            needs_av = av_format(head)
            if needs_av is None and not start and not head.startswith(MAGIC):
                refuse_text(head)
            repaired = _check_container(handle, start, size, head, needs_av)
            if needs_av is not None:
                from .av_audio import open_av  # which imports this module

                decoding = open_av(handle, needs_av)
                _refuse_absurd(decoding.info)
                yield decoding
                return
            if repaired is None:
                repaired = io.BytesIO(source) if isinstance(source, bytes) else os.fsencode(source)
            with _open_sound(repaired, head) as sound:
                format_name = f"{sound.format}/{sound.subtype}"
                duration_s = sound.frames / sound.samplerate
                info = AudioInfo(duration_s, sound.samplerate, sound.channels, format_name, sound.frames)
                _refuse_absurd(info)
                yield Decoding(info, sound.frames, _blocks(sound, head))
    except FileNotFoundError:
        raise AudioError("the file does not exist") from None
    except OSError as error:
        raise AudioError(f"it cannot be read: {(error.strerror or str(error)).lower()}") from error


def _check_container(
    handle: BinaryIO, start: int, size: int, head: bytes, needs_av: AvFormat | None
) -> Patched | None:
    """Compare the container's record of its length with the file; the file repaired where it needs that."""
    try:
        if needs_av is not None and needs_av.demuxer in CHECKS:
            CHECKS[needs_av.demuxer](handle, size)
            return None
        if head[:4] in CHUNKED:
            return check_chunks(handle, start, size)
        if head[:4] == b"OggS":
            check_ogg(handle, size)
        elif needs_av is None and head[:4] != b"fLaC" and (start or is_mp3(head)):
            return check_mp3(handle, start, size)
    except (struct.error, IndexError):  # a header that ends where it says something follows
        raise AudioError("the file is truncated inside its header") from None
    return None


def _open_bytes(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    mode = os.stat(source).st_mode
    if not stat.S_ISREG(mode):  # opening a named pipe would wait for ever
        raise AudioError("it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file")
    return open(source, "rb")


def _open_sound(playable: bytes | BinaryIO, head: bytes) -> soundfile.SoundFile:
    """Open a path (as bytes) or file and check the format. libsndfile's own error texts mislead, so they go unused."""
    try:
        sound = soundfile.SoundFile(playable)
    except soundfile.LibsndfileError:
        if isinstance(playable, bytes):
            open(playable, "rb").close()  # gone since it was checked: an `OSError` says so
        if head.startswith(MAGIC) or is_mp3(head):
            raise AudioError("it is damaged or cut off near its start, or holds no audio that can be read") from None
        known = f"its format is not known: {CONVERT}" if any(head) else "it is not audio: it starts with zero bytes"
        raise AudioError(known) from None
    if sound.format not in _READABLE:
        sound.close()
        raise AudioError(f"{sound.format_info} is not supported: {CONVERT}")
    return sound


def _refuse_absurd(info: AudioInfo) -> None:
    """Raises `AudioError` where a header claims what no music has."""
    if info.frames <= 0 or info.channels <= 0:
        raise AudioError("it holds no samples")
    if not 4_000 <= info.sample_rate <= 768_000:
        raise AudioError(f"its header claims a sample rate of {info.sample_rate} Hz")
    if info.frames >= 1 << 62:  # libsndfile can't read the end of a FLAC stream that was written to a pipe
        raise AudioError("its header does not say how long it is (written to a pipe): encode it again to a file")
    if info.duration_s > _MAX_DURATION_S:
        raise AudioError(f"its header claims {info.duration_s / 3600:.0f} hours of sound; the most is 24")
