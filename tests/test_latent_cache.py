"""The latent cache: what training reads is, to the bit, what inference computes; and when it is computed again."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from diffusers import AceStepTransformer1DModel, AutoencoderOobleck
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import Qwen3Model

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.conditioning import PromptFields, context_latents, encode_condition
from acestep_pipeline.data import latent_cache
from acestep_pipeline.data.audio import read_audio, write_audio
from acestep_pipeline.data.batching import BatchLoader, DrawSettings, Item, MicroBatch
from acestep_pipeline.data.cache_files import write_cache_file
from acestep_pipeline.data.encoders import Encoders, fingerprint
from acestep_pipeline.data.latent_cache import (
    LatentCache,
    crop_frames,
    encode_latents,
    load_condition,
    load_latents,
    prepare_tracks,
    prompt_fields,
)
from acestep_pipeline.data.tracks import load_tracks
from acestep_pipeline.errors import RunError, UsageError
from tests.training_runs import train_here

LYRICS = "[verse]\nGrüße aus dem Funkhaus\n[chorus]\nla la la"


@pytest.fixture(scope="module")
def pipeline(tiny_dir):
    """A pipeline that no test changes."""
    pipeline = ACEStepPipeline.from_pretrained(tiny_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def track(tmp_path_factory):
    """2.3 s of stereo noise with all its text."""
    folder = tmp_path_factory.mktemp("track")
    noise = np.random.default_rng(0).normal(0, 0.1, (2, round(2.3 * 48_000)))
    write_audio(folder / "song.flac", noise)
    (folder / "song.tags.txt").write_text("techno, dark, 909 drums")
    (folder / "song.lyrics.txt").write_text(LYRICS)
    (folder / "song.json").write_text('{"bpm": 128, "keyscale": "A minor", "timesignature": 4, "language": "de"}')
    ((track,), _) = load_tracks(folder, show_progress=False)
    return track


@pytest.fixture
def cache(tmp_path, pipeline):
    return LatentCache(tmp_path / "latents", Encoders.of(pipeline))


@pytest.fixture
def encodings():
    """Names of the frozen models' modules that run, one entry a forward pass."""
    ran = []
    watched = {"OobleckEncoder": "vae", "Qwen3Model": "text encoder", "AceStepConditionEncoder": "condition encoder"}

    def note(module, inputs):
        if type(module).__name__ in watched:
            ran.append(watched[type(module).__name__])

    handle = register_module_forward_pre_hook(note)
    yield ran
    handle.remove()


def files(cache):
    """Every file in the cache with its content."""
    root = cache.latents_dir.parent
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- Equal to inference


