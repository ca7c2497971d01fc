"""Folders of audio on S3 and the Hub that are streamed: the same tracks, latents and adapter as those that are copied,
few bytes on the disk at any time, and nothing fetched twice without need."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from acestep_pipeline.cli import main
from acestep_pipeline.data.audio import AUDIO_SUFFIXES
from acestep_pipeline.data.encoders import Encoders
from acestep_pipeline.data.held_out import load_train_and_held_out
from acestep_pipeline.data.latent_cache import DECODING_THREADS, LatentCache, prepare_tracks
from acestep_pipeline.data.track_sources import locate
from acestep_pipeline.data.tracks import dataset_fingerprint, load_tracks
from acestep_pipeline.engines import map_in_order
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.storage import remote_folder
from tests.s3_server import S3Folder, corrupting_proxy
from tests.test_hub import hub  # noqa: F401 - a fixture
from tests.test_storage import content
from tests.test_tracks import write_clip
from tests.training_runs import train_here


@pytest.fixture(autouse=True)
def own_cache(tiny_dir, tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own, with the tiny checkpoint in it."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / tiny_dir.name).symlink_to(tiny_dir)
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def music(tmp_path) -> Path:
    """Clips with every kind of text beside them, and what is to be warned of or left out."""
    folder = tmp_path / "music"
    for number, name in enumerate(("b/one.wav", "b/two.wav", "three.WAV", "four.wav", ".hidden.wav", ".git/x.wav")):
        write_clip(folder / name, duration_s=2.0, seed=number)
    texts = {
        "b/one.tags.txt": "techno, dark", "b/one.lyrics.txt": "la la", "b/two.json": '{"bpm": 90}',
        "b/stray.txt": "nobody's", "README.md": "mine", "metadata.jsonl": '{"file": "three.WAV", "genre": "jazz"}',
        "other.csv": "file,bpm\nfour.wav,120\ngone.wav,1\n", "damaged.wav": "no audio",
        "set.json": json.dumps({"samples": [{"filename": "four.wav", "keyscale": "C major"}]}),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def put(folder: Path, s3_folder: S3Folder) -> str:
    s3_folder.put(content(folder))
    return s3_folder.url


def read(source, *, streaming=False, **options):
    place = locate(source, streaming=streaming, show_progress=False)
    return load_tracks(place, min_duration_s=1, show_progress=False, **options)


def without_audio(tracks):
    return [dataclasses.replace(track, audio=None) for track in tracks]


def audio_files(folder: Path) -> list[str]:
    return [name for name in content(folder) if Path(name).suffix.lower() in AUDIO_SUFFIXES] if folder.exists() else []


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """The keys that are fetched from S3 as they are needed."""
    keys, fetch = [], remote_folder.fetch

    def watched(client, bucket, file, path, **options):
        keys.append(file.key)
        fetch(client, bucket, file, path, **options)

    monkeypatch.setattr(remote_folder, "fetch", watched)
    return keys


def test_the_tracks_of_a_bucket_are_those_of_the_folder_and_no_audio_stays(music, s3_folder, own_cache, fetched):
    url = put(music, s3_folder)
    streamed, said = read(url, streaming=True)
    assert not audio_files(own_cache) and len(fetched) == 5, "four clips, and one that is none"
    copied, said_of_copy = read(url)
    local, said_of_folder = read(music)
    assert without_audio(streamed) == without_audio(copied) == without_audio(local)
    assert said == said_of_copy == said_of_folder and len(said) > 3
    assert dataset_fingerprint(streamed) == dataset_fingerprint(local)
    assert [track.source for track in streamed] == [track.source.read_bytes() for track in local]


def test_the_tracks_of_a_repository_are_those_of_the_folder(music, hub, tmp_path, own_cache):  # noqa: F811
    shutil.copytree(music, tmp_path / "served" / "repository" / "part")
    hub.add("datasets/tester/music", {"main": tmp_path / "served" / "repository"})
    address = "hf://datasets/tester/music/part"
    streamed, said = read(address, streaming=True)
    local, said_of_folder = read(music)
    assert without_audio(streamed) == without_audio(local) and said == said_of_folder
    assert not audio_files(own_cache) and not audio_files(tmp_path / "hf")
    assert [track.source for track in streamed] == [track.source.read_bytes() for track in local]
    before = len(hub.downloads)
    again, _ = read(address, streaming=True)
    assert without_audio(again) == without_audio(local)
    assert [name.rpartition("/")[2] for name in hub.downloads[before:]] == ["damaged.wav"], "a refusal is no fact"


def test_the_latents_are_those_of_the_copy_and_a_second_run_fetches_nothing(
    music, s3_folder, tmp_path, tiny_pipeline, fetched
):
    url = f"{put(music, s3_folder)}/b"

    def prepare(streaming, name):
        tracks, _ = read(url, streaming=streaming)
        cache = LatentCache(tmp_path / name, Encoders.of(tiny_pipeline))
        cached, problems = prepare_tracks(cache, tracks, max_duration_s=2.0, show_progress=False)
        assert len(cached) == len(tracks) == 2 and not problems
        return content(tmp_path / name)

    streamed = prepare(True, "streamed")
    assert len(fetched) == 4, "once to see what it is, once to encode it"
    assert streamed == prepare(False, "copied") and len(fetched) == 4
    assert prepare(True, "streamed") == streamed and len(fetched) == 4


def test_few_files_are_on_the_disk_at_any_time(s3_folder, tmp_path, tiny_pipeline, monkeypatch, own_cache):
    size = write_clip(tmp_path / "music/0.wav", duration_s=30.0).stat().st_size
    for number in range(1, 16):
        shutil.copy(tmp_path / "music/0.wav", tmp_path / f"music/{number}.wav")
    url = put(tmp_path / "music", s3_folder)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    seen, fetch = [], remote_folder.fetch

    def watched(*arguments, **options) -> None:
        """Fetch a file, and see what lies there when it has just come."""
        fetch(*arguments, **options)
        found = 0
        for folder, _, names in (*os.walk(temporary), *os.walk(own_cache)):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found += os.path.getsize(os.path.join(folder, name))
        seen.append(found)

    monkeypatch.setattr(remote_folder, "fetch", watched)
    tracks, _ = read(url, streaming=True)
    cache = LatentCache(tmp_path / "latents", Encoders.of(tiny_pipeline))
    decoded = map_in_order(cache.decode, tracks, num_workers=DECODING_THREADS)
    assert sum(waveform.shape == (2, 30 * 48_000) for waveform in decoded) == 16
    assert size <= min(seen) and max(seen) <= 4 * size + 20_000, "one of sixteen files at least, no more than four"
    assert not any(temporary.iterdir()) and not audio_files(own_cache)


def test_a_file_that_has_gone_or_changed_is_named(demo_dir, s3_folder, tmp_path, tiny_pipeline):
    url = put(demo_dir, s3_folder)
    tracks, _ = read(url, streaming=True)
    name = tracks[1].id
    for change in (lambda: s3_folder.put({name: b"another song"}), lambda: s3_folder.delete(name)):
        change()
        with pytest.raises(RunError, match=f"{s3_folder.name}/{name} changed while it was read"):
            cache = LatentCache(tmp_path / "latents", Encoders.of(tiny_pipeline))
            prepare_tracks(cache, tracks, max_duration_s=4.0, show_progress=False)


def test_a_file_of_the_hub_that_cannot_be_had_is_named(music, hub, monkeypatch):  # noqa: F811
    (music / "damaged.wav").unlink()
    repository = hub.add("datasets/tester/music", {"main": music})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's own retries
    hub.faults += [(r"/four.wav", 503)] * 20
    with pytest.raises(RunError, match=r"hf://datasets/tester/music/four.wav: .* is busy or broken \(503\)"):
        read("hf://datasets/tester/music", streaming=True)
    hub.faults.clear()
    tracks, _ = read("hf://datasets/tester/music", streaming=True)
    del repository.commits[repository.find("main")]["four.wav"]
    with pytest.raises(UsageError, match="hf://datasets/tester/music/four.wav: .*404"):
        [track.source for track in tracks]


def test_processes_that_read_the_same_files_fetch_each_once(music, s3_folder, fetched):
    (music / "damaged.wav").unlink()
    url = put(music, s3_folder)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: without_audio(read(url, streaming=True)[0]), range(4)))
    assert all(tracks == results[0] for tracks in results) and len(results[0]) == 4
    assert len(fetched) == 4


def test_what_arrives_damaged_is_fetched_again(tmp_path, s3_folder, monkeypatch):
    clip = write_clip(tmp_path / "music/song.wav").read_bytes()
    middle = clip[len(clip) // 2 :][:12]
    url = put(tmp_path / "music", s3_folder)
    with corrupting_proxy(s3_folder.server, middle, bytes(12), times=1) as (proxy, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        (track,), _ = load_tracks(locate(url, streaming=True), show_progress=False)
        assert done and track.source == clip


def test_a_release_is_streamed_by_its_names(demo_dir, s3_folder):
    from acestep_pipeline import storage

    storage.push(demo_dir, f"{s3_folder.url}/demo", show_progress=False)
    streamed, _ = read(f"{s3_folder.url}/demo", streaming=True)
    assert without_audio(streamed) == without_audio(read(demo_dir)[0])


def test_held_out_tracks_are_streamed_too(demo_dir, tmp_path, s3_folder, own_cache):
    s3_folder.put({f"train/{name}": data for name, data in content(demo_dir).items()})
    write_clip(tmp_path / "held.wav", duration_s=2.0)
    s3_folder.put({"held/held.wav": (tmp_path / "held.wav").read_bytes()})
    settings = {
        "dataset_name": None, "max_validation_samples": 32, "validation_seed": 0, "min_duration_s": 1.0,
        "max_train_samples": None, "seed": 0, "streaming": True, "show_progress": False,
    }  # fmt: skip
    train, held, _ = load_train_and_held_out(
        f"{s3_folder.url}/train", validation_data_dir=f"{s3_folder.url}/held", validation_fraction=0.0, **settings
    )
    assert (len(train), [track.id for track in held]) == (6, ["held.wav"])
    train, held, _ = load_train_and_held_out(
        f"{s3_folder.url}/train", validation_data_dir=None, validation_fraction=0.3, **settings
    )
    assert len(train) + len(held) == 6 and held and not audio_files(own_cache)


def test_what_cannot_be_streamed_is_refused(tmp_path, s3_folder, demo_dir):
    with pytest.raises(UsageError, match="/nothing holds no files"):
        read(f"{s3_folder.url}/nothing", streaming=True)
    with pytest.raises(UsageError, match="--streaming fetches the audio of"):
        train_here(demo_dir, tmp_path / "run", streaming=True)


def test_a_disk_without_room_is_said_before_anything_is_fetched(tmp_path, s3_folder, monkeypatch, fetched):
    write_clip(tmp_path / "music/song.wav")
    url = put(tmp_path / "music", s3_folder)
    monkeypatch.setattr("acestep_pipeline.paths.free_space_bytes", lambda directory: 1000)
    with pytest.raises(UsageError, match="are to come; make room"):
        read(url, streaming=True)
    assert not fetched


def test_the_cache_command_streams(music, s3_folder, own_cache, capsys):
    url = put(music, s3_folder)
    command = ["cache", "--pretrained_model_name_or_path", "tiny", "--min_duration_s", "1", "--streaming"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--train_data_dir", f"{url}/b"])
    assert ended.value.code == 0 and "2 tracks" in capsys.readouterr().out and not audio_files(own_cache)
    with pytest.raises(SystemExit) as ended:
        main([*command, "--train_data_dir", str(music)])
    assert ended.value.code == 2


@pytest.mark.slow
def test_the_adapter_is_the_same_to_the_bit(music, s3_folder, tmp_path, own_cache):
    url = put(music, s3_folder)
    adapters = []
    for streaming in (True, False):
        run = tmp_path / f"run-{streaming}"
        train_here(
            f"{url}/b",
            run,
            streaming=streaming,
            max_train_steps=2,
            max_duration_s=2,
            latent_cache_dir=tmp_path / f"latents-{streaming}",
        )
        adapters.append((run / "pytorch_lora_weights.safetensors").read_bytes())
        assert bool(audio_files(own_cache / "s3")) != streaming
    assert adapters[0] == adapters[1]
