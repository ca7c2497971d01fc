"""Read any supported audio file as 48 kHz stereo, completely or not at all.

libsndfile decodes and soxr resamples. libsndfile shortens damaged files without a word, so each container's own
record of its length (RIFF/AIFF chunk sizes, Ogg's end-of-stream flag, FLAC's and MP3's frame counts) is compared with
what is there. All of it is deterministic and keeps no state: call it from any number of threads or processes.
"""

import codecs
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
# (offset, magic bytes, name) of what people have and libsndfile cannot read.
_UNREADABLE = (
    (4, b"ftyp", "MP4/M4A"),
    (0, b"\x1a\x45\xdf\xa3", "WebM/Matroska"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA/ASF"),
)
_CHUNKED = {b"RIFF", b"RIFX", b"RF64", b"riff", b"FORM"}
_MAGIC = (*_CHUNKED, b"OggS", b"fLaC", b"ID3")
_CONVERT = "convert it to flac or wav"
_BLOCK_FRAMES = 1 << 18
_MAX_DURATION_S = 24 * 3600.0
# Encoders writing to a pipe leave such placeholders where the size belongs (ffmpeg 2^32-1, sox just below 2^31).
_UNKNOWN_SIZE = 0x7FFF_F000
# Some writers count their own 44-byte header as data; that much less than declared is no truncation (0.3 ms of CD).
_SIZE_SLACK = 64
# Encoder delay and padding make an MP3's count inexact by a frame or two; odd encoders end Vorbis on empty packets.
_MP3_SLACK = 3
_TAIL_SLACK_FRAMES = {"MP3": _MP3_SLACK * 1152, "OGG": 8192}
_MP3_BIT_RATES_KBPS = {  # ISO/IEC 11172-3 table 2.4.2.3 and 13818-3, layer III, by "is MPEG-1"
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
# ITU-R BS.775-3, annex 4, table 2 (3/2 to 2/0): L' = L + 0.7071 C + 0.7071 Ls, the same on the right.
_BS775 = 0.5**0.5


class AudioError(Exception):
    """A file that can't be used; the message is the reason in words, without the file's name."""


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
        samples = round(sound.frames * sample_rate / sound.samplerate)
        waveform = np.empty((2, samples), np.float32)
        resampler = soxr.ResampleStream(sound.samplerate, sample_rate, 2, dtype="float32", quality="HQ")
        position = 0
        for block in _blocks(sound):
            chunk = to_stereo(block.T).T if len(block) else np.empty((0, 2), np.float32)
            if sound.samplerate != sample_rate:
                chunk = resampler.resample_chunk(np.ascontiguousarray(chunk), last=not len(block))
            chunk = chunk[: samples - position]
            waveform[:, position : position + len(chunk)] = chunk.T
            position += len(chunk)
    return waveform if position == samples else np.ascontiguousarray(waveform[:, :position])


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
            start = _id3_size(_read_at(handle, 0, 10))
            if start >= size:
                raise AudioError("the file is truncated inside its ID3 tag")
            head = _read_at(handle, start, 512)
            _refuse_unreadable(head, tagged=start > 0)
            repaired = None
            if head[:4] in _CHUNKED:
                repaired = _check_chunks(handle, start, size)
            elif head[:4] == b"OggS":
                _check_ogg(handle, size)
            elif head[:4] != b"fLaC" and (start or _is_mp3(head)):
                repaired = _check_mp3(_read_at(handle, start, size))
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
        if head.startswith(_MAGIC) or _is_mp3(head):
            raise AudioError("it is damaged or cut off near its start, or holds no audio that can be read") from None
        known = f"its format is not known: {_CONVERT}" if any(head) else "it is not audio: it starts with zero bytes"
        raise AudioError(known) from None
    reason = None
    if sound.format not in _READABLE:
        reason = f"{sound.format_info} is not supported: {_CONVERT}"
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


def _read_at(handle: BinaryIO, position: int, count: int) -> bytes:
    handle.seek(position)
    return handle.read(count)


def _refuse_unreadable(head: bytes, *, tagged: bool) -> None:
    """Name what is plainly not audio that libsndfile reads, by the first bytes (after an ID3 tag, if `tagged`)."""
    for offset, magic, name in _UNREADABLE:
        if head[offset:].startswith(magic):
            raise AudioError(f"{name} is not supported: {_CONVERT}")
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # ADTS: a 12-bit sync word, layer 0
        raise AudioError(f"AAC is not supported: {_CONVERT}")
    if tagged or head.startswith(_MAGIC):
        return
    utf_16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = head.decode("utf-16" if utf_16 else "utf-8", errors="replace")
    if sum(c.isprintable() or c.isspace() for c in text) - text.count("\ufffd") >= 0.95 * len(text):
        raise AudioError(f"it is not audio: it starts with text {text.strip()[:40]!r}")


def _check_chunks(handle: BinaryIO, start: int, size: int) -> bytes | None:
    """Check that the sound chunk of WAV, RF64, W64 or AIFF ends within the file.

    Returns the file with its data size filled in where a WAV writer left 0 there, which libsndfile takes for silence.
    """
    magic = _read_at(handle, start, 4)
    position, layout, align = start + 12, "<4sI", 2
    if magic in {b"FORM", b"RIFX"}:
        layout = ">4sI"
    elif magic == b"riff":  # Sony Wave64: 16-byte GUIDs, sizes that count their own header
        position, layout, align = start + 40, "<4s12xQ", 8
    header = struct.calcsize(layout)
    size_64 = None
    for _ in range(1000):
        if position + header > size:
            raise AudioError("the file is truncated or damaged: it ends before its sound data")
        name, declared = struct.unpack(layout, _read_at(handle, position, header))
        declared -= header if magic == b"riff" else 0
        position += header
        if name in {b"data", b"SSND"}:
            break
        if name == b"ds64":  # EBU Tech 3306: RIFF size, then data size
            size_64 = struct.unpack("<8xQ", _read_at(handle, position, 16))[0]
        position += max(0, declared + -declared % align)
    else:
        raise AudioError("it has no sound data among its first 1000 chunks")
    if declared == 0xFFFF_FFFF and size_64:
        declared = size_64
    elif magic != b"riff" and declared >= _UNKNOWN_SIZE:
        return None
    available = size - position
    if declared - available > _SIZE_SLACK:
        raise AudioError(f"the file is truncated: {100 * available // declared} % of its sound data is there")
    riff_size = struct.unpack("<I", _read_at(handle, start + 4, 4))[0]
    if magic == b"RIFF" and not declared and available and riff_size + 8 <= position - start:
        whole = bytearray(_read_at(handle, 0, size))
        struct.pack_into("<I", whole, position - 4, min(available, 0xFFFF_FFFF))
        return bytes(whole)
    return None


def _check_ogg(handle: BinaryIO, size: int) -> None:
    """Check that the last Ogg page (RFC 3533) is whole, ends its stream, and belongs to the first chain link."""
    head = _read_at(handle, 0, 1 << 16)
    first_serials, position = set(), 0
    while head[position : position + 4] == b"OggS" and len(head) > position + 27 and head[position + 5] & 2:
        first_serials.add(head[position + 14 : position + 18])
        position += _ogg_page_size(head, position)
    tail = _read_at(handle, max(0, size - (1 << 17)), 1 << 17)  # the largest page and any tags behind it
    position = tail.rfind(b"OggS")
    while position > 0 and (tail[position + 4 : position + 5] != b"\0" or tail[position + 5 : position + 6] > b"\7"):
        position = tail.rfind(b"OggS", 0, position)
    whole = position >= 0 and len(tail) - position > 27 and position + _ogg_page_size(tail, position) <= len(tail)
    if not whole or not tail[position + 5] & 4:
        raise AudioError("the file is truncated: the stream ends without its end marker")
    if tail[position + 14 : position + 18] not in first_serials:  # libsndfile reads only the first
        raise AudioError(f"it chains several Ogg streams: {_CONVERT}")


def _ogg_page_size(data: bytes, position: int) -> int:
    segments = data[position + 26]
    return 27 + segments + sum(data[position + 27 : position + 27 + segments])


def _id3_size(head: bytes) -> int:
    """Bytes in an ID3v2 tag with its header and footer, 0 where there is none (id3.org, ID3v2.4.0 structure, 3.1)."""
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return size + (20 if head[5] & 0x10 else 10)


def _is_mp3(head: bytes) -> bool:
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 != 0


def _mp3_frame_size(header: int) -> int:
    """Bytes in the MPEG layer III frame with this 32-bit header, 0 where it is none."""
    version, layer, bit_rate, sample_rate = header >> 19 & 3, header >> 17 & 3, header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer != 1 or bit_rate in {0, 15} or sample_rate == 3:
        return 0
    mpeg_1 = version == 3
    rate_hz = (44_100, 48_000, 32_000)[sample_rate] >> (0 if mpeg_1 else 1 if version == 2 else 2)
    return (144_000 if mpeg_1 else 72_000) * _MP3_BIT_RATES_KBPS[mpeg_1][bit_rate] // rate_hz + (header >> 9 & 1)


def _check_mp3(data: bytes) -> bytes | None:
    """Compare an MP3's frames with the count in its Xing/Info header.

    libsndfile reads as many frames as that header says; without one it guesses from the first frame's bit rate and
    silently stops there. So where the header is missing or counts too few, the frames are returned behind a new one.
    """
    first, last, count, position = -1, 0, 0, 0
    while 0 <= position <= len(data) - 4:
        header = int.from_bytes(data[position : position + 4])
        end = position + _mp3_frame_size(header)
        # The first frame is known by the one behind it, the rest by the same version, layer and sample rate.
        known = (header ^ last) & 0xFFFE_0C00 == 0 if count else _is_mp3(data[end : end + 2])
        if position < end <= len(data) and known:
            first = first if count else position
            last, count, position = header, count + 1, end
        else:
            position = data.find(b"\xff", position + 1)
    if not count:
        return None  # layer I or II, or no MP3 at all
    info_end = first + _mp3_frame_size(int.from_bytes(data[first : first + 4]))
    info = max(data.find(b"Xing", first, first + 48), data.find(b"Info", first, first + 48))
    if info > 0 and data[info + 7] & 1:
        declared = int.from_bytes(data[info + 8 : info + 12])
        if count - 1 < declared - _MP3_SLACK:
            raise AudioError(f"the file is truncated or damaged: {count - 1} of {declared} MP3 frames are there")
        if count - 1 <= declared + _MP3_SLACK:
            return None
        first, count = info_end, count - 1
    # A frame at a middling bit rate, large enough for the header whatever the others have, with silence inside.
    mark = bytes([0xFF, last >> 16 & 0xFF | 1, 0x90 | last >> 8 & 0x0C, last & 0xFF])
    mpeg_1, mono = last >> 19 & 3 == 3, last >> 6 & 3 == 3
    side_info = (17 if mono else 32) if mpeg_1 else (9 if mono else 17)
    mark += bytes(side_info) + b"Xing" + struct.pack(">II", 1, count)
    return mark.ljust(_mp3_frame_size(int.from_bytes(mark[:4])), b"\0") + data[first:]