def test_cached_conditions_are_what_the_pipeline_feeds_its_transformer(cache, pipeline, track):
    entry, problems = cache.prepare(track, 240.0)
    assert not problems
    window = entry.windows[0]
    assert window.fields == PromptFields(
        prompt="techno, dark, 909 drums",
        lyrics=LYRICS,
        vocal_language="de",
        bpm=128,
        keyscale="A minor",
        timesignature="4",
        audio_duration=2.0,
    )
    cached = load_condition(window)
    assert torch.equal(cached, encode_condition(pipeline, window.fields).encoder_hidden_states)

    fed = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append((kwargs["encoder_hidden_states"], kwargs["context_latents"])),
        with_kwargs=True,
    )
    pipeline(**asdict(window.fields), num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    hook.remove()
    ((conditions, context),) = fed
    assert conditions.shape == (1, window.num_condition_tokens, 64)
    assert torch.equal(cached, conditions[0])
    assert torch.equal(context_latents(pipeline.condition_encoder.silence_latent, entry.crop_frames), context[0])


def test_a_cache_that_is_removed_while_it_is_used_is_named(cache, track):
    entry, _ = cache.prepare(track, 240.0)
    entry.latents_file.unlink()
    with pytest.raises(RunError, match=f"{entry.latents_file.name} of the latent cache was removed or damaged"):
        load_latents(entry, entry.windows[0])
    entry.windows[0].condition_file.write_bytes(b"cut")
    with pytest.raises(RunError, match="of the latent cache was removed or damaged .*--resume_from_checkpoint latest"):
        load_condition(entry.windows[0])


def test_cached_latents_are_the_vae_s(cache, pipeline, track):
    entry, _ = cache.prepare(track, 240.0)
    waveform = torch.from_numpy(read_audio(track.audio))[None, :, : entry.num_frames * 1920]
    assert (entry.num_frames, entry.crop_frames) == (57, 50)
    with torch.no_grad():
        posterior = pipeline.vae.encode(waveform).latent_dist
    cached = load_latents(entry)
    assert torch.equal(cached["mean"], posterior.mean[0].T)
    assert torch.equal(cached["std"], posterior.std[0].T)
    assert cached["mean"].dtype == torch.float32
    assert [window.start_frame for window in entry.windows] == [0, 7]
    for window in entry.windows:
        part = load_latents(entry, window)
        for name, tensor in cached.items():
            assert torch.equal(part[name], tensor[window.start_frame :][:50]) and part[name].is_contiguous()


# --- Computed once, and again when it must be


def test_nothing_is_encoded_twice(cache, pipeline, track, tmp_path, encodings):
    first = cache.prepare(track, 240.0)
    assert set(encodings) == {"vae", "text encoder", "condition encoder"}
    before = files(cache)
    pipeline.encode_prompt("other", "words", device=torch.device("cpu"))
    encodings.clear()
    assert cache.prepare(track, 240.0) == first
    # A pipeline that has been used since, and the same audio under another name, find the same files.
    again = LatentCache(tmp_path / "latents", Encoders.of(pipeline))
    assert again.prepare(replace(track, id="other"), 240.0)[0] == replace(first[0], id="other")
    assert not encodings
    assert files(cache) == before


def test_damaged_files_are_made_again(cache, track):
    entry, _ = cache.prepare(track, 240.0)
    before = files(cache)
    assert len(before) == 2
    damages = (
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: bytes(range(256)) * 40,
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],  # one bit of a value
    )
    for damage in damages:
        for file in (entry.latents_file, entry.windows[0].condition_file):
            file.write_bytes(damage(file.read_bytes()))
        again, problems = cache.prepare(track, 240.0)
        assert again == entry and files(cache) == before
        assert [problem.reason for problem in problems] == [
            f"its cache file {file.name} was damaged and is made again"
            for file in (entry.latents_file, entry.windows[0].condition_file)
        ]
    assert cache.prepare(track, 240.0) == (entry, [])


def test_other_text_or_length_is_another_condition_of_the_same_latents(cache, track):
    changes = [{}, {"tags": "techno"}, {"lyrics": "other"}, {"language": "en"}, {"bpm": None}, {"keyscale": "C major"},
               {"timesignature": "3"}]  # fmt: skip
    longer = replace(cache.prepare(track, 240.0)[0].windows[0].fields, audio_duration=4.0)
    entries = [cache.prepare(replace(track, **change), 240.0)[0] for change in changes]
    conditions = {entry.windows[0].condition_file for entry in entries} | {cache._condition(longer)[0]}
    assert len(conditions) == len(changes) + 1
    assert len({load_file(file)["encoder_hidden_states"].numpy().tobytes() for file in conditions}) == len(conditions)
    assert len({entry.latents_file for entry in entries}) == 1


def test_another_model_never_finds_these_files(tmp_path, tiny_pipeline):
    original = LatentCache(tmp_path, Encoders.of(tiny_pipeline))

    def same():
        changed = LatentCache(tmp_path, Encoders.of(tiny_pipeline))
        return changed.latents_dir == original.latents_dir, changed.conditions_dir == original.conditions_dir

    assert same() == (True, True)
    for module, name, expected in (
        (tiny_pipeline.vae, "encoder.conv1.bias", (False, True)),
        (tiny_pipeline.text_encoder, "embed_tokens.weight", (True, False)),
        (tiny_pipeline.condition_encoder, "silence_latent", (True, False)),
    ):
        tensor = module.state_dict()[name]
        value = tensor.clone()
        tensor.view(-1)[-1] += 1e-3
        assert same() == expected
        tensor.copy_(value)
        assert same() == (True, True)
    tiny_pipeline.tokenizer.add_tokens(["techno"])
    assert same() == (True, False)
    tiny_pipeline.vae.bfloat16()
    assert same() == (False, False)


