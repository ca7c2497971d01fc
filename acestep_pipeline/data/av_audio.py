"""Decode with PyAV (the `av` extra) what libsndfile cannot read: MP4, Matroska, ASF, ADTS and others.

The demuxer is named by the caller from the file's bytes, never guessed by ffmpeg, whose guesses include playlists that
open other files. What a container declares as its length is compared with its packets before decoding, and its packets
with what was decoded. Encoder delay is removed where the container records it (MP4 edit lists and iTunes' iTunSMPB,
Matroska's CodecDelay); raw ADTS and AC-3 have no such record, so their sound starts a frame or two late.
"""

import math
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from .audio import BLOCK_FRAMES, AudioInfo, Decoding
from .containers import CONVERT, AudioError, AvFormat

# Seconds by which the length that a container declares, its packets' time stamps and its decoded sound may differ:
# encoder delay and padding, a Windows Media superframe (0.4 s), time stamps in milliseconds. It hides no cut in MP4,
# Matroska and ASF, whose bytes `containers` has counted.
LENGTH_SLACK_S = 0.5
# Seconds by which a frame's time stamp may run ahead of the sound decoded so far before that counts as a gap.
GAP_S = 0.1
# Streams without a container declare no length; what ffmpeg reports for them is a guess from the bit rate.
_RAW = {"aac", "ac3", "eac3"}
_CONTAINER_NAMES = {"mov": "MP4", "aac": "ADTS"}
_INTEGER_SCALES = {np.dtype(np.int16): 2.0**-15, np.dtype(np.int32): 2.0**-31, np.dtype(np.int64): 2.0**-63}


def open_av(handle: BinaryIO, av_format: AvFormat) -> Decoding:
    """Find the sound of a file and its length, decoding none yet.

    Args:
        handle: the file, which must stay open while the result is decoded.
        av_format: what its bytes say it is.

    Returns:
        What is in the file, and its samples. An MP4's number of frames is that of its edit list, to a millisecond;
        others' may differ by `LENGTH_SLACK_S` from what is decoded.

    Raises:
        AudioError: PyAV is missing, or the file is damaged, cut off, or has no sound that can be decoded.
    """
    try:
        import av
    except ImportError:
        raise AudioError(f"{av_format.name} needs PyAV: pip install 'ace-step-lora[av]', or {CONVERT}") from None
    demuxer, size = av_format.demuxer, handle.seek(0, os.SEEK_END)
    try:
        with _container(handle, demuxer) as container:
            stream = _sound_stream(container)
            rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
            codec = stream.codec_context.codec.canonical_name
            duration_s = _declared_s(container, stream, demuxer)
            exact = demuxer == "mov" and duration_s is not None
            if exact and stream.index_entries and stream.index_entries[-1].pos >= size:
                raise AudioError("the file is truncated: its sound data is not there")
            if duration_s is None:
                duration_s = _packets_s(container, stream, demuxer)
    except av.FFmpegError as error:
        raise AudioError("the file is truncated or damaged: its header and index cannot be read") from error
    frames = round(duration_s * rate)
    name = f"{_CONTAINER_NAMES.get(demuxer, demuxer.upper())}/{codec.upper()}"
    info = AudioInfo(frames / rate if rate else 0.0, rate, channels, name, frames)
    most_frames = frames if exact else frames + round(LENGTH_SLACK_S * rate)
    return Decoding(info, most_frames, _blocks(handle, demuxer, info))


def _container(handle: BinaryIO, demuxer: str):
    import av

    handle.seek(0)
    return av.open(handle, format=demuxer, metadata_errors="replace")


def _sound_stream(container):
    """The sound that a player would choose. One thread: callers decode several files at a time."""
    stream = container.streams.best("audio")
    if stream is None:
        raise AudioError("it has no sound" + (", only pictures" if container.streams.video else ""))
    if stream.codec_context is None:
        raise AudioError(f"its sound is encrypted or in a format that cannot be decoded: {CONVERT}")
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"err_detect": "crccheck+explode"}  # a wrong checksum is an error, not a guess
    return stream


