"""The same recording is found under another name, whatever was done to the file; other music is not."""

import numpy as np
import pytest
import soundfile
import soxr

from acestep_pipeline.data.audio import AUDIO_SUFFIXES, SAMPLE_RATE, read_audio
from acestep_pipeline.data.building import fingerprint as fingerprints
from acestep_pipeline.data.building.fingerprint import WORDS_PER_S, decode, encode, find_near_duplicates, fingerprint
from acestep_pipeline.data.demo_music import render_demo_dataset


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> dict[str, np.ndarray]:
    """Six rendered pieces of twelve seconds, `[2, samples]`."""
    folder = tmp_path_factory.mktemp("fingerprint") / "clips"
    render_demo_dataset(folder, duration_s=12.0)
    paths = sorted(path for path in folder.iterdir() if path.suffix in AUDIO_SUFFIXES)
    return {path.stem: read_audio(path) for path in paths}


@pytest.fixture(scope="module")
def prints(music) -> dict[str, np.ndarray]:
    return {name: fingerprint([waveform]) for name, waveform in music.items()}


def encoded(waveform: np.ndarray, path, **options) -> np.ndarray:
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 2, **options) as sound:
        for start in range(0, waveform.shape[1], 1 << 17):
            sound.write(np.ascontiguousarray(waveform[:, start : start + (1 << 17)].T))
    return read_audio(path)


def as_mp3(waveform, folder):
    options = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "CONSTANT", "compression_level": 0.9}
    return encoded(waveform, folder / "a.mp3", **options)


def as_opus(waveform, folder):
    return encoded(waveform, folder / "a.opus", format="OGG", subtype="OPUS", compression_level=0.75)


def as_mono_at_22050_hz(waveform, folder):
    low = soxr.resample(waveform.mean(axis=0), SAMPLE_RATE, 22_050)
    soundfile.write(folder / "a.wav", low, 22_050, subtype="PCM_16")
    return read_audio(folder / "a.wav")


CHANGES = {
    "mp3": as_mp3,
    "opus": as_opus,
    "mono at 22.05 kHz": as_mono_at_22050_hz,
    "6 dB less": lambda waveform, folder: waveform / 2,
    "2 s later": lambda waveform, folder: np.pad(waveform, ((0, 0), (2 * SAMPLE_RATE + 3000, 0))),
    "2 s cut off, then mp3": lambda waveform, folder: as_mp3(waveform[:, 2 * SAMPLE_RATE + 3000 :], folder),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(music, prints, change, tmp_path):
    changed = list(music)[::2]
    copies = {f"{name} copy": fingerprint([CHANGES[change](music[name], tmp_path)]) for name in changed}
    found = find_near_duplicates(prints | copies)
    assert {(a, b) for a, b, _ in found} == {(name, f"{name} copy") for name in changed}
    assert all(similarity > 0.75 for *_, similarity in found)


def test_a_copy_at_another_rate_is_found_without_resampling(music, prints):
    copies = {
        f"{name} copy": fingerprint([soxr.resample(waveform.T, SAMPLE_RATE, 44_100).T], sample_rate=44_100)
        for name, waveform in music.items()
    }
    found = find_near_duplicates(prints | copies)
    assert {(a, b) for a, b, _ in found} == {(name, f"{name} copy") for name in music}
    assert all(similarity > 0.99 for *_, similarity in found)


def test_different_music_is_not_alike(prints):
    assert len(prints) == 6 and find_near_duplicates(prints) == []


def test_a_fingerprint_is_small_and_survives_json(music, prints):
    for name, words in prints.items():
        assert words.dtype == np.uint32 and len(words) <= WORDS_PER_S * music[name].shape[1] / SAMPLE_RATE
        assert np.array_equal(decode(encode(words)), words)
    with pytest.raises(ValueError):
        decode("not base64!")


def test_silence_and_scraps_are_like_nothing(prints):
    silent = fingerprint([np.zeros((2, 30 * SAMPLE_RATE), np.float32)])
    assert len(silent) and not silent.any()
    scrap = next(iter(prints.values()))[:20]
    nothing = fingerprint([])
    others = {"a": silent, "b": silent.copy(), "c": scrap, "d": scrap.copy(), "e": nothing, "f": nothing}
    assert find_near_duplicates(others) == [] == find_near_duplicates({})


def random_words(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1 << 32, count, dtype=np.uint32)


def test_every_one_of_many_copies_is_tied_to_an_earlier_one():
    words = random_words(400, 0)
    copies = {f"{number:03}": words[number % 7 :] for number in range(100)}
    found = find_near_duplicates({"other": random_words(400, 1)} | copies)
    assert {second for _, second, _ in found} == set(copies) - {"000"}
    assert all(first < second for first, second, _ in found)


def test_the_order_is_that_of_the_tracks_and_the_same_every_time():
    prints = {name: random_words(300, seed) for name, seed in (("z", 1), ("b", 2), ("y", 1), ("a", 2))}
    assert find_near_duplicates(prints) == [("z", "y", 1.0), ("b", "a", 1.0)] == find_near_duplicates(prints)


def test_a_drone_in_every_track_neither_joins_them_nor_hides_a_copy():
    drone = random_words(4, 9)
    prints = {str(seed): np.concatenate([np.tile(drone, 100), random_words(900, seed)]) for seed in range(60)}
    prints["copy"] = prints["30"][50:]
    assert [pair[:2] for pair in find_near_duplicates(prints)] == [("30", "copy")]


def test_the_share_of_equal_bits_is_counted():
    words = random_words(1000, 3)
    noisy = words ^ (random_words(1000, 4) & random_words(1000, 5) & random_words(1000, 6))  # 1 bit in 8 turned
    [(_, _, similarity)] = find_near_duplicates({"a": words, "b": noisy})
    assert similarity == pytest.approx(7 / 8, abs=0.01)


def test_copies_are_found_in_a_collection_too_large_to_be_indexed_whole(monkeypatch):
    generator = np.random.default_rng(0)
    prints = {str(number): generator.integers(1, 1 << 32, 1900, dtype=np.uint32) for number in range(200)}
    for number in range(20):  # 12 % of the bits are wrong
        wrong = np.packbits(generator.random((1900, 32)) < 0.12, axis=1).view(np.uint32)[:, 0]
        prints[f"copy {number}"] = prints[str(number)] ^ wrong
    monkeypatch.setattr(fingerprints, "_MAX_INDEXED", 220 * 1900 // 10)
    pairs = find_near_duplicates(prints)
    assert [(first, second) for first, second, _ in pairs] == [(str(n), f"copy {n}") for n in range(20)]
