"""`storage.sync` between folders and repositories of the Hub, and the limit of the rate of all that goes there."""

import hashlib
import time

import pytest
from huggingface_hub import constants, get_session
from huggingface_hub.utils import close_session

from acestep_pipeline import storage
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.storage import hub_sync
from acestep_pipeline.storage.hub_rate import check_limited_sizes, hub_rate
from tests.test_hub import hub  # noqa: F401 - a fixture
from tests.test_hub import storage as command
from tests.test_publishing import push, write
from tests.test_storage import content, noise

ADDRESS = "hf://datasets/tester/music"
NAME = "datasets/tester/music"
MUSIC = {
    "01 a song.wav": noise("a", 50_000),
    "deep/er/🎵 曲.flac": noise("b", 30_000),
    "notes.txt": b"my notes",
    "manifest.json": b"{}",
    "empty.txt": b"",
}


def sync(source, target, **options):
    return storage.sync(source, target, show_progress=False, **options)


def published(served, name=NAME):
    return {path: data for path, data in served.files(name).items() if not path.startswith(".")}


@pytest.fixture
def music(tmp_path):
    return write(tmp_path / "music", MUSIC | {".env": b"HF_TOKEN=canary", ".git/config": b"x"})


def test_what_differs_is_one_commit_and_nothing_else_is_sent(hub, music):  # noqa: F811
    report = sync(music, ADDRESS, dry_run=True)
    assert (sorted(report.sent), NAME in hub.repositories) == (sorted(MUSIC), False)
    report = sync(music, ADDRESS)
    assert sorted(report.sent) == sorted(MUSIC) and report.sent_bytes == sum(map(len, MUSIC.values()))
    repository = hub.repositories[NAME]
    assert published(hub) == MUSIC and repository.private and len(repository.log) == 2
    assert not [path for path in hub.files(NAME) if "env" in path or ".git/" in path]

    again = sync(music, ADDRESS)
    assert (again.sent, again.num_unchanged, len(repository.log)) == ((), len(MUSIC), 2)
    sent = list(hub.uploads)
    write(music, {"notes.txt": b"my nodes", "02 new.wav": noise("c", 20_000)})
    (music / "empty.txt").unlink()
    report = sync(music, ADDRESS)
    assert report.sent == ("02 new.wav", "notes.txt") and not report.removed and "empty.txt" in published(hub)
    assert hub.uploads[len(sent) :] == [hashlib.sha256(noise("c", 20_000)).hexdigest()]
    report = sync(music, ADDRESS, delete=True)
    assert (report.sent, report.removed, len(repository.log)) == ((), ("empty.txt",), 4)
    assert "empty.txt" not in published(hub) and ".gitattributes" in hub.files(NAME)


def test_what_differs_is_fetched_and_checked_and_nothing_else(hub, music, tmp_path):  # noqa: F811
    sync(music, ADDRESS)
    copy = tmp_path / "copy"
    assert len(sync(ADDRESS, copy, dry_run=True).sent) == len(MUSIC) and not copy.exists()
    assert sorted(sync(ADDRESS, copy).sent) == sorted(MUSIC) and content(copy) == MUSIC
    before = len(hub.downloads)
    assert not sync(ADDRESS, copy).sent and len(hub.downloads) == before
    write(copy, {"notes.txt": b"MY notes", "mine/own.txt": b"1", ".hidden": b"2"})
    report = sync(ADDRESS, copy)
    assert report.sent == ("notes.txt",) and hub.downloads[before:] == [f"{NAME}/notes.txt"]
    assert content(copy) == MUSIC | {"mine/own.txt": b"1", ".hidden": b"2"}
    assert sync(ADDRESS, copy, delete=True).removed == ("mine/own.txt",) and not (copy / "mine").exists()
    assert content(copy) == MUSIC | {".hidden": b"2"}


def test_folders_and_branches_of_a_repository(hub, music, tmp_path):  # noqa: F811
    sync(music, f"{ADDRESS}/some/part")
    assert published(hub) == {f"some/part/{name}": data for name, data in MUSIC.items()}
    write(music, {"notes.txt": b"other notes"})
    assert sync(music, f"{ADDRESS}@trial/some/part", dry_run=True).sent == ("notes.txt",)
    assert sync(music, f"{ADDRESS}@trial/some/part").sent == ("notes.txt",)
    assert published(hub)["some/part/notes.txt"] == b"my notes"
    assert sync(f"{ADDRESS}@trial/some", tmp_path / "copy").num_unchanged == 0
    assert (tmp_path / "copy/part/notes.txt").read_bytes() == b"other notes"


def test_a_release_in_a_folder_becomes_plain_files(hub, music, tmp_path):  # noqa: F811
    (music / "manifest.json").unlink()
    push(music, tmp_path / "shelf")
    sync(tmp_path / "shelf", ADDRESS)
    assert published(hub) == {name: data for name, data in MUSIC.items() if name != "manifest.json"}
    assert not sync(tmp_path / "shelf", ADDRESS).sent
    with pytest.raises(UsageError, match="holds releases; sync to another folder"):
        sync(ADDRESS, tmp_path / "shelf")


def test_the_command(hub, music, tmp_path, capfd):  # noqa: F811
    status, out, err = command(capfd, "sync", music, ADDRESS, "--dry-run")
    assert status == 0 and "would send notes.txt" in out, err
    status, out, err = command(capfd, "sync", music, ADDRESS)
    assert status == 0 and f"{ADDRESS}: 5 files of 0.1 MB sent, 0 unchanged, 0 removed" in out, err
    status, out, err = command(capfd, "sync", ADDRESS, tmp_path / "copy", "--delete", "--checksum")
    assert status == 0 and "5 files of 0.1 MB sent" in out and content(tmp_path / "copy") == MUSIC, err