def test_a_fingerprint_tells_names_dtypes_and_values_apart():
    def linear(value=0.0, dtype=torch.float32):
        module = torch.nn.Linear(2, 2, dtype=dtype)
        torch.nn.init.constant_(module.weight, value)
        torch.nn.init.zeros_(module.bias)
        return module

    prints = [
        fingerprint(linear()),
        fingerprint(linear(1.0)),
        fingerprint(linear(dtype=torch.bfloat16)),
        fingerprint(torch.nn.Sequential(linear())),
        fingerprint(linear(), linear()),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(linear()) == prints[0]


def test_many_at_once_make_whole_files(cache, pipeline, track):
    """More threads than cores, each with a cache of its own, all on one track."""
    start = threading.Barrier(4)

    def prepare(_):
        own = LatentCache(cache.latents_dir.parents[1], Encoders.of(pipeline))
        start.wait()
        entry, problems = own.prepare(track, 240.0)
        return entry, problems, load_latents(entry)["mean"], load_condition(entry.windows[0])

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(prepare, range(4)))
    alone = encode_latents(pipeline.vae, track.audio)["mean"]
    assert all(result[:2] == results[0][:2] for result in results)
    assert all(torch.equal(result[2], alone) and torch.equal(result[3], results[0][3]) for result in results)
    assert len(files(cache)) == 2


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path, pipeline):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--latent_cache_dir .*/file/latents can't be written"):
        LatentCache(tmp_path / "file" / "latents", Encoders.of(pipeline))


def test_a_file_that_cannot_be_written_says_what_to_do(cache, track):
    for folder in (cache.latents_dir, cache.conditions_dir):
        folder.rmdir()
        folder.touch()
    with pytest.raises(RunError, match="--latent_cache_dir"):
        cache.prepare(track, 240.0)


# --- Lengths


@pytest.mark.parametrize(
    ("num_frames", "max_duration_s", "expected"),
    [
        (49, 240.0, 0),
        (50, 240.0, 50),
        (99, 240.0, 50),
        (100, 240.0, 100),
        (30_000, 240.0, 6000),
        (30_000, 241.9, 6000),
        (30_000, 600.0, 15_000),
        (1000, 2.0, 50),
        (1000, 3.99, 50),
        (1000, 1.99, 0),
        (31 * 25, 240.0, 30 * 25),
        (35 * 25, 240.0, 32 * 25),
        (215 * 25, 240.0, 208 * 25),
        (215 * 25, 214.0, 214 * 25),
        (239 * 25, 240.0, 224 * 25),
    ],
)
def test_crops_are_the_longest_duration_bucket(num_frames, max_duration_s, expected):
    assert crop_frames(num_frames, max_duration_s, 25.0) == expected


