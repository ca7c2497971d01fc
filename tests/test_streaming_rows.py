"""Datasets of Parquet and Arrow files on S3 and the Hub that are streamed: the same tracks and latents as those of a
copy, few shards on the disk at any time, and none fetched twice without need."""

import gc
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value

from acestep_pipeline import storage
from acestep_pipeline.cli import main
from acestep_pipeline.data.building.dataset_files import write_splits
from acestep_pipeline.data.encoders import Encoders
from acestep_pipeline.data.held_out import load_train_and_held_out
from acestep_pipeline.data.latent_cache import DECODING_THREADS, LatentCache, prepare_tracks
from acestep_pipeline.data.remote_shards import SHELF
from acestep_pipeline.data.track_sources import locate
from acestep_pipeline.data.tracks import dataset_fingerprint, load_tracks
from acestep_pipeline.engines import map_in_order
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.storage import remote_folder
from tests.test_hub import hub  # noqa: F401 - a fixture
from tests.test_storage import content
from tests.test_streaming import fetched, own_cache, put, read, without_audio  # noqa: F401 - two are fixtures
from tests.test_tracks import write_clip
from tests.training_runs import start

KINDS = pytest.mark.parametrize("kind", ["parquet", "arrow"])
FEATURES = Features(
    {
        "audio": {"bytes": Value("binary"), "path": Value("string")},
        "caption": Value("string"),
        "label": ClassLabel(names=["techno", "jazz"]),
        "bpm": Value("int32"),
        "isrc": Value("string"),
        "sampling_weight": Value("float32"),
    }
)
SHARDS = {"train": 4, "test": 2}


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """A temporary folder and a cache of `datasets` of the test's own; nothing is left in the first."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    yield temporary
    assert not any(temporary.iterdir())
    SHELF.close()
    gc.collect()  # tracebacks of what was raised
    assert not nameless(temporary)


def nameless(folder: Path) -> dict[str, int]:
    """Files that were removed from a folder and are still in use: their sizes, in whole pages of memory."""
    sizes = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name.startswith(str(folder)) and name.endswith("(deleted)"):
            start, end = (int(place, 16) for place in span.split("-"))
            sizes[name] = sizes.get(name, 0) + end - start
    return sizes


def dataset_of(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows, features=FEATURES).cast_column("audio", Audio(decode=False))


def rows_of(folder: Path, numbers: range, *, duration_s: float = 2.0) -> Dataset:
    rows = []
    for number in numbers:
        clip = write_clip(folder / f"clip-{number}.wav", duration_s=duration_s, seed=number)
        audio = {"bytes": clip.read_bytes(), "path": clip.name if number % 2 else None}
        row = {"audio": audio, "caption": f"tag {number}", "label": number % 2, "bpm": 90 + number}
        rows.append(row | {"isrc": "DEA622400001" if number == 1 else None, "sampling_weight": 1 + number / 10})
    return dataset_of(rows)


@pytest.fixture
def splits(tmp_path) -> DatasetDict:
    """Rows with all that is to be kept, and some that are to be left out or warned of."""
    train = rows_of(tmp_path / "clips", range(8)).to_list()
    train[2]["audio"] = None
    train[4]["audio"]["bytes"] = b"RIFF"
    train[5]["bpm"] = 9999
    train[6]["audio"]["bytes"] = train[6]["audio"]["bytes"][:5000]
    test = rows_of(tmp_path / "clips", range(8, 12))
    return DatasetDict(train=dataset_of(train), test=test)


def save(splits: DatasetDict, folder: Path, kind: str) -> Path:
    """Write each split in shards."""
    if kind == "arrow":
        splits.save_to_disk(folder, num_shards=SHARDS)
        return folder
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        for number in range(SHARDS[split]):
            name = f"{split}-{number:05}-of-{SHARDS[split]:05}.parquet"
            rows.shard(SHARDS[split], number, contiguous=True).to_parquet(folder / "data" / name)
    return folder


def encode(tracks, folder: Path, pipeline) -> dict[str, bytes]:
    cache = LatentCache(folder, Encoders.of(pipeline))
    cached, problems = prepare_tracks(cache, tracks, max_duration_s=2.0, show_progress=False)
    assert len(cached) == len(tracks) and not problems
    return content(folder)


@KINDS
def test_the_tracks_of_a_bucket_are_those_of_the_folder(splits, tmp_path, s3_folder, fetched, kind):  # noqa: F811
    saved = save(splits, tmp_path / "saved", kind)
    url = put(saved, s3_folder)
    for split, usable in (("train", 5), ("test", 4)):
        fetched.clear()
        streamed, said = read(url, streaming=True, split=split)
        assert len(fetched) == SHARDS[split] and len(streamed) == usable
        local, said_of_folder = read(saved, split=split)
        assert without_audio(streamed) == without_audio(local) and said == said_of_folder
        assert dataset_fingerprint(streamed) == dataset_fingerprint(local)
        assert [track.source for track in streamed] == [track.source for track in local]
    assert {track.genre for track in local} == {"techno", "jazz"} and local[0].tags == "tag 8"
    fetched.clear()
    drawn, _ = read(url, streaming=True, max_train_samples=3, seed=7)
    assert not fetched and without_audio(drawn) == without_audio(read(saved, max_train_samples=3, seed=7)[0])


@KINDS
def test_the_tracks_of_a_repository_are_those_of_the_folder(splits, tmp_path, hub, kind):  # noqa: F811
    saved = save(splits, tmp_path / "repository" / "part", kind)
    (saved / "README.md").write_text("# Music\n")
    hub.add("datasets/tester/music", {"main": tmp_path / "repository"})
    address = "hf://datasets/tester/music/part"
    streamed, said = read(address, streaming=True)
    local, said_of_folder = read(saved)
    assert without_audio(streamed) == without_audio(local) and said == said_of_folder
    before = len(hub.downloads)
    again, _ = read(address, streaming=True)
    assert without_audio(again) == without_audio(local)
    assert not [name for name in hub.downloads[before:] if name.endswith((".parquet", ".arrow"))]


def test_the_latents_are_those_of_the_folder_and_a_second_run_fetches_no_shard(
    tmp_path,
    s3_folder,
    tiny_pipeline,
    fetched,  # noqa: F811
):
    saved = save(DatasetDict(train=rows_of(tmp_path / "clips", range(4))), tmp_path / "saved", "parquet")
    url = put(saved, s3_folder)
    streamed = encode(read(url, streaming=True)[0], tmp_path / "streamed", tiny_pipeline)
    assert len(fetched) == 2 * 4, "once to see what is in it, once to encode it"
    one = encode(read(saved)[0][1:2], tmp_path / "local", tiny_pipeline)
    assert len(one) > 1 and one.items() <= streamed.items()
    fetched.clear()
    assert encode(read(url, streaming=True)[0], tmp_path / "streamed", tiny_pipeline) == streamed and not fetched
    assert not [name for name in content(tmp_path / "cache") if name.endswith((".parquet", ".arrow"))]


@KINDS
def test_few_shards_are_on_the_disk_at_any_time(tmp_path, own_places, s3_folder, tiny_pipeline, monkeypatch, kind):
    rows = rows_of(tmp_path / "clips", range(24), duration_s=30.0)
    monkeypatch.setitem(SHARDS, "train", 12)
    saved = save(DatasetDict(train=rows), tmp_path / "saved", kind)
    url = put(saved, s3_folder)
    shard, seen = 2 * len(rows[0]["audio"]["bytes"]), []

    def measured(function):
        def measure(*arguments, **options):
            result = function(*arguments, **options)
            named = sum(map(len, content(own_places).values()))
            seen.append((named + sum(nameless(own_places).values())) / shard)
            return result

        return measure

    monkeypatch.setattr(remote_folder, "fetch", measured(remote_folder.fetch))
    monkeypatch.setattr(Dataset, "from_parquet", staticmethod(measured(Dataset.from_parquet)))
    tracks, _ = read(url, streaming=True)
    cache = LatentCache(tmp_path / "latents", Encoders.of(tiny_pipeline))
    decoded = map_in_order(cache.decode, tracks, num_workers=DECODING_THREADS)
    assert sum(waveform.shape == (2, 30 * 48_000) for waveform in decoded) == 24
    most = {"arrow": 2, "parquet": 3}[kind]
    assert len(seen) == {"arrow": 24, "parquet": 48}[kind] and min(seen) >= 1 and most - 0.1 < max(seen) < most + 0.1


def test_the_readme_says_which_files_and_what_the_columns_hold(splits, tmp_path, s3_folder, fetched):  # noqa: F811
    saved = tmp_path / "saved"
    (saved / "tracks").mkdir(parents=True)
    bare = Features(splits["train"].features | {"label": Value("int64")})
    splits["train"].cast(bare).to_parquet(saved / "tracks/b.parquet")
    splits["test"].cast(bare).to_parquet(saved / "tracks/a.parquet")
    info = "dataset_info:\n  features:\n  - name: audio\n    dtype: audio\n  - name: caption\n    dtype: string\n"
    info += (
        "  - name: label\n    dtype:\n      class_label:\n        names:\n          '0': folk\n          '1': soul\n"
    )
    info += "  - name: bpm\n    dtype: int32\n  - name: isrc\n    dtype: string\n"
    info += "  - name: sampling_weight\n    dtype: float32\n"
    configs = "configs:\n- config_name: default\n  data_files:\n  - split: test\n    path: tracks/b.parquet\n"
    configs += "  - split: train\n    path: tracks/a.parquet\n"
    (saved / "README.md").write_text(f"---\n{info}{configs}---\n# Music\n")
    streamed, _ = read(put(saved, s3_folder), streaming=True)
    assert without_audio(streamed) == without_audio(read(saved)[0]) and streamed[0].tags == "tag 8"
    assert [track.genre for track in streamed] == ["folk", "soul"] * 2 and len(fetched) == 1


def test_the_first_file_says_what_the_columns_of_all_hold(splits, tmp_path, s3_folder):
    saved = save(splits, tmp_path / "saved", "parquet")
    other = splits["train"].features | {"label": Value("int64"), "bpm": Value("string")}
    for name in ("train-00001-of-00004", "test-00000-of-00002"):
        file = saved / f"data/{name}.parquet"
        Dataset.from_parquet(str(file), cache_dir=str(tmp_path)).cast(Features(other)).to_parquet(file)
    url = put(saved, s3_folder)
    for split in ("test", "train"):
        streamed, said = read(url, streaming=True, split=split)
        local, said_of_folder = read(saved, split=split)
        assert without_audio(streamed) == without_audio(local) and said == said_of_folder
    assert all(track.genre for track in streamed)


@KINDS
def test_rows_that_refer_to_files_are_read_as_locally(tmp_path, s3_folder, kind):
    rows = rows_of(tmp_path / "clips", range(3))
    if kind == "arrow":  # `acestep-lora dataset build --link`
        splits = {"train": list(enumerate(read(tmp_path / "clips")[0]))}
        write_splits(tmp_path / "saved", splits, link=True, advance=lambda size: None)
    else:
        paths = [{"bytes": None, "path": str(tmp_path / f"clips/clip-{number}.wav")} for number in range(3)]
        (tmp_path / "saved").mkdir()
        rows.remove_columns("audio").add_column("audio", paths).to_parquet(tmp_path / "saved/train.parquet")
    (tmp_path / "clips/clip-1.wav").unlink()
    streamed, said = read(put(tmp_path / "saved", s3_folder), streaming=True)
    local, said_of_folder = read(tmp_path / "saved")
    assert without_audio(streamed) == without_audio(local) and said == said_of_folder
    assert [track.audio for track in streamed] == [tmp_path / f"clips/clip-{number}.wav" for number in (0, 2)]


def test_a_release_is_streamed_by_its_names(splits, tmp_path, s3_folder):
    storage.push(save(splits, tmp_path / "saved", "arrow"), f"{s3_folder.url}/music", show_progress=False)
    streamed, _ = read(f"{s3_folder.url}/music", streaming=True, split="test")
    assert without_audio(streamed) == without_audio(read(tmp_path / "saved", split="test")[0])


def test_a_dataset_without_splits_has_the_rows_it_has(splits, tmp_path, s3_folder):
    splits["test"].save_to_disk(tmp_path / "saved", num_shards=2)
    streamed, _ = read(put(tmp_path / "saved", s3_folder), streaming=True)
    assert without_audio(streamed) == without_audio(read(tmp_path / "saved")[0])


@KINDS
def test_held_out_rows_are_streamed_too(splits, tmp_path, s3_folder, kind):
    saved = save(splits, tmp_path / "saved", kind)
    url = put(saved, s3_folder)
    settings = {
        "dataset_name": None, "max_validation_samples": 32, "validation_seed": 0, "min_duration_s": 1.0,
        "max_train_samples": None, "seed": 0, "streaming": True, "show_progress": False,
    }  # fmt: skip
    for data in (None, url):
        train, held, _ = load_train_and_held_out(url, validation_data_dir=data, validation_fraction=0.0, **settings)
        assert (len(train), len(held)) == (5, 4) and held[0].tags == "tag 8"
    with pytest.raises(UsageError, match="leave --validation_fraction away"):
        load_train_and_held_out(url, validation_data_dir=None, validation_fraction=0.3, **settings)


@KINDS
def test_what_is_missing_or_damaged_is_said_in_one_sentence(splits, tmp_path, s3_folder, kind):
    saved = save(splits, tmp_path / "saved", kind)
    url = put(saved, s3_folder)
    for place, streaming in ((url, True), (saved, False)):
        with pytest.raises(UsageError, match=rf"the dataset {place} has no split 'dev' \(it has train, test\)"):
            read(place, streaming=streaming, split="dev")
    shard = sorted(name for name in content(saved) if "train" in name and name.endswith((".parquet", ".arrow")))[2]
    whole = content(saved)[shard]
    s3_folder.put({shard: whole[: len(whole) // 2]})
    said = "can't be loaded" if kind == "parquet" else "is a damaged dataset"
    with pytest.raises(UsageError, match=f"{s3_folder.url}/{shard} {said}") as caught:
        read(url, streaming=True)
    assert "\n" not in str(caught.value)
    place = locate(url, streaming=True)
    s3_folder.put({shard: whole})
    with pytest.raises(RunError, match=f"{shard} changed while it was read"):
        load_tracks(place, show_progress=False)
    if kind == "arrow":
        s3_folder.delete(shard)
        with pytest.raises(UsageError, match=f"is a damaged dataset .{shard} is missing"):
            read(url, streaming=True)


def test_what_cannot_be_streamed_is_refused(splits, tmp_path, s3_folder):
    splits["test"].to_parquet(tmp_path / "saved/a.parquet")
    (tmp_path / "elsewhere.parquet").touch()
    card = tmp_path / "saved/README.md"
    url = f"{s3_folder.url}"
    for settings, reason in (
        ("  data_files: a.parquet\n  columns: [audio, caption]\n", "`columns` or `filters`"),
        ("  data_files: b.parquet\n", "can't be loaded: .*b.parquet"),
        (f"  data_files: {tmp_path}/elsewhere.parquet\n", "names files elsewhere"),
    ):
        card.write_text(f"---\nconfigs:\n- config_name: default\n{settings}---\n")
        put(tmp_path / "saved", s3_folder)
        with pytest.raises(UsageError, match=reason) as caught:
            read(url, streaming=True)
        assert str(tmp_path) not in str(caught.value)
    card.unlink()
    s3_folder.delete("README.md")
    Dataset.from_list([{"tags": "x"}]).to_parquet(tmp_path / "saved/a.parquet")
    put(tmp_path / "saved", s3_folder)
    with pytest.raises(UsageError, match=r"a.parquet has no column 'audio' \(it has tags\)"):
        read(url, streaming=True)


def test_readers_of_the_same_shards_fetch_each_once(splits, tmp_path, s3_folder, fetched):  # noqa: F811
    url = put(save(splits, tmp_path / "saved", "parquet"), s3_folder)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: read(url, streaming=True)[0], range(4)))
    assert all(without_audio(tracks) == without_audio(results[0]) for tracks in results) and len(fetched) == 4
    fetched.clear()
    with ThreadPoolExecutor(8) as pool:
        sources = set(pool.map(lambda track: track.source, results[0][:2] * 20))
    assert sources == {track.source for track in read(tmp_path / "saved")[0][:2]}
    assert len(fetched) == 1, "both are in the first shard, which the last to be read have driven out"


def test_the_cache_command_streams_a_dataset(tmp_path, s3_folder, capsys, monkeypatch):
    monkeypatch.setitem(SHARDS, "train", 2)
    splits = DatasetDict(train=rows_of(tmp_path / "clips", range(2)))
    url = put(save(splits, tmp_path / "saved", "arrow"), s3_folder)
    command = ["cache", "--pretrained_model_name_or_path", "tiny", "--min_duration_s", "1", "--streaming"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--train_data_dir", url])
    assert ended.value.code == 0 and "2 tracks" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_fetch_the_shards_of_their_tracks_and_train_the_same_adapter(tmp_path, hub, monkeypatch):  # noqa: F811
    monkeypatch.setitem(SHARDS, "train", 6)
    saved = save(DatasetDict(train=rows_of(tmp_path / "clips", range(12))), tmp_path / "served/saved", "parquet")
    hub.add("datasets/tester/music", {"main": saved})
    for name, value in {"ENDPOINT": hub.url, "HUB_DISABLE_XET": "1", "HUB_OFFLINE": "0", "HOME": tmp_path}.items():
        monkeypatch.setenv(f"HF_{name}", str(value))
    adapters = []
    for number, (data, streaming) in enumerate((("hf://datasets/tester/music", True), (saved, False))):
        run, steps = tmp_path / f"run-{number}", {"max_train_steps": 2, "max_train_samples": 12, "max_duration_s": 2}
        process = start(data, run, config="ddp.yaml", streaming=streaming, latent_cache_dir=run / "latents", **steps)
        log, _ = process.communicate(timeout=240)
        assert process.returncode == 0, log
        adapters.append((run / "pytorch_lora_weights.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    shards = [name for name in hub.downloads if name.endswith(".parquet")]
    assert len(set(shards)) == 6
    assert len(shards) <= 6 + 6 + 1, "to read all rows once, and to encode; the first may come for its columns, too"
