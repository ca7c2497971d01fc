import contextlib
import io
import os
import struct
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile

from acestep_pipeline.data import audio
from acestep_pipeline.data.audio import (
    AudioError,
    AudioInfo,
    probe_audio,
    read_audio,
    stream_audio,
    to_stereo,
    write_audio,
)
from acestep_pipeline.data.containers import Patched

SUFFIXES = (".wav", ".flac", ".aiff", ".ogg", ".opus", ".mp3")
ENCODINGS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".aiff": ("AIFF", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
FIVE_ONE = {"FL": 300, "FR": 500, "FC": 700, "LFE": 60, "BL": 1100, "BR": 1300}


def tone(frequency_hz, *, duration_s=2.0, sample_rate=48_000, amplitude=0.5):
    """[samples] float64"""
    return amplitude * np.sin(2 * np.pi * frequency_hz * np.arange(round(duration_s * sample_rate)) / sample_rate)


def encode(samples, container, codec, sample_rate=48_000, **options):
    """Encode [samples] or [channels, samples] straight with soundfile, so that reading is tested on its own."""
    stream = io.BytesIO()
    channels = len(samples) if samples.ndim == 2 else 1
    with soundfile.SoundFile(stream, "w", sample_rate, channels, codec, format=container, **options) as sound:
        sound.write(samples.T)
    return stream.getvalue()


@pytest.fixture(scope="module")
def noisy():
    """[2, 4 s]: a sweep under noise, so that compressed frames are long and the files large enough to cut."""
    time_s = np.arange(4 * 48_000) / 48_000
    sweep = 0.3 * np.sin(2 * np.pi * (100 * time_s + 1000 * time_s**2))
    return sweep + np.random.default_rng(0).normal(0, 0.05, (2, len(sweep)))


@pytest.fixture(scope="module")
def encoded(noisy):
    return {suffix: encode(noisy, *ENCODINGS[suffix]) for suffix in SUFFIXES}


def fit_tone(samples, frequency_hz, sample_rate=48_000):
    """(amplitude, the rest's RMS relative to the tone's in dB) of the middle of [samples]"""
    middle = samples[len(samples) // 8 : -len(samples) // 8].astype(np.float64)
    phase = 2 * np.pi * frequency_hz * np.arange(len(middle)) / sample_rate
    basis = np.stack([np.sin(phase), np.cos(phase)], axis=1)
    weights = np.linalg.lstsq(basis, middle)[0]
    rest = middle - basis @ weights
    return np.hypot(*weights), 20 * np.log10(np.std(rest) / np.std(basis @ weights))


def amplitude_at(samples, frequency_hz):
    return fit_tone(samples, frequency_hz)[0]


def refusal(source, function=read_audio):
    with pytest.raises(AudioError) as caught:
        function(source)
    return str(caught.value)


# --- Reading and writing


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_tone_survives_each_codec(tmp_path, suffix):
    path = tmp_path / f"tone{suffix}"
    write_audio(path, np.stack([tone(1000), tone(440, amplitude=0.25)]))
    waveform = read_audio(path)
    assert waveform.dtype == np.float32 and waveform.flags.c_contiguous
    assert waveform.shape == (2, 96_000)
    residue_db = {".opus": -30, ".mp3": -30, ".ogg": -30}.get(suffix, -125)
    for channel, frequency_hz, amplitude in ((0, 1000, 0.5), (1, 440, 0.25)):
        level, rest_db = fit_tone(waveform[channel], frequency_hz)
        assert level == pytest.approx(amplitude, rel=0.02)
        assert rest_db < residue_db


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_probe_agrees_with_the_decoded_file(encoded, suffix):
    info = probe_audio(encoded[suffix])
    assert info == AudioInfo(4.0, 48_000, 2, "/".join(ENCODINGS[suffix]), 4 * 48_000)
    assert read_audio(encoded[suffix]).shape == (2, info.frames)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_and_path_give_the_same_samples_every_time(tmp_path, encoded, suffix):
    path = tmp_path / f"music{suffix}"
    path.write_bytes(encoded[suffix])
    expected = read_audio(path)
    assert np.array_equal(read_audio(encoded[suffix]), expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(waveform, expected) for waveform in pool.map(read_audio, [path] * 4))


def test_block_borders_leave_no_trace(encoded, monkeypatch):
    whole = {suffix: read_audio(data, sample_rate=44_100) for suffix, data in encoded.items()}
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 5000)
    for suffix, data in encoded.items():
        np.testing.assert_allclose(read_audio(data, sample_rate=44_100), whole[suffix], atol=1e-6)


def test_a_name_that_is_not_utf8_can_be_read_and_written(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    write_audio(path, np.zeros((1, 100)))
    assert read_audio(path).shape == (2, 100)


@pytest.mark.parametrize("frequency_hz", [1000, 10_000, 18_000])
def test_resampling_adds_less_than_minus_100_db(frequency_hz):
    data = encode(tone(frequency_hz, sample_rate=44_100), "WAV", "FLOAT", 44_100)
    level, rest_db = fit_tone(read_audio(data)[0], frequency_hz)
    assert level == pytest.approx(0.5, rel=1e-3)
    assert rest_db < -100


def test_resampling_down_removes_what_would_alias():
    assert (
        np.abs(read_audio(encode(tone(30_000, sample_rate=96_000), "WAV", "FLOAT", 96_000))[:, 5000:-5000]).max()
        < 1e-5
    )


@pytest.mark.parametrize(
    "sample_rate, codec, channels",
    [(8000, "PCM_16", 1), (11_025, "PCM_16", 2), (44_100, "PCM_U8", 1), (192_000, "PCM_24", 2), (96_000, "DOUBLE", 2)],
)
def test_rates_and_depths(sample_rate, codec, channels):
    samples = np.tile(tone(1000, duration_s=1.0003, sample_rate=sample_rate), (channels, 1))
    waveform = read_audio(encode(samples, "WAV", codec, sample_rate))
    assert abs(waveform.shape[1] - samples.shape[1] * 48_000 / sample_rate) <= 1
    level, rest_db = fit_tone(waveform[0], 1000)
    assert level == pytest.approx(0.5, rel=0.01)
    assert rest_db < (-40 if codec == "PCM_U8" else -80)
    assert np.array_equal(waveform[0], waveform[1])


@pytest.mark.parametrize("samples", [1, 2, 7, 1000])
def test_very_short_files(samples):
    data = encode(np.full(samples, 0.1), "WAV", "PCM_16", 44_100)
    assert abs(read_audio(data).shape[1] - samples * 48_000 / 44_100) <= 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_fifth_of_a_second_and_silence(suffix):
    waveform = read_audio(encode(np.zeros((2, 9600)), *ENCODINGS[suffix]))
    assert waveform.shape == (2, 9600)
    assert np.abs(waveform).max() < 1e-4


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["日本語の曲", "🎹🔥", "two\nlines", " "])
def test_any_name_can_be_read_and_written(tmp_path, suffix, name):
    path = tmp_path / (name + suffix)
    write_audio(path, np.zeros((1, 9600)))
    assert read_audio(path).shape == (2, 9600)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_bytes_decide_not_the_name(tmp_path, encoded, suffix):
    for wrong in {".wav", ".mp3", ".m4a", ""} - {suffix}:
        path = tmp_path / f"song{wrong}"
        path.write_bytes(encoded[suffix])
        assert probe_audio(path).format == "/".join(ENCODINGS[suffix])
        assert read_audio(path).shape == (2, 4 * 48_000)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_memory_stays_flat(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 1 << 14)
    music = np.random.default_rng(0).normal(0, 0.1, (2, 20 * 44_100))
    path = tmp_path / f"long{suffix}"
    write_audio(path, music, sample_rate=44_100)
    if suffix == ".wav":
        path.write_bytes(with_wav_sizes(path.read_bytes(), 0, 0))  # which has to be repaired
    tracemalloc.start()
    try:
        samples = sum(block.shape[1] for block in stream_audio(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert samples == 20 * 48_000
    assert peak < 0.15 * music.size * 4


def test_float_files_keep_values_beyond_full_scale():
    assert read_audio(encode(np.full(1000, 1.5), "WAV", "FLOAT")).max() == 1.5


def test_writing_clips_to_full_scale(tmp_path):
    write_audio(tmp_path / "loud.wav", np.array([[0.5, 1.5, -3.0, 1.0]], np.float32))
    np.testing.assert_allclose(read_audio(tmp_path / "loud.wav")[0], [0.5, 1, -1, 1], atol=3e-7)


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "music.wav"
    write_audio(path, np.full((2, 100), 0.5))
    before = path.read_bytes()
    monkeypatch.setattr(soundfile.SoundFile, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_audio(path, np.zeros((2, 100)))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["music.wav"]


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    for waveform, name, match in (
        (np.zeros((2, 10)), "a.m4a", "suffix"),
        (np.zeros(10), "a.wav", "channels, samples"),
        (np.zeros((2, 10), np.int16), "a.wav", "float"),
        (np.array([[np.nan]]), "a.wav", "NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            write_audio(tmp_path / name, waveform)
    with pytest.raises(AudioError, match="44100 Hz.*Opus only supports"):
        write_audio(tmp_path / "a.opus", np.zeros((2, 1000)), sample_rate=44_100)
    assert not os.listdir(tmp_path)


def test_a_long_vorbis_file_can_be_written(tmp_path):
    write_audio(tmp_path / "long.ogg", np.random.default_rng(0).normal(0, 0.01, (1, 48_000 * 60)))
    assert probe_audio(tmp_path / "long.ogg").frames == 48_000 * 60


# --- Channels


def test_stereo_is_untouched_and_mono_duplicated():
    stereo = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    assert to_stereo(stereo) is stereo
    assert np.array_equal(to_stereo(stereo[:1]), stereo[[0, 0]])


@pytest.mark.parametrize("channels", [3, 4, 5, 8])
def test_unknown_layouts_become_their_mean(channels):
    waveform = np.random.default_rng(0).normal(size=(channels, 50)).astype(np.float32)
    mixed = to_stereo(waveform)
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(mixed, np.tile(waveform.mean(axis=0), (2, 1)), atol=1e-6)


@pytest.mark.parametrize("shape", [(10,), (0, 10), (1, 2, 10)])
def test_to_stereo_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="channels, samples"):
        to_stereo(np.zeros(shape))


@pytest.mark.parametrize(
    "container, codec", [("WAV", "PCM_24"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS")]
)
def test_five_point_one_is_mixed_after_bs_775(container, codec):
    # RFC 7845 5.1.1.2 and Vorbis I 4.3.9 order six channels otherwise than WAV and FLAC do.
    order = ["FL", "FC", "FR", "BL", "BR", "LFE"] if container == "OGG" else list(FIVE_ONE)
    data = encode(np.stack([tone(FIVE_ONE[name], amplitude=0.3) for name in order]), container, codec)
    left, right = read_audio(data)
    full, lowered = 0.3 / (1 + 2 * 0.5**0.5), 0.3 * 0.5**0.5 / (1 + 2 * 0.5**0.5)
    for name, in_left, in_right in (
        ("FL", full, 0),
        ("FR", 0, full),
        ("FC", lowered, lowered),
        ("LFE", 0, 0),
        ("BL", lowered, 0),
        ("BR", 0, lowered),
    ):
        assert amplitude_at(left, FIVE_ONE[name]) == pytest.approx(in_left, abs=0.01)
        assert amplitude_at(right, FIVE_ONE[name]) == pytest.approx(in_right, abs=0.01)


def test_five_point_one_cannot_clip():
    assert to_stereo(np.ones((6, 10), np.float32)).max() == pytest.approx(1, abs=1e-6)


# --- Truncated and damaged files


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncation_is_found(tmp_path, encoded, suffix, share):
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(encoded[suffix][: int(share * len(encoded[suffix]))])
    reason = refusal(path)
    assert reason.startswith("the file is truncated") and path.name not in reason
    assert refusal(path.read_bytes()) == reason
    if suffix != ".flac":
        assert refusal(path, probe_audio) == reason


@pytest.mark.parametrize("container", ["RF64", "W64", "AIFF"])
def test_truncation_is_found_in_the_other_containers(noisy, container):
    data = encode(noisy, container, "PCM_24")
    assert probe_audio(data).frames == noisy.shape[1]
    assert "truncated: 49 %" in refusal(data[: len(data) // 2], probe_audio)


def test_truncation_is_found_in_a_file_cut_between_two_ogg_pages(encoded):
    data = encoded[".ogg"]
    assert "without its end marker" in refusal(data[: data.rfind(b"OggS")])


@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".opus", ".mp3"])
def test_damage_in_the_middle_is_found(encoded, suffix):
    data = bytearray(encoded[suffix])
    middle = len(data) // 2
    data[middle : middle + 4000] = np.random.default_rng(1).bytes(4000)
    assert "damaged" in refusal(bytes(data))


@pytest.mark.parametrize("codec", ["PCM_S8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("tag", [b"", b"ID3\x04\x00\x00" + bytes([0, 0, 2, 0]) + bytes(256)])
def test_a_flac_whose_md5_is_wrong_is_found_when_it_is_decoded(noisy, codec, tag):
    flac = encode(noisy[:, :48_001], "FLAC", codec)
    assert any(flac[26:42])
    expected = read_audio(tag + flac)
    scale = 2 ** (int(codec.removeprefix("PCM_S").removeprefix("PCM_")) - 1)
    np.testing.assert_allclose(expected, noisy[:, :48_001], atol=2 / scale)
    unknown = tag + flac[:26] + bytes(16) + flac[42:]
    assert np.array_equal(read_audio(unknown), expected)
    wrong = tag + flac[:30] + bytes([flac[30] ^ 1]) + flac[31:]
    assert probe_audio(wrong).frames == 48_001
    for decode in (read_audio, lambda source: list(stream_audio(source))):
        assert refusal(wrong, decode) == "the file is damaged: its MD5 is not that of its sound"
    next(stream_audio(wrong))  # who stops early is not told


def test_the_md5_spans_blocks_and_channels(noisy, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 5000)
    for channels in (1, 2, 6):
        samples = np.tile(noisy[:1], (channels, 1)) * np.linspace(0.5, 1, channels)[:, None]
        assert read_audio(encode(samples, "FLAC", "PCM_24")).shape == (2, noisy.shape[1])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_cut_while_it_is_read(tmp_path, encoded, suffix, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 5000)
    path = tmp_path / f"music{suffix}"
    path.write_bytes(encoded[suffix])
    blocks = stream_audio(path)
    next(blocks)
    os.truncate(path, len(encoded[suffix]) // 2)
    with pytest.raises(AudioError, match="truncated or damaged"):
        list(blocks)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_vanishes_before_it_is_decoded(tmp_path, encoded, suffix, monkeypatch):
    path = tmp_path / f"music{suffix}"
    path.write_bytes(encoded[suffix])
    check = audio._check_container
    monkeypatch.setattr(audio, "_check_container", lambda *args: (check(*args), path.unlink())[0])
    assert refusal(path) == "the file does not exist"


def test_a_header_cut_short_is_refused(encoded):
    for data in encoded.values():
        for size in (1, 3, 4, 12, 30, 60):
            assert refusal(data[:size], probe_audio)


# --- What looks truncated or odd and is not


def with_wav_sizes(data, riff_size, data_size):
    assert data[36:40] == b"data"
    return data[:4] + struct.pack("<I", riff_size) + data[8:40] + struct.pack("<I", data_size) + data[44:]


@pytest.mark.parametrize(
    "riff_size, data_size",
    [(0xFFFFFFFF, 0xFFFFFFFF), (0x7FFFF024, 0x7FFFF000), (0x80000024, 0x80000000), (0, 0), (36, 0)],
)
def test_streamed_wav_sizes_are_no_truncation(encoded, riff_size, data_size):
    streamed = with_wav_sizes(encoded[".wav"], riff_size, data_size)
    assert np.array_equal(read_audio(streamed), read_audio(encoded[".wav"]))
    assert probe_audio(streamed).duration_s == 4.0


def test_an_odd_data_chunk_without_its_padding_byte():
    data = encode(np.full(1001, 0.1), "WAV", "PCM_U8")
    data = data[: data.index(b"data") + 8 + 1001]
    assert read_audio(data).shape == (2, 1001)


def test_chunks_around_the_data_chunk(encoded):
    data, extra = encoded[".wav"], b"LIST" + struct.pack("<I", 3) + b"abc\0"
    assert probe_audio(data[:36] + extra + data[36:] + extra).frames == 4 * 48_000
    assert probe_audio(data + extra[:9]).frames == 4 * 48_000  # the sound is whole


ID3V1 = b"TAG" + b"title".ljust(125, b"\0")
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 32, 0, 0xA0000000) + bytes(8)
ID3V2 = b"ID3\x04\x00\x00" + bytes([0, 0, 2, 0]) + b"\xff\xfb\x90\x64".ljust(256, b"\xff")


@pytest.mark.parametrize("suffix", [".mp3", ".flac", ".ogg", ".opus"])
def test_trailing_tags_are_no_truncation(encoded, suffix):
    expected = read_audio(encoded[suffix])
    for tags in (ID3V1, APE + ID3V1):
        assert np.array_equal(read_audio(encoded[suffix] + tags), expected)


@pytest.mark.parametrize("suffix", [".mp3", ".flac"])
def test_leading_id3_tags_are_skipped(encoded, suffix):
    np.testing.assert_allclose(read_audio(ID3V2 + encoded[suffix]), read_audio(encoded[suffix]), atol=1e-6)


def vbr_mp3(*, reverse=False):
    """10 s of tone, 10 s of noise, at a variable bit rate: (the whole file, the part behind its header frame)."""
    samples = tone(440, duration_s=20, sample_rate=44_100, amplitude=0.1)
    samples[len(samples) // 2 :] += np.random.default_rng(0).normal(0, 0.1, len(samples) // 2)
    samples = samples[::-1] if reverse else samples
    data = encode(samples, "MP3", "MPEG_LAYER_III", 44_100, bitrate_mode="VARIABLE", compression_level=0.5)
    assert data[21:25] == b"Xing"
    size = 144_000 * (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[data[2] >> 4] // 44_100
    return data, data[size + (data[2] >> 1 & 1) :]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_variable_bit_rate_mp3_without_header_is_read_to_its_end(reverse):
    whole, headless = vbr_mp3(reverse=reverse)
    assert soundfile.info(io.BytesIO(headless)).frames < 0.5 * 20 * 44_100  # what libsndfile makes of it
    for data in (headless, headless + ID3V1, ID3V2 + headless):
        assert probe_audio(data).duration_s == pytest.approx(20, abs=0.05)
        assert read_audio(data).shape[1] == pytest.approx(20 * 48_000, abs=2500)
    middle = slice(48_000, 19 * 48_000)
    delayed = read_audio(headless)[0, round(576 * 48_000 / 44_100) :]  # LAME's delay, which the header would remove
    assert np.corrcoef(delayed[middle], read_audio(whole)[0, middle])[0, 1] > 0.95


def test_a_headless_mp3_that_is_cut_gives_what_is_there():
    _, headless = vbr_mp3()
    assert 1 < probe_audio(headless[: len(headless) // 3]).duration_s < 19


def test_joined_mp3_files_are_read_to_the_end():
    whole, _ = vbr_mp3()
    assert read_audio(whole + whole).shape[1] == pytest.approx(40 * 48_000, abs=6000)


def test_the_last_ogg_page_may_lack_some_samples(encoded):
    data = bytearray(encoded[".ogg"])
    position = data.rfind(b"OggS")
    (granule,) = struct.unpack_from("<q", data, position + 6)
    struct.pack_into("<q", data, position + 6, granule + 5000)
    struct.pack_into("<I", data, position + 22, 0)
    struct.pack_into("<I", data, position + 22, ogg_crc(data[position:]))
    assert probe_audio(bytes(data)).frames == 4 * 48_000 + 5000
    assert read_audio(bytes(data)).shape[1] >= 4 * 48_000


def ogg_crc(page):
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFFFFFF
    return crc


# --- What is no usable audio


def test_an_empty_file(tmp_path):
    (tmp_path / "a.mp3").touch()
    assert refusal(tmp_path / "a.mp3") == "the file is empty" == refusal(b"", probe_audio)


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html>\n<html>",
        "Grüße aus Köln\n".encode() * 50,
        "Grüße".encode("utf-16"),
        b"x",
        "naïve".encode("latin-1") * 9,
    ],
)
def test_text_under_an_audio_name(tmp_path, data):
    path = tmp_path / "song.mp3"
    path.write_bytes(data)
    if data.startswith(b"na"):
        assert refusal(path)
    else:
        assert refusal(path).startswith("it is not audio: it starts with text '")
    assert "Grüße aus" in refusal("Grüße aus".encode())


@pytest.mark.parametrize(
    "head, name",
    [
        (b"\0\0\0\x08wide\0\0\0\x08moov", "MP4/M4A"),
        (b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff", "WebM/Matroska"),
        (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + struct.pack("<Q", 30) + bytes(30), "WMA/ASF"),
        (b"\x0b\x77\xe3\x91\x14\x40", "AC-3"),
        (b"\x0b\x77\x01\x7f\x34\x87", "E-AC-3"),
        (b"MAC \x96\x0f", "Monkey's Audio"),
        (b"caff\0\x01\0\0desc", "CAF"),
        (b"\xff\xf1\x50\x80\x2e\x7f\xfc", "AAC"),
        (ID3V2 + b"\xff\xf9\x50\x80\x2e\x7f\xfc", "AAC"),
    ],
)
def test_what_needs_pyav_is_named_with_the_fix(tmp_path, head, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # importing it fails, as where it is not installed
    path = tmp_path / "song.mp3"
    path.write_bytes(head + np.random.default_rng(0).bytes(5000))
    for function in (probe_audio, read_audio):
        assert refusal(path, function) == (
            f"{name} needs PyAV: pip install 'ace-step-lora[av]', or convert it to flac or wav"
        )


def test_formats_nobody_asked_for_are_refused_not_guessed(tmp_path):
    assert "not supported: convert it" in refusal(encode(np.zeros(100), "AU", "PCM_16"))
    for suffix in (".mp3", ".wav", ".vox"):  # libsndfile takes any .vox for headerless samples
        path = tmp_path / f"noise{suffix}"
        path.write_bytes(np.random.default_rng(0).bytes(5000))
        assert "not known" in refusal(path) or "not supported" in refusal(path)
    assert "zero bytes" in refusal(bytes(5000))


def test_no_samples(encoded):
    assert refusal(encode(np.zeros(0), "WAV", "PCM_16"), probe_audio) == "it holds no samples"
    assert refusal(encode(np.zeros(0), "AIFF", "PCM_16"), probe_audio) == "it holds no samples"


@pytest.mark.parametrize("value, kind", [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_samples_that_are_no_numbers(value, kind):
    samples = np.zeros((2, 96_000))
    samples[1, 72_000] = value
    assert refusal(encode(samples, "WAV", "FLOAT")) == f"it has {kind} samples, the first at 1.50 s"


def test_several_ogg_streams_in_one_file_are_refused(encoded):
    assert "several Ogg streams" in refusal(encoded[".ogg"] + encoded[".opus"], probe_audio)


def test_absurd_headers_are_refused(encoded):
    wav = encoded[".wav"]
    assert "1 Hz" in refusal(wav[:24] + struct.pack("<II", 1, 4) + wav[32:])
    flac = bytearray(encoded[".flac"])
    flac[21] |= 0x0F  # the top bits of STREAMINFO's number of samples
    assert "hours of sound" in refusal(bytes(flac), probe_audio)
    flac[21:26] = bytes([flac[21] & 0xF0, 0, 0, 0, 0])
    assert "how long it is" in refusal(bytes(flac), probe_audio)


def test_a_missing_file_a_directory_and_a_pipe(tmp_path):
    assert refusal(tmp_path / "none.wav") == "the file does not exist"
    assert refusal(tmp_path, probe_audio) == "it is a directory"
    os.mkfifo(tmp_path / "pipe.wav")
    assert refusal(tmp_path / "pipe.wav") == "it is not a regular file"


@contextlib.contextmanager
def without_root():
    """Nobody's rights where the tests run as root, whom permissions don't bind."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)


def test_a_file_without_read_permission(tmp_path):
    path = tmp_path / "secret.wav"
    write_audio(path, np.zeros((2, 100)))
    path.chmod(0)
    with without_root():
        assert refusal(path) == "it cannot be read: permission denied"


@pytest.mark.parametrize("data", [
    b"RF64\xff\xff\xff\xffWAVEds64\x1c\0\0\0" + bytes(4),
    b"\xff\xfb\x10\xc4" + bytes(32) + b"Xing" + bytes(2),
])  # fmt: skip
def test_a_header_that_ends_early_is_a_reason_not_a_crash(data):
    with pytest.raises(AudioError):
        probe_audio(data)


def test_a_patched_file_reads_as_one(tmp_path):
    data = bytes(range(200))
    path = tmp_path / "file"
    path.write_bytes(data)
    expected = b"HEAD" + data[50:]
    with open(path, "rb") as handle:
        patched = Patched(handle, b"HEAD", 50)
        assert patched.read() == expected
        for start, count in ((0, 2), (0, 10), (3, 1), (3, 50), (4, 5), (100, 100), (500, 3)):
            patched.seek(start)
            assert patched.read(count) == expected[start : start + count]
            assert patched.tell() == start + len(expected[start : start + count])
        assert patched.seek(-3, os.SEEK_END) == len(expected) - 3
        assert patched.seek(1, os.SEEK_CUR) == len(expected) - 2
        assert patched.read() == expected[-2:]