def test_a_bucket_is_at_least_eight_ninths_of_what_a_crop_could_be_and_there_are_few():
    lengths = {frames: crop_frames(frames, 600.0, 25.0) for frames in range(50, 15_001)}
    assert all(length % 50 == 0 and length <= frames for frames, length in lengths.items())
    assert all(length >= 8 / 9 * (frames // 50 * 50) for frames, length in lengths.items())
    assert len(set(lengths.values())) == 50, "of 300 even numbers of seconds"


def test_the_model_is_told_the_length_of_the_crop(track):
    assert prompt_fields(track, track.tags, LYRICS, 2.0).audio_duration == 2.0


def test_tracks_without_a_crop_are_skipped_with_their_length(cache, track, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 48_000))
    write_audio(tmp_path / "one_second.wav", noise)
    write_audio(tmp_path / "click.wav", noise[:, :1000])
    tracks, _ = load_tracks(tmp_path, show_progress=False)
    cached, problems = prepare_tracks(cache, [*tracks, track], max_duration_s=240.0, show_progress=False)
    assert [entry.id for entry in cached] == ["song.flac"]
    assert {problem.track: problem.reason for problem in problems} == {
        "click.wav": "it holds less than one latent frame of audio",
        "one_second.wav": "it decodes to 1.0 s; a crop needs at least 2 s",
    }


@pytest.fixture
def long_track(cache, track):
    """A track ten times as long as a crop of two seconds, whose latents count its frames."""
    entry, _ = cache.prepare(track, 2.0)
    mean = torch.arange(505.0)[:, None].expand(-1, 16)
    write_cache_file(entry.latents_file, {"mean": mean, "std": torch.zeros(505, 16)}, {})
    return track


def test_the_windows_of_a_long_track_cover_it_and_share_a_condition(cache, long_track, encodings):
    encodings.clear()
    entry, problems = cache.prepare(long_track, 2.0)
    assert not problems and not encodings
    assert (entry.num_frames, entry.crop_frames) == (505, 50)
    assert [window.start_frame for window in entry.windows] == [0, 45, 91, 136, 182, 227, 273, 318, 364, 409, 455]
    assert len({window.condition_file for window in entry.windows}) == 1
    loader = BatchLoader([entry], DrawSettings(seed=0, cfg_dropout=0.0))
    for number, window in enumerate(entry.windows):
        (latents,) = loader.load(MicroBatch(0, (Item(0, number),), (0,)))["latents"]
        assert torch.equal(latents[:, 0], window.start_frame + torch.arange(50.0))


def test_each_window_of_timed_lyrics_is_told_what_is_sung_in_it(cache, pipeline, long_track):
    """20.2 s; the stamps of the file on the left, the window's own times are told nowhere."""
    timed = "[ar:x]\n[verse]\n[00:00.50]eins\n[00:02.00]zwei\n[00:04.00]\n[chorus]\n[00:17.00]drei\n[00:20.10]"
    entry, problems = cache.prepare(replace(long_track, lyrics=timed), 2.0)
    assert not problems
    lyrics = [window.fields.lyrics for window in entry.windows]
    assert lyrics[:2] == ["[verse]\neins", "[verse]\nzwei"]
    assert lyrics[2:8] == ["[Instrumental]"] * 6 and lyrics[9:] == ["[chorus]\ndrei"] * 2
    assert {window.fields.audio_duration for window in entry.windows} == {2.0}
    for window in entry.windows:
        expected = encode_condition(pipeline, window.fields).encoder_hidden_states
        assert torch.equal(load_condition(window), expected)
        assert window.num_condition_tokens == len(expected)
    assert len({window.condition_file for window in entry.windows}) == len(set(lyrics)) == 4
    whole, _ = cache.prepare(replace(long_track, lyrics=timed), 240.0)
    assert whole.windows[0].fields.lyrics == "[verse]\neins\nzwei\n[chorus]\ndrei"


def test_what_is_lost_of_a_track_is_said_once_and_not_for_each_window(cache, long_track):
    many = "\n".join(f"[00:{second:02}.00]{'grüße 🎵 ' * 400}{second}" for second in (2, 8, 14))
    late = "\n[00:30.00]of another version\n[00:40.00]that is longer"
    tags = ", ".join(f"tag number {number}" for number in range(60))
    entry, problems = cache.prepare(replace(long_track, tags=tags, lyrics=many + late), 2.0)
    assert len({window.condition_file for window in entry.windows}) == 4
    assert [problem.track for problem in problems] == ["song.flac"] * 3 and not any(p.skipped for p in problems)
    text, lyrics, version = (problem.reason for problem in problems)
    assert "tags are cut" in text and "lyrics are cut" in lyrics
    assert version == "2 lines of its lyrics are timed beyond its end at 20.2 s and are left out"


def test_a_sampling_weight_goes_with_its_track(cache, track):
    assert cache.prepare(replace(track, sampling_weight=0.25), 240.0)[0].weight == 0.25
    assert cache.prepare(replace(track, repeats=3), 240.0)[0].repeats == 3
    assert (cache.prepare(track, 240.0)[0].weight, cache.prepare(track, 240.0)[0].repeats) == (1.0, 1)


def test_context_latents_are_silence_from_its_start_and_ones():
    silence = torch.randn(1, 30, 4)
    short, long = context_latents(silence, 8), context_latents(silence, 70)
    assert torch.equal(short, torch.cat([silence[0, :8], torch.ones(8, 4)], dim=-1))
    assert torch.equal(long[:, :4], torch.cat([silence[0], silence[0], silence[0, :10]]))
    assert torch.equal(long[:, 4:], torch.ones(70, 4))


# --- Memory


def test_only_the_transformer_is_in_memory_while_training(demo_dir, tmp_path):
    frozen = (AutoencoderOobleck, Qwen3Model, AceStepConditionEncoder)

    def alive():
        return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), frozen)}

    gc.collect()
    before, encoding, training = alive(), [], []

    def look(module, inputs):
        if isinstance(module, AceStepConditionEncoder):
            encoding.append(len(alive() - before))
        elif isinstance(module, AceStepTransformer1DModel):
            training.append(len(alive() - before))

    handle = register_module_forward_pre_hook(look)
    try:
        train_here(
            demo_dir, tmp_path / "out", max_train_steps=2, max_train_samples=1, latent_cache_dir=tmp_path / "cache"
        )
    finally:
        handle.remove()
    assert encoding == [3]
    assert len(training) >= 2 and not any(training)  # two updates, and the measuring of the effect


