"""Pulling from S3, against a real server: what arrives is what is there, whole, checked, and never twice."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.paths import cache_dir
from acestep_pipeline.storage import copies as storage
from acestep_pipeline.storage.copies import is_remote, local_copy
from acestep_pipeline.storage.s3 import RemoteFile, open_client, s3_errors
from acestep_pipeline.storage.s3_checksums import is_intact
from acestep_pipeline.storage.s3_downloads import fetch
from acestep_pipeline.storage.s3_listing import PULL_FOLDER, file_names, list_objects
from acestep_pipeline.storage.transfer_progress import UNCOUNTED, Workers
from tests.s3_server import corrupting_proxy


def pull(url, directory, **options) -> Path:
    return storage.pull(url, directory, show_progress=False, **options)


def content(directory: Path) -> dict[str, bytes]:
    found = {}
    for folder, folders, names in os.walk(directory):  # which, unlike rglob, bears folders that go away meanwhile
        folders[:] = [name for name in folders if name != PULL_FOLDER]
        files = [Path(folder, name) for name in names]
        found |= {path.relative_to(directory).as_posix(): path.read_bytes() for path in files if path.is_file()}
    return found


def identities(directory: Path) -> dict[str, tuple]:
    """What changes when a file is written again, even with the same bytes."""
    stats = {name: (directory / name).stat() for name in content(directory)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def noise(name: str, size: int) -> bytes:
    return hashlib.shake_128(name.encode()).digest(size)


FILES = {
    "01 a song.wav": noise("a", 100_000),
    "日本語/🎵 曲.flac": noise("b", 200_000),
    "日本語/🎵 曲.tags.txt": b"jazz, piano",
    "sp ace/a+b%20c&d=é.txt": b"odd",
    "empty.txt": b"",
    "a.b/c.d/deep": b"x",
}


def test_a_folder_arrives_as_it_is(s3_folder, tmp_path):
    s3_folder.put(FILES)
    s3_folder.client.put_object(Bucket=s3_folder.server.bucket, Key=f"{s3_folder.name}2/other", Body=b"a neighbour's")
    s3_folder.client.put_object(Bucket=s3_folder.server.bucket, Key=f"{s3_folder.name}/sp ace/", Body=b"")
    assert pull(s3_folder.url, tmp_path / "copy") == tmp_path / "copy"
    assert content(tmp_path / "copy") == FILES
    pull(s3_folder.url + "/", tmp_path / "with a slash", num_workers=1)
    assert content(tmp_path / "with a slash") == FILES
    pull(f"{s3_folder.url}/日本語", tmp_path / "part")
    assert content(tmp_path / "part") == {"🎵 曲.flac": FILES["日本語/🎵 曲.flac"], "🎵 曲.tags.txt": b"jazz, piano"}
    assert (tmp_path / "copy" / "empty.txt").stat().st_mode == _mode_of_a_new_file(tmp_path)


def _mode_of_a_new_file(folder: Path) -> int:
    (folder / "new").touch()
    return (folder / "new").stat().st_mode


def test_objects_are_listed_with_size_and_etag(s3_folder):
    s3_folder.put({"b": b"12", "a": b"1"})
    listed = list_objects(s3_folder.url)
    assert [(file.key, file.size) for file in listed] == [(f"{s3_folder.name}/a", 1), (f"{s3_folder.name}/b", 2)]
    assert listed[0].etag.strip('"') == hashlib.md5(b"1").hexdigest()


def test_a_second_pull_downloads_nothing(s3_folder, tmp_path):
    s3_folder.put(FILES)
    before = identities(pull(s3_folder.url, tmp_path))
    index = (tmp_path / PULL_FOLDER / "index.json").stat()
    assert identities(pull(s3_folder.url, tmp_path)) == before
    assert (tmp_path / PULL_FOLDER / "index.json").stat().st_ino == index.st_ino
    assert sorted(path.name for path in (tmp_path / PULL_FOLDER).iterdir()) == ["index.json", "lock"]


def test_only_what_changed_is_downloaded_and_what_is_gone_is_removed(s3_folder, tmp_path):
    s3_folder.put(FILES)
    before = identities(pull(s3_folder.url, tmp_path))
    (tmp_path / "a.b" / "mine.txt").write_text("not from the bucket")
    s3_folder.put({"01 a song.wav": noise("c", 100_000), "new/one": b"new", "日本語": b"a file, where a folder was"})
    s3_folder.delete("日本語/🎵 曲.flac", "日本語/🎵 曲.tags.txt", "a.b/c.d/deep")
    after = identities(pull(s3_folder.url, tmp_path))
    kept = {"sp ace/a+b%20c&d=é.txt", "empty.txt"}
    assert {name for name in before if after.get(name) == before[name]} == kept
    assert content(tmp_path) == {
        **{name: FILES[name] for name in kept},
        "01 a song.wav": noise("c", 100_000),
        "new/one": b"new",
        "日本語": b"a file, where a folder was",
        "a.b/mine.txt": b"not from the bucket",
    }
    assert not (tmp_path / "a.b" / "c.d").exists()


def test_a_file_that_was_lost_or_shortened_is_downloaded_again(s3_folder, tmp_path):
    s3_folder.put(FILES)
    pull(s3_folder.url, tmp_path)
    (tmp_path / "a.b/c.d/deep").unlink()
    (tmp_path / "01 a song.wav").write_bytes(b"short")
    assert content(pull(s3_folder.url, tmp_path)) == FILES


def test_three_hundred_small_objects_and_kill_9_in_the_middle(s3_folder, tmp_path):
    files = {f"{number % 7}/{number:03d}.txt": noise(str(number), 1000 + number) for number in range(300)}
    s3_folder.put(files)
    copy = tmp_path / "copy"
    code = f"from acestep_pipeline.storage.copies import pull; pull({s3_folder.url!r}, {str(copy)!r}, num_workers=1)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    while len(content(copy)) < 20:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = content(copy)
    assert 20 <= len(killed) < 300 and killed.items() <= files.items()
    # What had arrived when it was killed is known as the pull's own: gone from the bucket, it goes from the folder.
    s3_folder.delete(min(killed))
    del files[min(killed)]
    assert content(pull(s3_folder.url, copy)) == files
    assert sorted(path.name for path in (copy / PULL_FOLDER).iterdir()) == ["index.json", "lock"]


def test_two_pulls_into_one_folder_wait_for_each_other(s3_folder, tmp_path):
    s3_folder.put(FILES)
    threads = [threading.Thread(target=pull, args=(s3_folder.url, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(tmp_path) == FILES


def test_objects_in_parts_are_fetched_in_parts_and_checked(s3_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("acestep_pipeline.storage.transfer_progress.LARGE_BYTES", 8 << 20)
    whole = noise("large", 20 << 20)
    s3_folder.client.upload_fileobj(io.BytesIO(whole), s3_folder.server.bucket, f"{s3_folder.name}/large.bin")
    (file,) = list_objects(s3_folder.url)
    assert file.etag.strip('"').endswith("-3")
    copy = pull(s3_folder.url, tmp_path) / "large.bin"
    assert copy.read_bytes() == whole
    client = open_client(1)
    assert is_intact(client, s3_folder.server.bucket, file, copy)
    copy.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert not is_intact(client, s3_folder.server.bucket, file, copy)
    copy.write_bytes(whole[:-1])
    assert not is_intact(client, s3_folder.server.bucket, file, copy)


def test_what_arrives_damaged_is_fetched_again_and_given_up_when_it_stays_so(s3_folder, tmp_path, monkeypatch):
    s3_folder.put({"a": b"a song by NOBODY, " * 10})
    with corrupting_proxy(s3_folder.server, b"NOBODY", b"NOBADY", times=2) as (url, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert content(pull(s3_folder.url, tmp_path / "twice"))["a"] == b"a song by NOBODY, " * 10
        assert len(done) == 2
    with corrupting_proxy(s3_folder.server, b"NOBODY", b"NOBADY", times=99) as (url, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(
            RunError, match=f"s3://{s3_folder.server.bucket}/{s3_folder.name}/a arrived damaged 3 times"
        ):
            pull(s3_folder.url, tmp_path / "always")
        assert len(done) == 3 and content(tmp_path / "always") == {}


@pytest.mark.parametrize("large_bytes", [64 << 20, 1])
def test_an_object_that_changes_after_it_was_listed_is_not_taken(s3_folder, tmp_path, monkeypatch, large_bytes):
    monkeypatch.setattr("acestep_pipeline.storage.transfer_progress.LARGE_BYTES", large_bytes)
    s3_folder.put({"x": b"old", "y": b"gone"})
    x, y = list_objects(s3_folder.url)
    s3_folder.put({"x": b"new"})
    s3_folder.delete("y")
    for file, message in ((x, "changed meanwhile|changed while it was read"), (y, "changed while it was read")):
        with pytest.raises(RunError, match=message), s3_errors(s3_folder.url):
            fetch(open_client(1), s3_folder.server.bucket, file, tmp_path / "x", workers=Workers(1), count=UNCOUNTED)


def test_a_full_disk_is_known_before_the_first_byte(s3_folder, tmp_path, monkeypatch):
    s3_folder.put({"x": bytes(2000)})
    monkeypatch.setattr("acestep_pipeline.paths.free_space_bytes", lambda directory: 1000)
    with pytest.raises(UsageError, match="has 0.0 GB free and 0.0 GB are to come; make room"):
        pull(s3_folder.url, tmp_path)


def test_a_location_becomes_a_folder(s3_folder, tmp_path):
    assert is_remote("s3://bucket/x") and not is_remote("/data/s3:/x")
    assert local_copy(str(tmp_path)) == tmp_path and local_copy("~/music") == Path.home() / "music"
    s3_folder.put({"inner/x": b"1", "y": b"2"})
    inner = local_copy(f"{s3_folder.url}/inner", show_progress=False)
    assert inner == cache_dir() / "s3" / s3_folder.server.bucket / s3_folder.name / "inner" and content(inner) == {
        "x": b"1"
    }
    s3_folder.put({"inner/x": b"changed"})
    outer = local_copy(s3_folder.url, show_progress=False)
    assert outer == inner.parent and content(outer) == {"inner/x": b"changed", "y": b"2"}
    s3_folder.delete("inner/x")
    s3_folder.put({"inner/z": b"3"})
    assert content(local_copy(f"{s3_folder.url}/inner", show_progress=False)) == {"z": b"3"}
    assert content(outer) == {"inner/z": b"3", "y": b"2"}


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "a//b", "a/./b", "..", "a\0b", "a/"])
def test_a_key_that_is_no_safe_file_name_is_refused(key):
    with pytest.raises(UsageError, match="is no safe file name; rename the object"):
        file_names("s3://bucket/p", [RemoteFile(f"p/{key}", 1, "e")], "p/")


def test_a_file_and_a_folder_of_one_name_are_refused(s3_folder, tmp_path):
    s3_folder.put({"e/f": b"1", "e/f/g": b"2"})
    with pytest.raises(UsageError, match="e/f is a file and a folder at once"):
        pull(s3_folder.url, tmp_path)


def test_a_name_that_the_file_system_refuses_is_said_in_one_sentence(s3_folder, tmp_path):
    folder = "/".join(["d" * 200] * 3)
    deep = tmp_path / "/".join(["e" * 250] * 15)  # with the key, longer than a path may be (4096 bytes)
    s3_folder.put({f"{folder}/x": b"1"})
    with pytest.raises(UsageError, match="can't be written \\(File name too long\\)"):
        pull(s3_folder.url, deep)


def test_a_link_that_leads_out_of_the_folder_is_refused(s3_folder, tmp_path):
    s3_folder.put({"sub/x": b"1"})
    (tmp_path / "copy").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "copy" / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="sub leads out of .*; remove the link"):
        pull(s3_folder.url, tmp_path / "copy")
    assert list((tmp_path / "outside").iterdir()) == []


def test_files_of_others_are_not_overwritten(s3_folder, tmp_path):
    s3_folder.put({"x": b"theirs"})
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(UsageError, match="x is in the way and not from a pull; name another folder"):
        pull(s3_folder.url, tmp_path)
    assert content(tmp_path) == {"x": b"mine"}


def test_a_folder_is_the_copy_of_one_address(s3_folder, tmp_path):
    s3_folder.put({"one/x": b"1", "two/x": b"2"})
    pull(f"{s3_folder.url}/one", tmp_path)
    with pytest.raises(UsageError, match="holds a copy of s3://.*/one/; name another folder for s3://.*/two/"):
        pull(f"{s3_folder.url}/two", tmp_path)
    (tmp_path / PULL_FOLDER / "index.json").write_text('{"files": [1]}')
    with pytest.raises(UsageError, match="index.json is damaged; delete the folder"):
        pull(f"{s3_folder.url}/one", tmp_path)


def test_an_emptied_folder_is_said_and_takes_nothing_away(s3_folder, tmp_path):
    s3_folder.put({"x": b"1"})
    pull(s3_folder.url, tmp_path)
    s3_folder.delete("x")
    with pytest.raises(UsageError, match=f"{s3_folder.url} holds no files"):
        pull(s3_folder.url, tmp_path)
    assert content(tmp_path) == {"x": b"1"}


@pytest.mark.parametrize(
    ("settings", "url", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "canary-1"}, None, "the credentials are wrong; set AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": "canary-2"}, None, "the credentials are not known at http://127.0.0.1:"),
        ({"AWS_ACCESS_KEY_ID": None}, None, "no credentials \\(NoCredentialsError\\); set AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": None}, None, "no credentials \\(PartialCredentialsError\\)"),
        ({"AWS_PROFILE": "nobody"}, None, "no credentials \\(ProfileNotFound\\)"),
        ({}, "s3://no-such-bucket/x", "s3://no-such-bucket/x: there is no such bucket at http://127.0.0.1:"),
        ({"AWS_ENDPOINT_URL": "http://u:canary-3@127.0.0.1:1"}, None, "http://127.0.0.1:1 can't be reached"),
        ({"AWS_ENDPOINT_URL": "u:canary-4@host"}, None, "AWS_ENDPOINT_URL .* is no address; write http"),
        ({}, "s3://key:canary-5@bucket/x", "s3://bucket/x is not an address; write s3://bucket/folder"),
        ({}, "s3://", "s3:// is not an address"),
    ],
)
def test_what_s3_refuses_is_one_sentence_without_secrets(s3_folder, tmp_path, monkeypatch, settings, url, message):
    s3_folder.put({"x": b"1"})
    for name, value in settings.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    begun = time.monotonic()
    with pytest.raises(UsageError, match=message) as raised:
        pull(url or s3_folder.url, tmp_path / "copy")
    assert time.monotonic() - begun < 15 and not (tmp_path / "copy").exists()
    text = "".join(str(error) for error in (raised.value, raised.value.__cause__) if error)
    assert "canary" not in text and "\n" not in text and text.endswith(".")


def test_missing_boto3_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "botocore", None)  # Python's own way to say that there is no such module
    with pytest.raises(UsageError, match=r"^s3://bucket/x needs boto3: pip install 'ace-step-lora\[s3\]'\.$"):
        pull("s3://bucket/x", tmp_path / "copy")
