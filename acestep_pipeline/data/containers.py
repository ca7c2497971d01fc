"""Is an audio file whole, by the bytes of its container alone? Nothing is decoded here.

libsndfile shortens damaged files without a word, so each container's own record of its length (RIFF, RF64, Wave64 and
AIFF chunk sizes, Ogg's end-of-stream flag, the frame count of an MP3) is compared with what is there. So are those of
MP4, Matroska and ASF, which PyAV decodes. Only decoding can tell whether a FLAC file holds what its header counts;
`audio` does that.

Formats: RIFF/WAVE (IBM and Microsoft, Multimedia Programming Interface 1.0, 1991), RF64 (EBU Tech 3306), Sony Wave64,
AIFF (Apple, version 1.3), Ogg (RFC 3533), ID3v2 (id3.org), MPEG audio (ISO/IEC 11172-3 and 13818-3), MP4 (ISO/IEC
14496-12), Matroska (RFC 9559 and 8794), ASF (Microsoft, version 1.2). The Xing/Info header of MP3 files has no
standard; this is the layout that LAME and ffmpeg write.
"""

import codecs
import io
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO


@dataclass(frozen=True)
class AvFormat:
    """A container that libsndfile can't read: its name for a person, and that of ffmpeg's demuxer for it."""

    name: str
    demuxer: str


