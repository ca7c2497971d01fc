"""Reading tracks from folders and datasets: which files, which text wins, what is warned about."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict

from acestep_pipeline.data.tracks import (
    Problem,
    Rights,
    dataset_fingerprint,
    describe_problems,
    find_audio_files,
    load_tracks,
)
from acestep_pipeline.errors import UsageError

NO_TAGS = "it has no tags and trains with an empty caption; describe it in a .tags.txt beside it"


def write_clip(path, *, duration_s=0.5, seed=0):
    """Quiet noise at 8 kHz mono, as WAV whatever the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 0.05, round(8000 * duration_s))
    soundfile.write(os.fsencode(path), noise, 8000, format="WAV")
    return path


def read(source=None, **options):
    return load_tracks(source, show_progress=False, **options)


def read_one(folder):
    """The only track of `folder` and the reasons given about it."""
    (track,), problems = read(folder)
    return track, [problem.reason for problem in problems]


@pytest.fixture
def song(tmp_path):
    return write_clip(tmp_path / "song.wav")


def beside(song, suffix, content):
    path = song.with_name(song.stem + suffix)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# --- Which files


def test_nested_folders_come_in_a_fixed_order_and_hidden_files_do_not(tmp_path):
    for name in ("b/z.wav", "b/a/x.wav", "a.wav", "B.WAV", ".hidden.wav", ".git/x.wav", "b/._z.wav"):
        write_clip(tmp_path / name)
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "notes.txt").write_text("no audio")
    expected = ["B.WAV", "a.wav", "b/a/x.wav", "b/z.wav"]
    assert [path.relative_to(tmp_path).as_posix() for path in find_audio_files(tmp_path)] == expected
    assert [track.id for track in read(tmp_path)[0]] == expected


def test_a_hidden_folder_can_be_the_data_folder(tmp_path):
    write_clip(tmp_path / ".music" / "a.wav")
    assert [track.id for track in read(tmp_path / ".music")[0]] == ["a.wav"]


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    write_clip(tmp_path / "elsewhere" / "a.wav")
    music = tmp_path / "music"
    write_clip(music / "b.wav")
    (music / "album").symlink_to(tmp_path / "elsewhere")
    (music / "loop").symlink_to(music)
    (tmp_path / "elsewhere" / "back").symlink_to(music)
    (music / "self.wav").symlink_to(music / "self.wav")
    (music / "gone.wav").symlink_to(tmp_path / "nothing.wav")
    tracks, problems = read(music)
    assert [track.id for track in tracks] == ["album/a.wav", "b.wav"]
    skipped = {problem.track: problem.reason for problem in problems if problem.skipped}
    assert skipped.keys() == {"gone.wav", "self.wav"}
    assert skipped["gone.wav"] == "the file does not exist"


def test_other_files_are_never_taken_for_a_tracks_text(tmp_path):
    for name in ("a.wav", "b.wav"):
        write_clip(tmp_path / name)
    for name in ("demo.json", "LICENSE.txt", "a.license.txt", "copyright", "README.txt", "aa.tags.txt", "a.v2.json"):
        (tmp_path / name).write_text('{"tags": "wrong", "lyrics": "wrong"}')
    tracks, problems = read(tmp_path)
    assert [(track.tags, track.lyrics, track.genre) for track in tracks] == [("", "[Instrumental]", "")] * 2
    strays = [Problem(name, "it belongs to no audio file here; is it misspelt?", False)
              for name in ("a.v2.json", "aa.tags.txt")]  # fmt: skip
    assert problems == [*strays, *(Problem(name, NO_TAGS, skipped=False) for name in ("a.wav", "b.wav"))]


