import io
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest

from acestep_pipeline.data import av_audio
from acestep_pipeline.data.audio import AV_SUFFIXES, AudioError, probe_audio, read_audio, stream_audio, write_audio

from .test_audio import FIVE_ONE, amplitude_at, fit_tone, refusal, tone

# suffix: (container, codec, sample format, what `AudioInfo.format` says)
FORMATS = {
    ".m4a": ("ipod", "aac", "fltp", "MP4/AAC"),
    ".alac": ("ipod", "alac", "s32p", "MP4/ALAC"),
    ".mov": ("mov", "pcm_s24le", "s32", "MP4/PCM_S24LE"),
    ".aac": ("adts", "aac", "fltp", "ADTS/AAC"),
    ".webm": ("webm", "libopus", "flt", "MATROSKA/OPUS"),
    ".mka": ("matroska", "flac", "s16", "MATROSKA/FLAC"),
    ".wma": ("asf", "wmav2", "fltp", "ASF/WMAV2"),
    ".ac3": ("ac3", "ac3", "fltp", "AC3/AC3"),
    ".eac3": ("eac3", "eac3", "fltp", "EAC3/EAC3"),
    ".wv": ("wv", "wavpack", "s16p", "WV/WAVPACK"),
    ".tta": ("tta", "tta", "s16", "TTA/TTA"),
    ".caf": ("caf", "alac", "s32p", "CAF/ALAC"),
    ".oga": ("ogg", "flac", "s16", "OGG/FLAC"),
}
LOSSY = {".m4a", ".aac", ".webm", ".wma", ".ac3", ".eac3"}
FASTSTART = {"movflags": "faststart"}
FRAGMENTED = {"movflags": "empty_moov+default_base_moof", "frag_duration": "500000"}