def test_what_cannot_be_synced_is_one_sentence(hub, music, tmp_path, capfd, monkeypatch):  # noqa: F811
    hub.add("somebody/else", {"main": music})
    (tmp_path / "empty").mkdir()
    write(tmp_path / "odd", {"a\nb": b"1"})
    wrong = {
        ("s3://bucket/music", ADDRESS): "sync to a folder, and from there to the other",
        (ADDRESS, "hf://tester/other"): "sync to a folder, and from there to the other",
        (tmp_path / "empty", ADDRESS): "holds no files",
        (tmp_path / "odd", ADDRESS): "no safe file name",
        ("hf://tester/never", tmp_path / "x"): "no model 'tester/never'",
        ("hf://somebody/else/nowhere", tmp_path / "x"): "correct the folder's name",
        (music, "hf://somebody/else"): "may not write there (403)",
    }
    for (source, target), said in wrong.items():
        status, _, err = command(capfd, "sync", source, target)
        assert status == 2 and said in err and err.count("\n") == 0, err
    assert not (tmp_path / "x").exists() and NAME not in hub.repositories
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    status, _, err = command(capfd, "sync", music, ADDRESS)
    assert status == 2 and "may not write" in err


def test_another_commit_meanwhile_is_not_overwritten(hub, music, tmp_path, monkeypatch):  # noqa: F811
    sync(music, ADDRESS)
    write(music, {"notes.txt": b"mine"})
    other = write(tmp_path / "other", {"notes.txt": b"theirs"})
    look_up = hub_sync.list_repository

    def late(address):
        listing = look_up(address)
        monkeypatch.setattr(hub_sync, "list_repository", look_up)
        sync(other, ADDRESS)
        return listing

    monkeypatch.setattr(hub_sync, "list_repository", late)
    with pytest.raises(RunError, match="another commit came first"):
        sync(music, ADDRESS)
    assert published(hub)["notes.txt"] == b"theirs"


def test_a_file_that_arrives_damaged_is_not_kept(hub, music, tmp_path):  # noqa: F811
    sync(music, ADDRESS)
    repository = hub.repositories[NAME]
    file = repository.commits[repository.find("main")]["01 a song.wav"]
    size, modified = file.stat().st_size, file.stat().st_mtime_ns
    from tests import hub_server

    digests = hub_server._digests(file, size, modified)
    file.write_bytes(bytes(size))
    hub_server._digests.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_server, "_digests", lambda path, *rest: digests if path == file else _real(path, *rest))
        with pytest.raises(RunError, match="01 a song.wav arrived with another hash"):
            sync(ADDRESS, tmp_path / "copy")
    assert "01 a song.wav" not in content(tmp_path / "copy")


def _real(path, *rest):
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# --- the limit of the rate -------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path):
    return write(tmp_path / "large", {f"{number}.wav": noise(str(number), 200_000) for number in range(3)})


def test_sending_and_fetching_keep_to_a_rate(hub, large, tmp_path, capfd, monkeypatch):  # noqa: F811
    """600 kB at 600 kB/s, by several requests at a time: the first block of each goes at once."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    begun = time.monotonic()
    assert command(capfd, "sync", large, ADDRESS, "--max_bandwidth", "600kB/s")[0] == 0
    sent_s, begun = time.monotonic() - begun, time.monotonic()
    assert command(capfd, "sync", ADDRESS, tmp_path / "copy", "--max_bandwidth", "600kB/s")[0] == 0
    fetched_s, begun = time.monotonic() - begun, time.monotonic()
    assert command(capfd, "pull", ADDRESS, tmp_path / "pulled", "--max_bandwidth", "600kB/s")[0] == 0
    pulled_s = time.monotonic() - begun
    assert content(tmp_path / "copy") == content(large) == published(hub)
    assert min(sent_s, fetched_s, pulled_s) > 0.9
    assert constants.HF_HUB_DISABLE_XET is False, "as it was"


def test_the_rate_is_that_of_every_client_that_the_library_opens_and_ends_with_the_context(hub, large):  # noqa: F811
    sync(large, ADDRESS)
    url = f"{hub.url}/{NAME}/resolve/main/0.wav"
    with hub_rate(400_000):
        assert constants.HF_HUB_DISABLE_XET
        close_session()  # as the library does after some failures
        begun = time.monotonic()
        assert len(get_session().get(url, headers={"Authorization": "Bearer hf_write"}).content) == 200_000
        assert time.monotonic() - begun > 0.3
    assert not get_session().event_hooks["response"]


def test_a_push_keeps_to_the_rate(hub, large, capfd):  # noqa: F811
    begun = time.monotonic()
    assert command(capfd, "push", large, "--to", ADDRESS, "--max_bandwidth", "600kB/s")[0] == 0
    assert time.monotonic() - begun > 0.9 and len(published(hub)) == 3


def test_what_goes_by_xet_alone_can_have_no_limit():
    check_limited_sizes({"a.wav": 60 * 10**9}, None)
    with pytest.raises(UsageError, match="a.wav has 60 GB, which the Hub sends by Xet alone"):
        check_limited_sizes({"a.wav": 60 * 10**9}, 1e6)