def _declared_s(container, stream, demuxer: str) -> float | None:
    """The length of the sound by a header that can be trusted: the file's bytes were counted against it."""
    if demuxer == "mov" and stream.frames and stream.duration is not None:  # no frames: the index is in fragments
        return float(stream.duration * stream.time_base)
    if demuxer in {"matroska", "asf"} and len(container.streams) == 1 and container.duration:
        return container.duration / 1e6
    return None


def _packets_s(container, stream, demuxer: str) -> float:
    """The length of the sound by its packets; the packets must reach the length that the container declares."""
    start_s, end_s, last_s = math.inf, 0.0, 0.0
    for packet in container.demux():
        if packet.pts is None:
            continue
        packet_s = float(packet.pts * packet.time_base)
        packet_end_s = packet_s + float((packet.duration or 0) * packet.time_base)
        last_s = max(last_s, packet_end_s)
        if packet.stream_index == stream.index:
            start_s, end_s = min(start_s, packet_s), max(end_s, packet_end_s)
    declared_s = 0.0 if demuxer in _RAW or container.duration is None else container.duration / 1e6
    if last_s < declared_s - LENGTH_SLACK_S:
        raise AudioError(f"the file is truncated or damaged: {last_s:.2f} s of {declared_s:.2f} s are there")
    return max(0.0, end_s - max(0.0, start_s))


def _blocks(handle: BinaryIO, demuxer: str, info: AudioInfo) -> Iterator[np.ndarray]:
    """Yield `[frames, channels]` float32 blocks in WAV channel order, then one empty block when all was decoded."""
    import av

    position, pending, waiting = 0, [], 0
    try:
        with _container(handle, demuxer) as container:
            for samples in _frames(container, info):
                pending.append(samples)
                position, waiting = position + len(samples), waiting + len(samples)
                if waiting >= BLOCK_FRAMES:
                    yield np.concatenate(pending)
                    pending, waiting = [], 0
    except av.FFmpegError as error:
        have_s = position / info.sample_rate
        raise AudioError(f"the file is truncated or damaged: it cannot be decoded beyond {have_s:.2f} s") from error
    have_s = position / info.sample_rate
    if abs(have_s - info.duration_s) > LENGTH_SLACK_S:
        raise AudioError(f"the file is truncated or damaged: {have_s:.2f} s of {info.duration_s:.2f} s can be read")
    if pending:
        yield np.concatenate(pending)
    yield np.empty((0, info.channels), np.float32)


def _frames(container, info: AudioInfo) -> Iterator[np.ndarray]:
    """The samples `[frames, channels]` float32 of each decoded frame, one after the other without a gap."""
    position_s, offset_s = 0.0, None
    for packet in container.demux(_sound_stream(container)):
        if packet.is_corrupt:
            raise AudioError(f"the file is truncated or damaged at {float(packet.pts * packet.time_base):.2f} s")
        for frame in packet.decode():
            if (frame.sample_rate, frame.layout.nb_channels) != (info.sample_rate, info.channels):
                raise AudioError(f"its sample rate or channels change at {frame.time:.2f} s: {CONVERT}")
            if frame.time is not None:
                offset_s = frame.time if offset_s is None else offset_s
                gap_s = frame.time - offset_s - position_s
                if gap_s > GAP_S:
                    raise AudioError(
                        f"the file is damaged: {gap_s:.2f} s of its sound are missing at {position_s:.2f} s"
                    )
            position_s += frame.samples / info.sample_rate
            samples = frame.to_ndarray()
            samples = samples.T if frame.format.is_planar else samples.reshape(-1, info.channels)
            yield _to_float(samples)


def _to_float(samples: np.ndarray) -> np.ndarray:
    """Full scale ±1 as float32, from ffmpeg's integers (8 bits are unsigned) or floats."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) * np.float32(2.0**-7)
    scale = _INTEGER_SCALES.get(samples.dtype)
    return samples.astype(np.float32) * np.float32(scale) if scale else samples.astype(np.float32)