# --- Decoding ahead


def test_the_next_tracks_are_decoded_meanwhile_and_nothing_changes(tmp_path, pipeline, monkeypatch):
    """Five tracks, one of which is damaged and one too long to be held; the same files as one after another."""
    generator = np.random.default_rng(0)
    for name, seconds in (("a", 2.1), ("b", 2.5), ("c", 4.4), ("d", 2.2), ("e", 3.0)):
        write_audio(tmp_path / f"{name}.flac", generator.normal(0, 0.1, (2, round(seconds * 48_000))))
    tracks, _ = load_tracks(tmp_path, show_progress=False)
    damaged = (tmp_path / "b.flac").read_bytes()
    (tmp_path / "b.flac").write_bytes(damaged[: len(damaged) // 2])
    decoded = []

    def watch(name):
        original = getattr(latent_cache, name)

        def watched(source, **options):
            decoded.append((source.stem, name, threading.current_thread() is threading.main_thread()))
            return original(source, **options)

        monkeypatch.setattr(latent_cache, name, watched)

    watch("read_audio")
    watch("stream_audio")
    monkeypatch.setattr("acestep_pipeline.data.latent_cache.MAX_AHEAD_S", 4.0)
    ahead, alone = (LatentCache(tmp_path / name, Encoders.of(pipeline)) for name in ("ahead", "alone"))
    entries, problems = prepare_tracks(ahead, tracks, max_duration_s=2.0, show_progress=False)
    whole = [(name, "read_audio", False) for name in "abde"]
    assert sorted(decoded) == sorted([*whole, ("b", "stream_audio", True), ("c", "stream_audio", True)])
    expected = [alone.prepare(track, 2.0) for track in tracks]
    assert files(ahead) == files(alone)
    assert [entry.id for entry in entries] == [entry.id for entry, _ in expected if entry] == [
        "a.flac", "c.flac", "d.flac", "e.flac"
    ]  # fmt: skip
    assert problems == [problem for _, found in expected for problem in found]
    assert [(problem.track, problem.skipped) for problem in problems] == [("b.flac", True)]
    decoded.clear()
    prepare_tracks(ahead, [tracks[0], *tracks[2:]], max_duration_s=2.0, show_progress=False)
    assert not decoded, "what is cached is not decoded again"