_MP4, _AAC = AvFormat("MP4/M4A", "mov"), AvFormat("AAC", "aac")
# (offset, magic bytes, format) of what people have and libsndfile cannot read.
_AV_FORMATS = (
    (4, b"ftyp", _MP4),
    (4, b"moov", _MP4),  # QuickTime files need no ftyp
    (4, b"mdat", _MP4),
    (4, b"wide", _MP4),
    (0, b"\x1a\x45\xdf\xa3", AvFormat("WebM/Matroska", "matroska")),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", AvFormat("WMA/ASF", "asf")),
    (0, b"MAC ", AvFormat("Monkey's Audio", "ape")),
    (0, b"wvpk", AvFormat("WavPack", "wv")),
    (0, b"TTA1", AvFormat("True Audio", "tta")),
    (0, b"caff", AvFormat("CAF", "caf")),
    (28, b"\x7fFLAC", AvFormat("FLAC in Ogg", "ogg")),  # behind the header of an Ogg page with one packet
    (28, b"Speex   ", AvFormat("Speex", "ogg")),
)
# First bytes of the containers made of chunks, and of all that start with known letters; how refusals end.
CHUNKED = {b"RIFF", b"RIFX", b"RF64", b"riff", b"FORM"}
MAGIC = (*CHUNKED, b"OggS", b"fLaC", b"ID3")
CONVERT = "convert it to flac or wav"
# Encoders writing to a pipe leave such placeholders where the size belongs (ffmpeg 2^32-1, sox just below 2^31).
_UNKNOWN_SIZE = 0x7FFF_F000
# Some writers count their own 44-byte header as data; that much less than declared is no truncation (0.3 ms of CD).
_SIZE_SLACK = 64
# Encoder delay and padding make an MP3's count inexact by a frame or two.
MP3_SLACK = 3
_MP3_BIT_RATES_KBPS = {  # ISO/IEC 11172-3 table 2.4.2.3 and 13818-3, layer III, by "is MPEG-1"
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class AudioError(Exception):
    """A file that can't be used; the message is the reason in words, without the file's name."""


def read_at(handle: BinaryIO, position: int, count: int) -> bytes:
    """Up to `count` bytes from `position` on; fewer where the file ends. Raises `OSError`."""
    handle.seek(position)
    return handle.read(count)


def av_format(head: bytes) -> AvFormat | None:
    """What a file is that needs PyAV, by its first bytes (after an ID3 tag); None for everything else.

    The signatures are those of ISO/IEC 14496-12 (MP4), RFC 8794 (Matroska's EBML), Microsoft's ASF specification,
    ISO/IEC 13818-7 (AAC in ADTS), ETSI TS 102 366 (AC-3 and E-AC-3) and, for the rest, the formats' own descriptions.
    """
    for offset, magic, found in _AV_FORMATS:
        if head[offset:].startswith(magic):
            return found
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # ADTS: a 12-bit sync word, layer 0
        return _AAC
    if len(head) > 5 and head.startswith(b"\x0b\x77"):  # the stream's version is above 10 in E-AC-3 (annex E)
        return AvFormat("E-AC-3", "eac3") if head[5] >> 3 > 10 else AvFormat("AC-3", "ac3")
    return None


def refuse_text(head: bytes) -> None:
    """Raises `AudioError` where a file's first bytes are text: UTF-8 or UTF-16 to 95 % printable characters."""
    utf_16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = head.decode("utf-16" if utf_16 else "utf-8", errors="replace")
    if sum(c.isprintable() or c.isspace() for c in text) - text.count("\ufffd") >= 0.95 * len(text):
        raise AudioError(f"it is not audio: it starts with text {text.strip()[:40]!r}")


class Patched(io.RawIOBase):
    """A file seen with another beginning: the bytes `head`, then what `handle` holds from byte `start` on."""

    def __init__(self, handle: BinaryIO, head: bytes, start: int) -> None:
        self._handle, self._head, self._start, self._position = handle, head, start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset += len(self._head) + self._handle.seek(0, os.SEEK_END) - self._start
        self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def readinto(self, buffer) -> int:
        data = self._head[self._position : self._position + len(buffer)]
        rest = len(buffer) - len(data)
        data += read_at(self._handle, self._start + max(0, self._position - len(self._head)), rest)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def check_chunks(handle: BinaryIO, start: int, size: int) -> Patched | None:
    """Check that the sound chunk of WAV, RF64, W64 or AIFF, whose header is at `start`, ends within the file.

    A size that stands for "unknown" passes. Layouts: RIFF and AIFF have a four-letter name, a 32-bit size and padding
    to even positions; RF64 (EBU Tech 3306) keeps 64-bit sizes in its ds64 chunk; Sony Wave64 has GUIDs for names.

    Returns:
        The file with its data size filled in where a WAV writer left 0 there, which libsndfile takes for silence;
        otherwise None.

    Raises:
        AudioError: the file ends before its sound data or within it, or has none among its first 1000 chunks.
    """
    magic = read_at(handle, start, 4)
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
        name, declared = struct.unpack(layout, read_at(handle, position, header))
        declared -= header if magic == b"riff" else 0
        position += header
        if name in {b"data", b"SSND"}:
            break
        if name == b"ds64":  # EBU Tech 3306: RIFF size, then data size
            size_64 = struct.unpack("<8xQ", read_at(handle, position, 16))[0]
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
    riff_size = struct.unpack("<I", read_at(handle, start + 4, 4))[0]
    if magic == b"RIFF" and not declared and available and riff_size + 8 <= position - start:
        data_size = struct.pack("<I", min(available, 0xFFFF_FFFF))
        return Patched(handle, read_at(handle, 0, position - 4) + data_size, position)
    return None


def check_ogg(handle: BinaryIO, size: int) -> None:
    """Check that the last Ogg page is whole, ends its stream, and belongs to the first chain link.

    The page's layout is that of RFC 3533, section 6.

    Raises:
        AudioError: the last page is cut or not marked as its stream's end, or several streams follow one another.
    """
    head = read_at(handle, 0, 1 << 16)
    first_serials, position = set(), 0
    while head[position : position + 4] == b"OggS" and len(head) > position + 27 and head[position + 5] & 2:
        first_serials.add(head[position + 14 : position + 18])
        position += _ogg_page_size(head, position)
    tail = read_at(handle, max(0, size - (1 << 17)), 1 << 17)  # the largest page and any tags behind it
    position = tail.rfind(b"OggS")
    while position > 0 and (tail[position + 4 : position + 5] != b"\0" or tail[position + 5 : position + 6] > b"\7"):
        position = tail.rfind(b"OggS", 0, position)
    whole = position >= 0 and len(tail) - position > 27 and position + _ogg_page_size(tail, position) <= len(tail)
    if not whole or not tail[position + 5] & 4:
        raise AudioError("the file is truncated: the stream ends without its end marker")
    if tail[position + 14 : position + 18] not in first_serials:  # libsndfile reads only the first
        raise AudioError(f"it chains several Ogg streams: {CONVERT}")


def _ogg_page_size(data: bytes, position: int) -> int:
    """Bytes in the page at `position`, whose header must be there: 27, the segment table, and the segments."""
    segments = data[position + 26]
    return 27 + segments + sum(data[position + 27 : position + 27 + segments])


def check_mp4(handle: BinaryIO, size: int) -> None:
    """Check that every box of an MP4 with sound or index in it is whole (ISO/IEC 14496-12, 4.2).

    Raises:
        AudioError: the file ends within such a box, or has no index.
    """
    position, indexed = 0, False
    while size - position >= 8:
        length, name = struct.unpack(">I4s", read_at(handle, position, 8))
        if length == 1:
            (length,) = struct.unpack(">8xQ", read_at(handle, position, 16))
        if length == 0:  # to the end of the file
            length = size - position
        if length < 8 or not name.isalnum():
            break  # no box, but what some programs leave behind the last one
        if name in {b"mdat", b"moov", b"moof"} and position + length > size:
            part, share = "sound data" if name == b"mdat" else "index", 100 * (size - position) // length
            raise AudioError(f"the file is truncated: {share} % of its {part} is there")
        indexed = indexed or name == b"moov"
        position += length
    if not indexed:
        raise AudioError("the file is truncated or damaged: its index is not there")


def check_matroska(handle: BinaryIO, size: int) -> None:
    """Check that a Matroska file's segment, which holds everything, ends within it; of unknown size, it passes.

    Elements have an id and a size of 1 to 8 bytes, as many as the leading zero bits say, plus one (RFC 8794, 4).

    Raises:
        AudioError: the file ends before its segment does.
    """
    position = 0
    for _ in range(2):  # the EBML header, then the segment
        head = read_at(handle, position, 12)
        width = 9 - head[4].bit_length()  # both ids have 4 bytes
        declared = int.from_bytes(head[4 : 4 + width]) & (1 << 7 * width) - 1
        position += 4 + width
        if head[:4] == b"\x18\x53\x80\x67":
            break
        position += declared
    unknown = declared == (1 << 7 * width) - 1
    if not unknown and position + declared > size:
        share = 100 * max(0, size - position) // declared
        raise AudioError(f"the file is truncated: {share} % of its sound data is there")


def check_asf(handle: BinaryIO, size: int) -> None:
    """Check that the data object of an ASF file is whole (ASF specification 1.2, sections 2 and 5); 0 is unknown.

    Raises:
        AudioError: the file ends before or within it.
    """
    (position,) = struct.unpack("<16xQ", read_at(handle, 0, 24))
    if position + 24 > size:
        raise AudioError("the file is truncated or damaged: it ends before its sound data")
    (declared,) = struct.unpack("<16xQ", read_at(handle, position, 24))
    if position + declared > size:
        raise AudioError(f"the file is truncated: {100 * (size - position) // declared} % of its sound data is there")


# By the name of ffmpeg's demuxer.
CHECKS = {"mov": check_mp4, "matroska": check_matroska, "asf": check_asf, "ogg": check_ogg}


def id3_size(head: bytes) -> int:
    """Bytes in an ID3v2 tag with its header and footer, 0 where there is none (id3.org, ID3v2.4.0 structure, 3.1)."""
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return size + (20 if head[5] & 0x10 else 10)


def is_mp3(head: bytes) -> bool:
    """Whether these bytes start an MPEG audio frame of any layer: 11 bits of sync and a layer (ISO/IEC 11172-3)."""
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 != 0


def _mp3_frame_size(header: int) -> int:
    """Bytes in the MPEG layer III frame with this 32-bit header, 0 where it is none (ISO/IEC 11172-3 and 13818-3)."""
    version, layer, bit_rate, sample_rate = header >> 19 & 3, header >> 17 & 3, header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer != 1 or bit_rate in {0, 15} or sample_rate == 3:
        return 0
    mpeg_1 = version == 3
    rate_hz = (44_100, 48_000, 32_000)[sample_rate] >> (0 if mpeg_1 else 1 if version == 2 else 2)
    return (144_000 if mpeg_1 else 72_000) * _MP3_BIT_RATES_KBPS[mpeg_1][bit_rate] // rate_hz + (header >> 9 & 1)


def check_mp3(handle: BinaryIO, start: int, size: int) -> Patched | None:
    """Compare an MP3's frames with the count in its Xing/Info header.

    libsndfile reads as many frames as that header says; without one it guesses from the first frame's bit rate and
    silently stops there. So where the header is missing or counts too few, the frames are returned behind a new one.
    It lies in the first frame, after the side information, where Xing's encoder put it and others followed.

    Args:
        handle: the file, which is read into memory whole.
        start: where its ID3v2 tag ends.
        size: where the file ends.

    Returns:
        The frames behind a header that counts them, or None where the file can be read as it is.

    Raises:
        AudioError: more frames are missing from the header's count than `MP3_SLACK`.
    """
    data = read_at(handle, start, size - start)  # an exact count: read(-1) would hold it twice
    first, last, count, position = -1, 0, 0, 0
    while 0 <= position <= len(data) - 4:
        header = int.from_bytes(data[position : position + 4])
        end = position + _mp3_frame_size(header)
        # The first frame is known by the one behind it, the rest by the same version, layer and sample rate.
        known = (header ^ last) & 0xFFFE_0C00 == 0 if count else is_mp3(data[end : end + 2])
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
        if count - 1 < declared - MP3_SLACK:
            raise AudioError(f"the file is truncated or damaged: {count - 1} of {declared} MP3 frames are there")
        if count - 1 <= declared + MP3_SLACK:
            return None
        first, count = info_end, count - 1
    # A frame at a middling bit rate, large enough for the header whatever the others have, with silence inside.
    mark = bytes([0xFF, last >> 16 & 0xFF | 1, 0x90 | last >> 8 & 0x0C, last & 0xFF])
    mpeg_1, mono = last >> 19 & 3 == 3, last >> 6 & 3 == 3
    side_info = (17 if mono else 32) if mpeg_1 else (9 if mono else 17)
    mark += bytes(side_info) + b"Xing" + struct.pack(">II", 1, count)
    return Patched(handle, mark.ljust(_mp3_frame_size(int.from_bytes(mark[:4])), b"\0"), start + first)