def test_formats_that_cannot_be_read_are_named_with_the_reason(song):
    beside(song, ".tags.txt", "jazz")
    song.with_name("phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(2000))
    tracks, problems = read(song.parent)
    assert [track.id for track in tracks] == ["song.wav"]
    (line,) = describe_problems(problems)
    assert line.startswith("  skipped  phone.m4a: ") and len(line) > 30


def test_a_directory_that_cannot_be_listed_is_named_and_the_rest_is_read(tmp_path):
    """A path of more than 4096 bytes can't be listed by anyone, not even by root."""
    write_clip(tmp_path / "music" / "a.wav")
    handle = os.open(tmp_path / "music", os.O_RDONLY)
    for _ in range(17):
        os.mkdir("x" * 250, dir_fd=handle)
        inner = os.open("x" * 250, os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)
    tracks, problems = read(tmp_path / "music")
    assert [track.id for track in tracks] == ["a.wav"]
    (skipped,) = (problem for problem in problems if problem.skipped)
    assert skipped.track.startswith("xxx") and skipped.reason == "the directory can't be read (File name too long)"
    (tmp_path / "music" / "a.wav").unlink()
    with pytest.raises(UsageError, match=r"has no audio files \(xxx"):
        read(tmp_path / "music")


def test_any_file_name_is_one_printable_line(tmp_path):
    names = ["größe.wav", "ピアノ 🎹.wav", "two\nlines\t.wav", os.fsdecode(b"latin-\xff.wav"), "x" * 250 + ".wav"]
    for name in names:
        write_clip(tmp_path / name)
    (tmp_path / "ピアノ 🎹.tags.txt").write_text("piano")
    (tmp_path / "two\nlines\t.tags.txt").write_bytes(b"\0")
    tracks, problems = read(tmp_path)
    ids = {track.id: track for track in tracks}
    assert ids.keys() == {
        "größe.wav", "ピアノ 🎹.wav", r"two\nlines\t.wav", r"latin-\udcff.wav", "x" * 250 + ".wav",
    }  # fmt: skip
    assert ids["ピアノ 🎹.wav"].tags == "piano"
    lines = describe_problems(problems)
    assert r"  warning  two\nlines\t.wav: two\nlines\t.tags.txt is not text and is left out" in lines
    assert all(len(line.encode().splitlines()) == 1 for line in lines)


def test_names_that_print_alike_stay_two_tracks(tmp_path):
    write_clip(tmp_path / "a\n.wav", seed=0)
    write_clip(tmp_path / r"a\n.wav", seed=1)
    tracks, _ = read(tmp_path)
    assert [track.id for track in tracks] == [r"a\n.wav", r"a\n.wav (2)"]
    assert tracks[0].sha256 != tracks[1].sha256


def test_short_tracks_are_skipped(tmp_path):
    for index, duration_s in enumerate((0.5, 3.0, 2.0, 2.5)):
        write_clip(tmp_path / f"{index}.wav", duration_s=duration_s)
    tracks, problems = read(tmp_path, min_duration_s=2.0)
    assert [track.id for track in tracks] == ["1.wav", "2.wav", "3.wav"]
    (skipped,) = (problem for problem in problems if problem.skipped)
    assert skipped == Problem("0.wav", "it is 0.5 s long, shorter than the 2 s asked for", skipped=True)


def test_the_summary_puts_skipped_tracks_first_and_ends_somewhere():
    problems = [Problem(f"{index}.wav", "odd", skipped=index == 99) for index in range(100)]
    lines = describe_problems(problems)
    assert lines[0] == "  skipped  99.wav: odd"
    assert len(lines) == 41 and lines[-1] == "  … and 60 more"


@pytest.mark.parametrize("source", ["nowhere", "song.wav"])
def test_what_is_no_folder_is_refused(song, source):
    with pytest.raises(UsageError, match=f"{source} is not a folder; name one that holds audio"):
        read(song.parent / source)


def test_a_folder_on_s3_is_read_from_its_copy(song, s3_folder):
    s3_folder.put({"a/song.wav": song.read_bytes(), "a/song.tags.txt": b"far, away"})
    tracks, problems = read(s3_folder.url)
    assert [(track.id, track.tags) for track in tracks] == [("a/song.wav", "far, away")] and not problems


# --- Datasets


def row(song, **fields):
    return {"audio": {"bytes": song.read_bytes(), "path": song.name}, **fields}


def dataset_of(rows):
    return Dataset.from_list(rows).cast_column("audio", Audio(decode=False))


@pytest.fixture
def folder(tmp_path):
    """Two tracks with all their text, and the same as rows of a dataset."""
    first, second = (write_clip(tmp_path / "music" / f"{name}.wav", seed=index) for index, name in enumerate("ab"))
    beside(first, ".json", json.dumps({
        "genre": "jazz", "bpm": 120, "keyscale": "C major", "timesignature": "4/4", "title": "One", "artist": "Ann",
        "copyright": "Ann Ltd", "isrc": "DE-A12-24-00001", "licence": "CC0", "url": "https://example.org",
    }))  # fmt: skip
    beside(first, ".tags.txt", "jazz, piano")
    beside(second, ".json", json.dumps({
        "tags": ["folk", "voice"], "machine_made": ["bpm"], "sampling_weight": 0.5, "repeats": 3, "custom_tag": "zzz",
        "tag_position": "append",
    }))  # fmt: skip
    beside(second, ".lyrics.txt", "[verse]\nWe walked along the river in the evening light\nand never came back home")
    return tmp_path / "music"


@pytest.fixture
def rows(folder):
    """What a dataset built from the folder holds: the columns of each track."""
    tracks, _ = read(folder)
    columns = ("id", "tags", "lyrics", "language", "genre", "bpm", "keyscale", "timesignature", "sampling_weight",
               "repeats", "trigger_word", "trigger_position")  # fmt: skip
    return [
        row(track.audio, **{name: getattr(track, name) for name in columns}, machine_made=list(track.machine_made),
            **vars(track.rights))
        for track in tracks
    ]  # fmt: skip


def test_the_folder_says_all_there_is_to_know(folder):
    (first, second), problems = read(folder)
    assert not problems
    assert first.rights == Rights("One", "Ann", "Ann Ltd", "DEA122400001", "CC0", "https://example.org")
    assert (second.rights, second.sampling_weight, second.repeats) == (Rights(), 0.5, 3)
    assert (second.tags, second.trigger_word, second.trigger_position) == ("folk, voice", "zzz", "append")
    assert (second.language, second.machine_made) == ("en", ("bpm", "language"))


def without_audio(tracks):
    return [{name: value for name, value in vars(track).items() if name != "audio"} for track in tracks]


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict", "parquet"])
def test_a_dataset_gives_the_same_tracks_as_the_folder(folder, rows, tmp_path, kind):
    dataset, saved = dataset_of(rows), tmp_path / "dataset"
    if kind == "parquet":
        saved.mkdir()
        dataset.to_parquet(saved / "train.parquet")
        tracks, problems = read(dataset_name=str(saved))
    else:
        (dataset if kind == "Dataset" else DatasetDict({"train": dataset})).save_to_disk(saved)
        tracks, problems = read(saved)
    expected, _ = read(folder)
    assert without_audio(tracks) == without_audio(expected)
    assert not problems
    assert tracks[1].source == (folder / "b.wav").read_bytes()
    assert dataset_fingerprint(tracks) == dataset_fingerprint(expected)


def test_dataset_columns_may_be_lists_paths_and_other_names(song, tmp_path):
    dataset = Dataset.from_list([{"audio": str(song), "caption": ["jazz", "piano"], "lyrics": ["one", "two"]}])
    dataset.save_to_disk(tmp_path / "dataset")
    ((track,), problems) = read(tmp_path / "dataset")
    assert (track.tags, track.lyrics, track.audio, problems) == ("jazz, piano", "one\ntwo", song, [])


def test_rows_of_one_id_stay_two_tracks(song, tmp_path):
    dataset_of([row(song, id="x", tags="jazz"), row(song, id="x", tags="folk")]).save_to_disk(tmp_path / "dataset")
    tracks, _ = read(tmp_path / "dataset")
    assert [(track.id, track.tags) for track in tracks] == [("x", "jazz"), ("x (2)", "folk")]


def test_a_row_without_usable_audio_is_skipped_by_name(song, tmp_path):
    rows = [row(song, id="good", tags="jazz"), {"audio": {"bytes": b"RIFF", "path": None}, "id": "cut", "tags": "x"},
            {"audio": None, "id": "none", "tags": "x"}]  # fmt: skip
    dataset_of(rows).save_to_disk(tmp_path / "dataset")
    tracks, problems = read(tmp_path / "dataset")
    assert [track.id for track in tracks] == ["good"]
    assert [(problem.track, problem.skipped) for problem in problems] == [("cut", True), ("none", True)]
    assert problems[1].reason == "the file is empty"


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"tags": "x"}, "no column 'audio' .it has tags"),
        ({"audio": 5, "tags": "x"}, "column 'audio' .* holds no audio"),
    ],
)
def test_a_dataset_without_audio_is_refused(tmp_path, columns, reason):
    Dataset.from_list([columns]).save_to_disk(tmp_path / "dataset")
    with pytest.raises(UsageError, match=reason):
        read(tmp_path / "dataset")