def encode(samples, container, codec, sample_format, *_, sample_rate=48_000, options=None, metadata=None):
    """Encode [channels, samples] with PyAV, by way of a file: faststart reads what it has written."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "encoded")
        _write(path, samples, container, codec, sample_format, layout, sample_rate, options or {}, metadata or {})
        return path.read_bytes()


def _write(path, samples, container, codec, sample_format, layout, sample_rate, options, metadata):
    with av.open(str(path), "w", format=container, options=options) as output:
        output.metadata.update(metadata)
        sound = output.add_stream(codec, rate=sample_rate, layout=layout, format=sample_format)
        if codec in {"aac", "libopus", "wmav2"}:
            sound.bit_rate = 64_000 * len(samples)
        sound.codec_context.open()
        convert = av.AudioResampler(format=sample_format)
        step = sound.codec_context.frame_size or 1024
        for start in range(0, samples.shape[1], step):
            block = np.ascontiguousarray(samples[:, start : start + step], np.float32)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = sample_rate, start
            for converted in convert.resample(frame):
                converted.pts = start
                output.mux(sound.encode(converted))
        output.mux(sound.encode(None))


@pytest.fixture(scope="module")
def noisy():
    """[2, 3 s]: a sweep under noise, so that compressed frames are long and the files large enough to cut."""
    time_s = np.arange(3 * 48_000) / 48_000
    sweep = 0.3 * np.sin(2 * np.pi * (100 * time_s + 1000 * time_s**2))
    return sweep + np.random.default_rng(0).normal(0, 0.05, (2, len(sweep)))


@pytest.fixture(scope="module")
def encoded(noisy):
    return {suffix: encode(noisy, *how) for suffix, how in FORMATS.items()}


# --- Reading


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_tone_survives_each_codec(suffix):
    data = encode(np.stack([tone(1000), tone(440, amplitude=0.25)]), *FORMATS[suffix])
    info, waveform = probe_audio(data), read_audio(data)
    assert (info.format, info.sample_rate, info.channels) == (FORMATS[suffix][3], 48_000, 2)
    assert info.duration_s == pytest.approx(2, abs=0.05) == waveform.shape[1] / 48_000
    assert waveform.dtype == np.float32 and waveform.flags.c_contiguous
    for channel, frequency_hz, amplitude in ((0, 1000, 0.5), (1, 440, 0.25)):
        level, rest_db = fit_tone(waveform[channel], frequency_hz)
        assert level == pytest.approx(amplitude, rel=0.02)
        assert rest_db < (-25 if suffix in LOSSY else -80)


@pytest.mark.parametrize("options", [None, FASTSTART, FRAGMENTED])
@pytest.mark.parametrize("sample_rate", [44_100, 48_000])
def test_an_mp4_is_as_long_as_the_music_and_begins_with_it(options, sample_rate):
    samples = np.zeros((2, 2 * sample_rate + 123))
    samples[:, sample_rate] = 0.9
    waveform = read_audio(encode(samples, *FORMATS[".m4a"], sample_rate=sample_rate, options=options))
    if options is FRAGMENTED:  # without an edit list nobody knows the encoder's delay
        assert np.argmax(waveform[0]) == pytest.approx(48_000 + 1024 * 48_000 / sample_rate, abs=2)
    else:
        assert np.argmax(waveform[0]) == pytest.approx(48_000, abs=1)
        assert waveform.shape[1] == pytest.approx(samples.shape[1] * 48_000 / sample_rate, abs=48)


@pytest.mark.parametrize("suffix", [".alac", ".webm", ".mka", ".wv", ".tta", ".mov"])
def test_sound_stays_where_it_was(suffix):
    samples = np.zeros((2, 96_000))
    samples[:, 30_000] = 0.9
    assert np.argmax(read_audio(encode(samples, *FORMATS[suffix]))[0]) == pytest.approx(30_000, abs=2)


def test_lossless_integers_come_back_exactly(noisy):
    for how, bits in ((FORMATS[".mov"], 24), (FORMATS[".mka"], 16), (FORMATS[".wv"], 16), (FORMATS[".oga"], 16)):
        error = read_audio(encode(noisy, *how)) - noisy.astype(np.float32)
        assert np.abs(error).max() <= 1.01 * 2.0 ** (1 - bits)
    error = read_audio(encode(noisy, "mov", "pcm_u8", "u8")) - noisy
    assert np.abs(error).max() <= 1.01 * 2.0**-7 and abs(error.mean()) < 2.0**-7


@pytest.mark.parametrize("suffix", [".m4a", ".webm", ".wma"])
def test_path_bytes_blocks_and_threads_give_the_same_samples(tmp_path, encoded, suffix, monkeypatch):
    path = tmp_path / f"music{suffix}"
    path.write_bytes(encoded[suffix])
    expected = read_audio(path)
    assert np.array_equal(read_audio(encoded[suffix]), expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(waveform, expected) for waveform in pool.map(read_audio, [path] * 4))
    monkeypatch.setattr(av_audio, "BLOCK_FRAMES", 5000)
    blocks = list(stream_audio(path))
    assert len(blocks) > 20
    assert np.array_equal(np.concatenate(blocks, axis=1), expected)


@pytest.mark.parametrize("name", ["song.mp3", "song.wav", "song", "日本語の曲.m4a", "🎹🔥.m4a", "two\nlines.m4a"])
def test_the_bytes_decide_not_the_name(tmp_path, encoded, name):
    (tmp_path / name).write_bytes(encoded[".m4a"])
    assert probe_audio(tmp_path / name).format == "MP4/AAC"
    assert read_audio(tmp_path / name).shape == (2, 3 * 48_000)


def test_a_flac_named_m4a_is_left_to_libsndfile(tmp_path, noisy, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    write_audio(tmp_path / "a.flac", noisy)
    os.rename(tmp_path / "a.flac", tmp_path / "a.m4a")
    assert probe_audio(tmp_path / "a.m4a").format == "FLAC/PCM_24"


@pytest.mark.parametrize("suffix", FORMATS)
def test_without_pyav_the_format_and_the_fix_are_named(encoded, suffix, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # importing it fails, as where it is not installed
    for function in (probe_audio, read_audio):
        reason = refusal(encoded[suffix], function)
        assert reason.endswith(" needs PyAV: pip install 'ace-step-lora[av]', or convert it to flac or wav")


def test_the_suffixes_are_those_of_the_formats():
    assert FORMATS.keys() - {".oga"} <= AV_SUFFIXES


def test_five_point_one_is_mixed_as_in_a_wav():
    samples = np.stack([tone(frequency_hz, amplitude=0.3) for frequency_hz in FIVE_ONE.values()])
    full, lowered = 0.3 / (1 + 2 * 0.5**0.5), 0.3 * 0.5**0.5 / (1 + 2 * 0.5**0.5)
    for suffix in (".m4a", ".webm", ".mka"):
        left, _ = read_audio(encode(samples, *FORMATS[suffix]))
        expected = {"FL": full, "FR": 0, "FC": lowered, "LFE": 0, "BL": lowered, "BR": 0}
        for name, level in expected.items():
            assert amplitude_at(left, FIVE_ONE[name]) == pytest.approx(level, abs=0.01), (suffix, name)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_fifth_of_a_second_and_silence(suffix):
    waveform = read_audio(encode(np.zeros((1, 9600)), *FORMATS[suffix]))
    assert waveform.shape[1] == pytest.approx(9600, abs=2400)
    assert np.abs(waveform).max() < 1e-4


def test_a_recording_whose_length_was_never_written_is_read_to_its_end(noisy):
    for how in (FORMATS[".webm"], FORMATS[".mka"]):
        data = encode(noisy, *how, options={"live": "1"})
        with av.open(io.BytesIO(data)) as container:
            assert container.duration is None
        assert probe_audio(data).duration_s == pytest.approx(3, abs=0.03)
        assert read_audio(data).shape[1] == pytest.approx(3 * 48_000, abs=50)


def test_text_in_an_unknown_encoding_beside_the_sound_does_not_matter(noisy):
    data = encode(noisy, *FORMATS[".m4a"], metadata={"title": "Xafeteria"})
    assert data.count(b"Xafeteria") == 1
    assert read_audio(data.replace(b"Xafeteria", b"\xe9\xff\xfeeteria")).shape == (2, 3 * 48_000)


def film(noisy, *, container="matroska", with_sound=True, frames=25):
    """Pictures of 1 s, with 3 s of sound or none."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        pictures = output.add_stream("mpeg4", rate=25, width=32, height=32, pix_fmt="yuv420p")
        sound = output.add_stream("flac", rate=48_000, layout="stereo", format="s16") if with_sound else None
        for _ in range(frames):
            output.mux(pictures.encode(av.VideoFrame(32, 32, "yuv420p")))
        output.mux(pictures.encode(None))
        for start in range(0, noisy.shape[1] if with_sound else 0, 4096):
            block = (noisy[:, start : start + 4096].T * 32_767).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="stereo")
            frame.sample_rate, frame.pts = 48_000, start
            output.mux(sound.encode(frame))
        if with_sound:
            output.mux(sound.encode(None))
    return stream.getvalue()


