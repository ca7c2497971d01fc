"""`storage.sync` and the rest of the one interface, against a real S3 server and the real AWS CLI."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from acestep_pipeline import storage
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.storage.folder_sync import SYNC_FOLDER
from acestep_pipeline.storage.release_manifest import MANIFEST_NAME
from tests.s3_server import corrupting_proxy
from tests.test_publishing import FILES, push, write
from tests.test_storage import content, identities, noise
from tests.test_storage_command import storage as command


def sync(source, target, **options):
    return storage.sync(source, target, show_progress=False, **options)


def aws(*arguments) -> str:
    """What the real AWS CLI prints, run on the test's server."""
    program = shutil.which("aws", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "the program `aws` is missing: pip install awscli"
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def older(directory: Path, seconds: float = 3600) -> Path:
    """The folder, its files last changed a while ago."""
    for name in content(directory):
        then = time.time() - seconds
        os.utime(directory / name, (then, then))
    return directory


@pytest.fixture(params=["folder to s3", "s3 to folder", "folder to folder", "s3 to s3"])
def pair(request, s3_folder, tmp_path):
    """Two places, and how to read the second and change the first."""
    kinds = request.param.split(" to ")
    source = f"{s3_folder.url}/source" if kinds[0] == "s3" else str(tmp_path / "source")
    target = f"{s3_folder.url}/target" if kinds[1] == "s3" else str(tmp_path / "target")

    def put(files, place=source):
        if place.startswith("s3"):
            s3_folder.put({f"{place.rpartition('/')[2]}/{name}": data for name, data in files.items()})
        else:
            write(Path(place), files)

    def remove(name, place=source):
        s3_folder.delete(f"source/{name}") if place.startswith("s3") else Path(place, name).unlink()

    def files(place=target):
        if not place.startswith("s3"):
            return content(Path(place))
        return {file.key: storage.open(f"{place}/{file.key}").read() for file in storage.list(place)}

    return source, target, put, remove, files


def test_only_what_differs_travels_whatever_the_kinds(pair):
    source, target, put, remove, files = pair
    put(FILES)
    assert not storage.exists(target)
    assert (len(sync(source, target, dry_run=True).sent), files()) == (len(FILES), {})
    report = sync(source, target)
    assert sorted(report.sent) == sorted(FILES) and report.sent_bytes == sum(map(len, FILES.values()))
    assert files() == FILES and storage.exists(target)
    again = sync(source, target)
    assert (again.sent, again.num_unchanged, again.sent_bytes) == ((), len(FILES), 0)
    assert not sync(source, target, compare_content=True).sent
    put({"README.md": b"# cark", "new/one": b"1"})  # the first is as long as it was
    remove("empty.txt")
    put({"theirs.txt": b"not in the source"}, target)
    assert sorted(sync(source, target).sent) == ["README.md", "new/one"]
    assert "empty.txt" in files() and "theirs.txt" in files()
    assert sync(source, target, delete=True, dry_run=True).removed == ("empty.txt", "theirs.txt")
    assert "empty.txt" in files()
    assert sync(source, target, delete=True).removed == ("empty.txt", "theirs.txt")
    assert files() == files(source)


def test_identical_content_is_never_sent_twice_and_an_equal_time_hides_no_change(s3_folder, tmp_path):
    folder = write(tmp_path / "a", FILES)
    sync(folder, s3_folder.url)
    for name in content(folder):
        (folder / name).touch()
    assert sync(folder, s3_folder.url).sent == ()
    copy = tmp_path / "b"
    sync(s3_folder.url, copy)
    before = identities(copy)
    assert sync(s3_folder.url, copy).sent == () and identities(copy) == before
    then = (copy / "README.md").stat()
    (copy / "README.md").write_bytes(b"# mine")
    assert sync(s3_folder.url, copy).sent == ("README.md",) and content(copy) == FILES
    (copy / "README.md").write_bytes(b"# mine")
    os.utime(copy / "README.md", ns=(then.st_mtime_ns, then.st_mtime_ns))
    assert sync(s3_folder.url, copy, compare_content=True).sent == ("README.md",) and content(copy) == FILES


def test_a_clock_that_is_behind_hides_no_change(s3_folder, tmp_path, monkeypatch):
    """The file is changed after it was sent, but this machine's clock, ten minutes behind, gives it an older time."""
    folder = write(tmp_path / "a", {"x": b"1"})
    sync(folder, s3_folder.url)
    (folder / "x").write_bytes(b"2")
    real = time.time
    monkeypatch.setattr("acestep_pipeline.storage.s3_store.time.time", lambda: real() - 600)
    os.utime(folder / "x", (real() - 590, real() - 590))
    assert sync(folder, s3_folder.url).sent == ("x",)


def test_the_aws_cli_and_sync_take_each_others_work_as_done(s3_folder, tmp_path):
    files = FILES | {"big": noise("big", 9 << 20)}  # in parts, to the CLI
    ours = older(write(tmp_path / "ours", files))
    sync(ours, f"{s3_folder.url}/ours")
    assert aws("s3", "sync", ours, f"{s3_folder.url}/ours") == ""
    aws("s3", "sync", f"{s3_folder.url}/ours", tmp_path / "their copy", "--no-progress")
    assert content(tmp_path / "their copy") == files
    assert sync(f"{s3_folder.url}/ours", tmp_path / "their copy").sent == ()
    # SeaweedFS 4.48 keeps the CLI waiting for a minute when it sends an empty file and one in parts at a time.
    files = {name: data for name, data in files.items() if data}
    theirs = older(write(tmp_path / "theirs", files))
    aws("s3", "sync", theirs, f"{s3_folder.url}/theirs", "--no-progress")
    assert sync(theirs, f"{s3_folder.url}/theirs").sent == ()
    for name in files:
        (theirs / name).touch()  # the times tell no more: checksums do, those of the CLI's parts too
    assert sync(theirs, f"{s3_folder.url}/theirs").sent == ()
    sync(f"{s3_folder.url}/theirs", tmp_path / "our copy")
    assert content(tmp_path / "our copy") == files
    assert aws("s3", "sync", f"{s3_folder.url}/theirs", tmp_path / "our copy") == ""


def test_a_release_in_a_folder_becomes_plain_files_on_s3(s3_folder, tmp_path):
    run = write(tmp_path / "run", FILES)
    push(run, tmp_path / "shelf")
    assert sorted(sync(tmp_path / "shelf", s3_folder.url).sent) == sorted(FILES)
    there = {file.key: storage.open(f"{s3_folder.url}/{file.key}").read() for file in storage.list(s3_folder.url)}
    assert there == FILES
    assert sync(tmp_path / "shelf", s3_folder.url).sent == ()
    write(run, {"README.md": b"# cark"})
    push(run, tmp_path / "shelf", force=True)
    assert sync(tmp_path / "shelf", s3_folder.url).sent == ("README.md",)


def test_a_release_becomes_plain_files_for_whoever_has_the_aws_cli_alone(s3_folder, tmp_path):
    run = write(tmp_path / "run", FILES)
    release = f"{s3_folder.url}/lora/jazz"
    assert storage.push(run, release, version="v1", show_progress=False) == "v1"
    assert {file.key for file in storage.list(release)} == FILES.keys()
    assert sorted(sync(release, f"{s3_folder.url}/plain").sent) == sorted(FILES)
    aws("s3", "sync", f"{s3_folder.url}/plain", tmp_path / "adapter", "--no-progress")
    assert content(tmp_path / "adapter") == FILES
    assert sync(release, tmp_path / "adapter").sent == () and sync(release, f"{s3_folder.url}/plain").sent == ()
    write(run, {"README.md": b"# cark"})
    push(run, release, force=True)
    assert sync(release, tmp_path / "adapter").sent == ("README.md",)
    assert sync(release, f"{s3_folder.url}/plain").sent == ("README.md",)
    with pytest.raises(UsageError, match="holds releases; add one with `acestep-lora storage push`"):
        sync(run, release)
    pulled = storage.pull(release, tmp_path / "pulled", show_progress=False)
    assert {name: data for name, data in content(pulled).items() if name != MANIFEST_NAME} == content(run)
    sync(pulled, f"{s3_folder.url}/plain")  # its manifest goes along
    assert storage.pull(f"{s3_folder.url}/plain", tmp_path / "again", show_progress=False)
    assert content(tmp_path / "again") == content(pulled)


def test_files_are_listed_found_and_opened_wherever_they_lie(s3_folder, tmp_path):
    for place in (s3_folder.url, str(tmp_path / "shelf")):
        push(write(tmp_path / "run", FILES), f"{place}/lora/x")
        assert [file.key for file in storage.list(f"{place}/lora/x")] == sorted(FILES)
        assert storage.open(f"{place}/lora/x/samples/copy.wav").read() == FILES["samples/copy.wav"]
        assert storage.open(f"{place}/lora/x/{MANIFEST_NAME}").read(1) == b"{"
        assert storage.exists(f"{place}/lora/x/README.md") and storage.exists(f"{place}/lora")
        assert not storage.exists(f"{place}/lora/x/nothing") and not storage.exists(f"{place}/nothing")
        assert storage.list(f"{place}/nothing") == []
        with pytest.raises(UsageError, match="nothing is no file that is there"):
            storage.open(f"{place}/lora/x/nothing")
    with storage.open(tmp_path / "run" / "README.md") as file:
        assert file.read() == b"# card"
    for use in (storage.list, storage.exists, storage.open):
        with pytest.raises(UsageError, match="gs:// can't be read or written; give a folder, s3://"):
            use("gs://bucket/x")


def test_what_arrives_damaged_is_not_taken(s3_folder, tmp_path, monkeypatch):
    s3_folder.put({"a": b"a song by NOBODY, " * 10})
    with corrupting_proxy(s3_folder.server, b"NOBODY", b"NOBADY", times=99) as (url, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(RunError, match="arrived damaged 3 times"):
            sync(s3_folder.url, tmp_path / "copy")
        with pytest.raises(RunError, match="arrived damaged 3 times"):
            storage.open(f"{s3_folder.url}/a")
    assert content(tmp_path / "copy").keys() <= {f"{SYNC_FOLDER}/lock"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_folder.server.url)
    sync(s3_folder.url, tmp_path / "copy")
    assert content(tmp_path / "copy") == {"a": b"a song by NOBODY, " * 10}


@pytest.mark.parametrize("name", ["a\nb", "aux.txt", "x\x7f"])
def test_names_that_are_safe_nowhere_are_refused_in_both_directions(name, s3_folder, tmp_path):
    s3_folder.put({"theirs/" + name: b"1"})
    with pytest.raises(UsageError, match="is no safe file name"):
        sync(f"{s3_folder.url}/theirs", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(UsageError, match="is no safe file name"):
        sync(write(tmp_path / "ours", {name: b"1"}), f"{s3_folder.url}/ours")
    assert storage.list(f"{s3_folder.url}/ours") == []


def test_links_are_not_followed_out_of_a_folder(s3_folder, tmp_path):
    s3_folder.put({"sub/x": b"1"})
    outside = write(tmp_path / "outside", {"x": b"mine"})
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "sub").symlink_to(outside)
    with pytest.raises(UsageError, match="sub is no file"):
        sync(s3_folder.url, tmp_path / "copy", delete=True)
    (tmp_path / "copy" / "sub").unlink()
    (tmp_path / "copy" / "sub").mkdir()
    (tmp_path / "copy" / "sub" / "x").symlink_to(outside / "x")
    sync(s3_folder.url, tmp_path / "copy")
    assert content(outside) == {"x": b"mine"} and content(tmp_path / "copy") == {"sub/x": b"1"}


def test_what_sync_refuses_is_one_sentence(s3_folder, tmp_path, capfd, monkeypatch):
    a = write(tmp_path / "a", {"x": b"1"})
    for source, target, said in (
        (tmp_path / "none", s3_folder.url, "none holds no files"),
        (a, a / "b", "lie one within the other"),
        (s3_folder.url, f"{s3_folder.url}/b", "lie one within the other"),
        (s3_folder.url, "hf://user/repo/x", "sync to a folder, and from there to the other"),
        (f"{s3_folder.url}/nothing", tmp_path / "b", "holds no files"),
    ):
        status, _, err = command(capfd, "sync", source, target, "--delete")
        assert status == 2 and said in err and err.count("\n") == 0
    assert content(a) == {"x": b"1"} and not (tmp_path / "b").exists()
    monkeypatch.setattr("acestep_pipeline.paths.free_space_bytes", lambda directory: 0)
    status, _, err = command(capfd, "sync", a, tmp_path / "b")
    assert status == 2 and "make room" in err
    for rate in ("fast", "0MB/s", "1kB/s", "10"):
        assert command(capfd, "sync", a, s3_folder.url, "--max_bandwidth", rate)[0] == 2


def test_the_command_says_what_it_did(s3_folder, tmp_path, capfd):
    a = write(tmp_path / "a", {"x": b"1" * 2_000_000, "🎵 y": b"2"})
    status, out, _ = command(capfd, "sync", a, s3_folder.url, "--dry-run")
    assert (
        status == 0 and out.startswith("would send x\nwould send 🎵 y\n") and "2 files of 2.0 MB would be sent" in out
    )
    status, out, _ = command(capfd, "sync", a, s3_folder.url)
    assert out == f"{s3_folder.url}: 2 files of 2.0 MB sent, 0 unchanged, 0 removed\n"
    (a / "x").unlink()
    assert "0 files of 0.0 MB sent, 1 unchanged, 1 removed" in command(capfd, "sync", a, s3_folder.url, "--delete")[1]
    assert [file.key for file in storage.list(s3_folder.url)] == ["🎵 y"]
    begun = time.monotonic()
    write(a, {"x": bytes(300_000)})
    assert command(capfd, "sync", a, s3_folder.url, "--max_bandwidth", "200kB/s")[0] == 0
    assert time.monotonic() - begun > 1.4, "it keeps to the rate"