def test_a_dataset_without_a_training_split_is_refused(rows, tmp_path):
    DatasetDict({"test": dataset_of(rows)}).save_to_disk(tmp_path / "dataset")
    with pytest.raises(UsageError, match=r"no split 'train' \(it has test\)"):
        read(tmp_path / "dataset")


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "state"])
def test_a_damaged_dataset_is_refused_in_one_line(rows, tmp_path, damage):
    saved = tmp_path / "dataset"
    dataset_of(rows).save_to_disk(saved)
    (arrow,) = saved.glob("*.arrow")
    if damage == "cut":
        os.truncate(arrow, arrow.stat().st_size // 2)
    elif damage == "empty":
        os.truncate(arrow, 0)
    elif damage == "missing":
        arrow.unlink()
    else:
        (saved / "state.json").write_text("{")
    with pytest.raises(UsageError, match="is a damaged dataset .*build it again") as caught:
        read(saved)
    assert "\n" not in str(caught.value)


def test_a_dataset_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--dataset_name nobody/nothing can't be loaded"):
        read(dataset_name="nobody/nothing")
    with pytest.raises(UsageError, match="can't be loaded"):
        read(dataset_name=str(tmp_path))


# --- Fingerprint


def test_the_fingerprint_is_of_the_data_not_of_its_place(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    original = dataset_fingerprint(read(folder)[0])
    assert dataset_fingerprint(read(tmp_path / "copy")[0]) == original
    assert dataset_fingerprint(read(folder)[0][::-1]) == original
    changes = (
        ("a.tags.txt", "jazz, guitar"),
        ("b.json", '{"tags": "folk, voice", "lyrics": "other"}'),
        ("a.json", '{"repeats": 2}'),
        ("a.json", '{"trigger_word": "zzz"}'),
    )
    for name, content in changes:
        shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True)
        (tmp_path / "changed" / name).write_text(content)
        assert dataset_fingerprint(read(tmp_path / "changed")[0]) != original
    shutil.copytree(folder, tmp_path / "other")
    write_clip(tmp_path / "other" / "a.wav", seed=9)
    assert dataset_fingerprint(read(tmp_path / "other")[0]) != original


def test_a_sample_is_drawn_by_the_seed_and_keeps_the_order(demo_dir):
    """`max_train_samples` takes tracks from everywhere in a folder, not the first ones of its alphabet."""
    everything = [track.id for track in load_tracks(demo_dir, show_progress=False)[0]]
    drawn = {
        seed: [track.id for track in load_tracks(demo_dir, max_train_samples=3, seed=seed, show_progress=False)[0]]
        for seed in range(12)
    }
    assert all(len(ids) == 3 and ids == sorted(ids, key=everything.index) for ids in drawn.values())
    assert {track for ids in drawn.values() for track in ids} == set(everything)
    again = load_tracks(demo_dir, max_train_samples=3, seed=5, show_progress=False)[0]
    assert [track.id for track in again] == drawn[5]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_describes_the_folder_and_sidecars_overrule_it(tmp_path, kind):
    for name in ("a.wav", "b.wav", "deep/c.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_clip(tmp_path / name)
    rows = [
        {"file_name": "a.wav", "tags": "jazz, piano", "bpm": "120", "lyrics": "[verse]\none, two"},
        {"file_name": "deep/c.wav", "tags": "metal", "bpm": "", "lyrics": ""},
        {"file_name": "a.wav", "tags": "again", "bpm": "", "lyrics": ""},
        {"file_name": "gone.mp3", "tags": "x", "bpm": "", "lyrics": ""},
        {"file_name": "", "tags": "nameless", "bpm": "", "lyrics": ""},
    ]
    path = tmp_path / f"metadata.{kind}"
    if kind == "csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:  # as spreadsheets write it
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n{not json\n")
    (tmp_path / "deep" / "c.tags.txt").write_text("folk")
    tracks, problems = read(tmp_path)
    assert [(track.id, track.tags, track.bpm) for track in tracks] == [
        ("a.wav", "jazz, piano", 120),
        ("b.wav", "", None),
        ("deep/c.wav", "folk", None),
    ]
    assert tracks[0].lyrics == "[verse]\none, two"
    said = {f"{problem.track}: {problem.reason}" for problem in problems}
    assert f"{path.name}: line {5 if kind == 'csv' else 3} names a.wav again; the first row counts" in said
    assert "gone.mp3: it is in the folder's table but not there" in said
    nameless = [line for line in said if "is not a row with a file_name" in line]
    assert len(nameless) == (1 if kind == "csv" else 2)
    assert not any(problem.skipped for problem in problems)


def test_a_table_that_is_no_table_is_a_warning(tmp_path):
    write_clip(tmp_path / "a.wav")
    for content in (b"\xff\xfe\x00", b'file_name,tags\n"a.wav,' + b"x" * 200_000, b"no,such,columns\n1,2,3\n"):
        (tmp_path / "metadata.csv").write_bytes(content)
        tracks, problems = read(tmp_path)
        assert len(tracks) == 1 and any(problem.track == "metadata.csv" for problem in problems), content[:20]