@pytest.mark.parametrize("container", ["matroska", "mp4"])
@pytest.mark.parametrize("frames", [1, 25, 125])
def test_pictures_beside_the_sound_do_not_matter(noisy, container, frames):
    data = film(noisy, container=container, frames=frames)
    assert probe_audio(data).duration_s == pytest.approx(3, abs=0.01)
    assert read_audio(data).shape[1] == pytest.approx(3 * 48_000, abs=1)


def test_pictures_alone_are_no_sound(noisy):
    assert refusal(film(noisy, with_sound=False), probe_audio) == "it has no sound, only pictures"


# --- Truncated and damaged files


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.995])
@pytest.mark.parametrize("suffix", [".m4a", ".alac", ".mov", ".webm", ".mka", ".wma", ".wv", ".tta", ".caf", ".oga"])
def test_truncation_is_found(tmp_path, encoded, suffix, share):
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(encoded[suffix][: int(share * len(encoded[suffix]))])
    reason = refusal(path)
    assert reason.startswith("the file is truncated") and path.name not in reason
    assert refusal(path.read_bytes()) == reason
    if suffix != ".tta":  # its last frame is half there
        assert refusal(path, probe_audio) == reason


@pytest.mark.parametrize("options", [FASTSTART, FRAGMENTED])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.95])
def test_truncation_is_found_where_the_index_comes_first(noisy, options, share):
    data = encode(noisy, *FORMATS[".m4a"], options=options)
    assert data.index(b"moov") < data.index(b"mdat")
    assert refusal(data[: int(share * len(data))], probe_audio).startswith("the file is truncated")


def test_an_index_without_its_sound_is_found(noisy):
    data = encode(noisy, *FORMATS[".m4a"], options=FASTSTART)
    assert (
        refusal(data[: data.index(b"mdat") - 4], probe_audio) == "the file is truncated: its sound data is not there"
    )


def test_raw_aac_that_ends_within_a_frame_is_found_by_decoding(encoded):
    assert "truncated or damaged" in refusal(encoded[".aac"][: len(encoded[".aac"]) // 2])


@pytest.mark.parametrize("suffix", sorted(FORMATS.keys() - {".mov", ".alac", ".caf"}))  # these have no redundancy
def test_damage_in_the_middle_is_found(encoded, suffix):
    data = bytearray(encoded[suffix])
    middle = len(data) // 2
    data[middle : middle + 8000] = np.random.default_rng(1).bytes(8000)
    assert "damaged" in refusal(bytes(data))


@pytest.mark.parametrize("suffix", [".mka", ".ac3", ".eac3", ".wv", ".tta", ".oga"])
def test_one_wrong_byte_is_found_where_frames_have_checksums(encoded, suffix):
    data = bytearray(encoded[suffix])
    data[len(data) // 2] ^= 0x55
    assert "damaged" in refusal(bytes(data))


def test_a_gap_between_packets_is_found(encoded):
    stream = io.BytesIO()
    with av.open(io.BytesIO(encoded[".webm"])) as source, av.open(stream, "w", format="webm") as output:
        copy = output.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None and not 1.0 < float(packet.pts * packet.time_base) < 1.3:
                packet.stream = copy
                output.mux(packet)
    assert probe_audio(stream.getvalue()).duration_s == pytest.approx(3, abs=0.02)
    assert "s of its sound are missing at 1.0" in refusal(stream.getvalue())


@pytest.mark.parametrize("value, kind", [(np.nan, "NaN"), (np.inf, "infinite")])
def test_samples_that_are_no_numbers(value, kind):
    samples = np.zeros((2, 96_000))
    samples[1, 72_000] = value
    data = encode(samples, "matroska", "pcm_f32le", "flt")
    assert refusal(data) == f"it has {kind} samples, the first at 1.50 s"


def test_a_file_that_changes_its_rate_is_refused(noisy):
    data = encode(noisy, *FORMATS[".aac"]) + encode(noisy, *FORMATS[".aac"], sample_rate=44_100)
    assert "its sample rate or channels change at 3." in refusal(data)


def test_a_file_that_is_cut_while_it_is_read(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(av_audio, "BLOCK_FRAMES", 5000)
    for suffix in (".mov", ".wma", ".webm"):
        path = tmp_path / f"music{suffix}"
        path.write_bytes(encoded[suffix])
        blocks = stream_audio(path)
        next(blocks)
        os.truncate(path, len(encoded[suffix]) // 2)
        with pytest.raises(AudioError, match="truncated or damaged"):
            list(blocks)


def test_random_bytes_behind_a_known_beginning_are_a_reason_not_a_crash(encoded):
    random = np.random.default_rng(0)
    for data in encoded.values():
        for size in (12, 30, 64, 200):
            assert refusal(data[:size] + random.bytes(3000))
            assert refusal(data[:size], probe_audio)
