"""Releases in a real S3 server and in a folder: what is published is whole, one publisher wins, history stays."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from acestep_pipeline import paths
from acestep_pipeline.adapters.shelves import list_adapters, read_manifest
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.paths import LORA_WEIGHTS_NAME
from acestep_pipeline.storage import s3_store
from acestep_pipeline.storage.copies import local_copy
from acestep_pipeline.storage.publishing import commit, find_release, publish, read_history, read_latest, rollback
from acestep_pipeline.storage.release_manifest import MANIFEST_NAME, new_release, parse_manifest
from acestep_pipeline.storage.release_pull import pull_release
from acestep_pipeline.storage.store_care import collect_garbage, find_garbage_places, find_published, verify
from acestep_pipeline.storage.stores import open_store
from tests.s3_server import corrupting_proxy, deaf_proxy
from tests.test_storage import content, identities, noise

ROOT = Path(__file__).parents[1]
FILES = {
    LORA_WEIGHTS_NAME: noise("weights", 300_000),
    "samples/🎵 one two.wav": noise("sample", 50_000),
    "samples/copy.wav": noise("sample", 50_000),
    "README.md": b"# card",
    "empty.txt": b"",
}


@dataclass(frozen=True)
class Place:
    """Where to publish, and how to look at and change what lies there."""

    address: str
    objects: Callable[[], dict[str, bytes]]
    put: Callable[[dict[str, bytes]], None]
    remove: Callable[[str], None]


@pytest.fixture(params=["s3", "folder"])
def place(request, tmp_path) -> Place:
    if request.param == "s3":
        folder = request.getfixturevalue("s3_folder")

        def objects() -> dict[str, bytes]:
            found = folder.client.list_objects_v2(Bucket=folder.server.bucket, Prefix=f"{folder.name}/lora/x/")
            keys = [entry["Key"] for entry in found.get("Contents", [])]
            read = {key: folder.client.get_object(Bucket=folder.server.bucket, Key=key)["Body"].read() for key in keys}
            return {key.removeprefix(f"{folder.name}/lora/x/"): data for key, data in read.items()}

        return Place(
            f"{folder.url}/lora/x",
            objects,
            lambda files: folder.put({f"lora/x/{name}": data for name, data in files.items()}),
            lambda name: folder.delete(f"lora/x/{name}"),
        )
    root = tmp_path / "shelf" / "lora" / "x"

    def put(files: dict[str, bytes]) -> None:
        write(root, files)

    return Place(str(root), lambda: content(root), put, lambda name: (root / name).unlink())


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def push(directory: Path, address: str, **options):
    return publish(directory, address, show_progress=False, **options)


def pull(address: str, directory: Path, **options):
    return pull_release(address, directory, show_progress=False, **options)


def pulled(address: str, directory: Path, **options) -> dict[str, bytes]:
    """The files of a pulled copy without its manifest."""
    pull(address, directory, **options)
    files = content(directory)
    assert parse_manifest(files.pop(MANIFEST_NAME), "").content is None
    return files


# --- publishing ------------------------------------------------------------------------------------------------------


def test_a_release_is_what_was_pushed_and_its_manifest_says_everything(place, tmp_path):
    run = write(tmp_path / "run", FILES)
    published = push(run, place.address, version="v1", message="first")
    assert published.is_new and published.sent_bytes == 350_006  # equal files are sent once
    assert pulled(place.address, tmp_path / "copy") == FILES
    facts = json.loads(place.objects()[MANIFEST_NAME])
    assert {"file": "README.md", "size": 6, "sha256": hashlib.sha256(b"# card").hexdigest()} in facts["files"]
    assert (facts["release"], facts["version"], facts["message"], "parent" in facts) == (1, "v1", "first", False)
    assert facts["tool"].startswith("ace-step-lora ") and facts["created"].endswith("+00:00")
    assert not [path for path in (tmp_path).iterdir() if path.name.startswith(".partial")]


def test_an_existing_name_needs_force_and_identical_content_is_never_sent_twice(place, tmp_path):
    run = write(tmp_path / "run", FILES)
    push(run, place.address)
    again = push(run, place.address)
    assert not again.is_new and again.manifest.release == 1
    write(run, {"README.md": b"# changed"})
    before = place.objects()
    with pytest.raises(UsageError, match=r"is published already \(release 1, .*--force"):
        push(run, place.address)
    write(run, {"README.md": b"# cark"})  # of the same size
    with pytest.raises(UsageError, match=r"is published already \(release 1, .*--force"):
        push(run, place.address)
    assert place.objects() == before
    second = push(run, place.address, force=True, version="v2.0")
    assert second.sent_bytes == 6 and (second.manifest.release, second.manifest.parent) == (2, 1)
    assert place.objects()["releases/1.json"] == before[MANIFEST_NAME]
    write(run, {"README.md": b"# third"})
    with pytest.raises(UsageError, match="has a version v2.0 already"):
        push(run, place.address, force=True, version="v2.0")
    push(run, place.address, force=True)
    for version, card in ((None, b"# third"), ("latest", b"# third"), ("v2.0", b"# cark"), ("1", b"# card")):
        assert pulled(place.address, tmp_path / f"copy-{version}", version=version)["README.md"] == card
    with pytest.raises(UsageError, match="has no version v3"):
        pull(place.address, tmp_path / "none", version="v3")


def test_a_rollback_is_a_new_release_of_old_files(place, tmp_path):
    run = write(tmp_path / "run", FILES)
    push(run, place.address, version="good")
    write(run, {"README.md": b"# broken"})
    push(run, place.address, force=True)
    manifest = rollback(place.address, "good")
    assert (manifest.release, manifest.parent, manifest.message) == (3, 2, "release 1 again")
    assert pulled(place.address, tmp_path / "copy") == FILES
    store = open_store(place.address)
    assert [release.release for release in read_history(store, read_latest(store)[0])] == [3, 2, 1]
    with pytest.raises(UsageError, match="nothing to roll back"):
        rollback(place.address, "good")


def test_of_eight_publishers_at_once_one_wins_and_the_others_are_told(place, tmp_path):
    first = push(write(tmp_path / "first", FILES), place.address).manifest
    for release, force in ((2, True), (3, True)):
        outcomes: list[object] = [None] * 8
        barrier = threading.Barrier(8)
        runs = [write(tmp_path / f"{release}-{number}", FILES | {"n": b"%d" % number}) for number in range(8)]

        def race(number, outcomes=outcomes, barrier=barrier, runs=runs, force=force):
            barrier.wait()
            try:
                outcomes[number] = push(runs[number], place.address, force=force, num_workers=2).manifest
            except RunError as error:
                outcomes[number] = str(error)

        threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Those that came late enough to see another's release followed it; of each release there is one.
        won = [outcome for outcome in outcomes if outcome is not None and not isinstance(outcome, str)]
        told = [outcome for outcome in outcomes if isinstance(outcome, str)]
        assert len(won) + len(told) == 8 and won and len({manifest.release for manifest in won}) == len(won)
        assert all("another publisher was faster" in sentence for sentence in told)
    history = read_history(open_store(place.address), read_latest(open_store(place.address))[0])
    assert [manifest.release for manifest in history] == list(range(len(history), 0, -1)) and history[-1] == first
    assert not verify(place.address, every_release=True, show_progress=False)[1]


@pytest.mark.parametrize("follows", [False, True])
def test_of_manifests_committed_at_one_moment_exactly_one_is_taken(place, tmp_path, follows):
    run = write(tmp_path / "run", FILES)
    files = push(run, place.address).manifest.files
    store = open_store(place.address)
    if not follows:
        place.remove(MANIFEST_NAME)
    latest = read_latest(store)
    barrier, outcomes = threading.Barrier(8), []

    def race():
        manifest = new_release(files, parent=latest and latest[0])
        own_store = open_store(place.address)
        barrier.wait()
        try:
            commit(own_store, manifest, latest)
            outcomes.append(manifest)
        except RunError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    assert sum("another publisher was faster" in str(outcome) for outcome in outcomes) == 7
    assert find_release(store).id == winner.id


def test_readers_see_the_old_release_or_the_new_one(place, tmp_path):
    runs = [write(tmp_path / f"run-{number}", {"a": b"a%d" % number, "b": b"b%d" % number}) for number in range(2)]
    push(runs[0], place.address)
    done, seen = threading.Event(), []

    def read():
        number = 0
        while not done.is_set():
            number += 1
            seen.append(pulled(place.address, tmp_path / "copies" / str(number)))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(6):
        push(runs[(number + 1) % 2], place.address, force=True)
    done.set()
    reader.join()
    whole = [{"a": b"a%d" % number, "b": b"b%d" % number} for number in range(2)]
    assert seen and all(files in whole for files in seen)


def test_a_publisher_that_is_killed_leaves_the_release_before(place, tmp_path):
    push(write(tmp_path / "run", FILES), place.address)
    new = write(tmp_path / "new", {f"{number:03d}": noise(str(number), 200_000) for number in range(100)})
    code = (
        "from pathlib import Path; from acestep_pipeline.storage.publishing import publish; "
        f"publish(Path({str(new)!r}), {place.address!r}, force=True, num_workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    store = open_store(place.address)
    while len(store.list_keys("content/")) < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 10 <= len(store.list_keys("content/")) < 100
    assert pulled(place.address, tmp_path / "copy") == FILES
    sent = len(store.list_keys("content/")) - 4
    assert push(new, place.address, force=True).sent_bytes == (100 - sent) * 200_000, (
        "what had arrived is not sent again"
    )
    assert pulled(place.address, tmp_path / "copy-2") == content(new)


def test_a_publisher_whose_answer_is_lost_knows_that_it_has_won(s3_folder, tmp_path, monkeypatch):
    address, run = f"{s3_folder.url}/lora/x", write(tmp_path / "run", FILES)
    marker = f"PUT /{s3_folder.server.bucket}/{s3_folder.name}/lora/x/{MANIFEST_NAME} ".encode()
    for release in (1, 2):
        write(run, {"README.md": b"# %d" % release})
        with deaf_proxy(s3_folder.server, marker, times=1) as (url, lost), monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", url)
            manifest = push(run, address, force=True).manifest
            assert len(lost) == 1 and manifest.release == release
        assert find_release(open_store(address)) == manifest


def test_what_may_not_be_written_or_read_is_one_sentence(s3_folder, tmp_path):
    address, run = f"{s3_folder.url}/lora/x", write(tmp_path / "run", FILES)
    push(run, address)
    write(run, {"README.md": b"# new"})
    arn = f"arn:aws:s3:::{s3_folder.server.bucket}/{s3_folder.name}/lora/x/*"
    try:
        for action, said in (
            ("PutObject", "may not write there; ask for s3:PutObject"),
            ("GetObject", "may not read"),
        ):
            rule = {"Effect": "Deny", "Principal": "*", "Action": [f"s3:{action}"], "Resource": [arn]}
            policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
            s3_folder.client.put_bucket_policy(Bucket=s3_folder.server.bucket, Policy=policy)
            with pytest.raises(UsageError, match=f"lora/x: these credentials {said}"):
                push(run, address, force=True)
    finally:
        s3_folder.client.delete_bucket_policy(Bucket=s3_folder.server.bucket)
    assert find_release(open_store(address)).release == 1


def test_what_is_not_published_is_no_release(place, tmp_path):
    with pytest.raises(UsageError, match=r"is not published \(it has no manifest.json\)"):
        pull(place.address, tmp_path / "copy")
    place.put({"a.txt": b"left by someone"})
    with pytest.raises(UsageError, match=r"holds files that were not published \(a.txt\)"):
        push(write(tmp_path / "run", FILES), place.address)
    assert place.objects() == {"a.txt": b"left by someone"}


# --- pulling ---------------------------------------------------------------------------------------------------------


def test_a_pull_that_was_cut_goes_on_with_what_is_right(place, tmp_path):
    files = {f"{number:02d}/x": noise(str(number), 100_000) for number in range(60)}
    push(write(tmp_path / "run", files), place.address)
    copy, partial = tmp_path / "copy", tmp_path / ".partial-copy"
    code = (
        "from pathlib import Path; from acestep_pipeline.storage.release_pull import pull_release; "
        f"pull_release({place.address!r}, Path({str(copy)!r}), num_workers=1, max_bytes_per_s=4e6)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (partial / "new").is_dir() or len(content(partial / "new")) < 10:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not copy.exists()
    there = content(partial / "new")
    assert 10 <= len(there) < 60
    spoilt = min(there)
    (partial / "new" / spoilt).write_bytes(b"?" * 100_000)
    (partial / "new" / "stray").write_bytes(b"from another release")
    _, fetched = pull(place.address, copy)
    assert fetched == (60 - len(there) + 1) * 100_000
    assert {name: data for name, data in content(copy).items() if name != MANIFEST_NAME} == files
    assert not partial.exists()


def test_a_folder_that_is_there_is_kept_unless_forced_and_reused(place, tmp_path):
    run, copy = write(tmp_path / "run", FILES), tmp_path / "copy"
    push(run, place.address)
    pull(place.address, copy)
    before = identities(copy)
    assert pull(place.address, copy)[1] == 0 and identities(copy) == before
    write(run, {"README.md": b"# new", "more.txt": b"more"})
    push(run, place.address, force=True)
    with pytest.raises(UsageError, match="holds other files than the release; .* --force"):
        pull(place.address, copy)
    assert pull(place.address, copy, force=True)[1] == len(b"# newmore")
    assert {name: data for name, data in content(copy).items() if name != MANIFEST_NAME} == content(run)
    write(copy, {"mine.txt": b"my notes"})
    with pytest.raises(UsageError, match="holds mine.txt, which no release brought"):
        pull(place.address, copy, force=True, version="1")
    assert (copy / "mine.txt").read_bytes() == b"my notes"
    (tmp_path / "empty").mkdir()
    assert pulled(place.address, tmp_path / "empty") == content(run)
    with pytest.raises(UsageError, match="README.md is in the way"):
        pull(place.address, run / "README.md")


def test_damaged_and_lost_content_is_refused_and_named(place, tmp_path):
    run = write(tmp_path / "run", FILES)
    push(run, place.address)
    assert verify(place.address, show_progress=False)[1] == []
    key = f"content/{hashlib.sha256(FILES[LORA_WEIGHTS_NAME]).hexdigest()}"
    for changed, said in ((noise("other", 300_000), "another SHA-256"), (b"short", "5 bytes instead of 300000")):
        place.put({key: changed})
        (damage,) = verify(place.address, show_progress=False)[1]
        assert damage.startswith(LORA_WEIGHTS_NAME)
        with pytest.raises(RunError, match=f"the content of {LORA_WEIGHTS_NAME} .*{said}"):
            pull(place.address, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
    place.remove(key)
    with pytest.raises(RunError, match=f"the content of {LORA_WEIGHTS_NAME} is missing"):
        pull(place.address, tmp_path / "copy")
    assert "is missing" in verify(place.address, show_progress=False)[1][0]
    write(run, {"README.md": b"# new"})
    push(run, place.address, force=True)  # mends it
    assert verify(place.address, every_release=True, show_progress=False)[1] == []


def test_content_that_arrives_damaged_is_fetched_again(s3_folder, tmp_path, monkeypatch):
    address = f"{s3_folder.url}/lora/x"
    push(write(tmp_path / "run", {"a": b"a song by NOBODY, " * 10}), address)
    with corrupting_proxy(s3_folder.server, b"NOBODY", b"NOBADY", times=2) as (url, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert pulled(address, tmp_path / "copy") == {"a": b"a song by NOBODY, " * 10} and len(done) == 2


@pytest.mark.parametrize("times", [2, 99])
def test_a_manifest_that_arrives_damaged_is_read_again(s3_folder, tmp_path, monkeypatch, times):
    address = f"{s3_folder.url}/lora/x"
    push(write(tmp_path / "run", {"NOBODY.txt": b"1"}), address)
    with corrupting_proxy(s3_folder.server, b"NOBODY", b"NOBADY", times=times) as (url, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        if times == 2:
            assert pulled(address, tmp_path / "copy") == {"NOBODY.txt": b"1"} and len(done) == 2
        else:
            with pytest.raises(RunError, match="manifest.json arrived damaged 3 times"):
                pull(address, tmp_path / "copy")


def test_large_files_travel_in_parts(s3_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("acestep_pipeline.storage.transfer_progress.LARGE_BYTES", 8 << 20)
    address, whole = f"{s3_folder.url}/lora/x", noise("large", 20 << 20)
    push(write(tmp_path / "run", {"large": whole}), address)
    (stored,) = open_store(address).list_keys("content/")
    assert stored.etag.strip('"').endswith("-3")
    assert pulled(address, tmp_path / "copy") == {"large": whole}
    assert verify(address, show_progress=False)[1] == []


def test_no_room_is_known_before_the_first_byte(place, tmp_path, monkeypatch):
    push(write(tmp_path / "run", FILES), place.address)
    monkeypatch.setattr(paths, "free_space_bytes", lambda directory: 1000)
    with pytest.raises(UsageError, match="has 0.0 GB free and 0.0 GB are to come; make room"):
        pull(place.address, tmp_path / "copy")


def test_a_disk_that_fills_up_meanwhile_is_one_sentence_and_the_pull_goes_on(place, tmp_path, monkeypatch):
    files = {f"{number}": noise(str(number), 400_000) for number in range(6)}
    push(write(tmp_path / "run", files), place.address)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(paths, "free_space_bytes", lambda directory: 1 << 40)
            with pytest.raises(UsageError, match=r"disk.* can't be written \(No space left on device\); make room"):
                pull(place.address, disk / "copy", num_workers=1)
        assert not (disk / "copy").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert pull(place.address, disk / "copy")[1] < 6 * 400_000
        assert {name: data for name, data in content(disk / "copy").items() if name != MANIFEST_NAME} == files
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_links_in_what_a_cut_pull_left_lead_nowhere(place, tmp_path):
    push(write(tmp_path / "run", FILES), place.address)
    outside = write(tmp_path / "outside", {"precious": b"1"})
    partial = tmp_path / ".partial-copy"
    (partial / "new").mkdir(parents=True)
    (partial / "new" / "samples").symlink_to(outside)
    (partial / "new" / "README.md").symlink_to(outside / "precious")
    assert pulled(place.address, tmp_path / "copy") == FILES
    assert content(outside) == {"precious": b"1"} and not any(path.is_symlink() for path in tmp_path.rglob("*"))
    for link in (tmp_path / ".partial-other", tmp_path / ".partial-other" / "new"):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(outside)
        with pytest.raises(UsageError, match="is a link; remove it"):
            pull(place.address, tmp_path / "other")
        link.unlink()
    assert content(outside) == {"precious": b"1"} and not (tmp_path / "other").exists()


def test_a_file_that_changes_while_it_is_sent_is_not_published(place, tmp_path, monkeypatch):
    run = write(tmp_path / "run", FILES)
    store_class = type(open_store(place.address))
    put = store_class.put

    def slow_put(self, path, *arguments, **options):
        if path.name == "README.md":
            path.write_bytes(b"# edited")
        return put(self, path, *arguments, **options)

    monkeypatch.setattr(store_class, "put", slow_put)
    with pytest.raises((RunError, UsageError), match="changed while|is not what was sent"):
        push(run, place.address)
    assert MANIFEST_NAME not in place.objects()


# --- care ------------------------------------------------------------------------------------------------------------


def test_gc_removes_what_no_manifest_names_and_only_when_it_is_old(place, tmp_path, monkeypatch):
    run = write(tmp_path / "run", FILES)
    push(run, place.address)
    write(run, {"README.md": b"# second"})
    push(run, place.address, force=True)
    stray = f"content/{hashlib.sha256(b'stray').hexdigest()}"
    place.put({stray: b"stray", "content/notes.txt": b"mine"})
    before = place.objects()
    day = 24 * 3600.0
    young = collect_garbage(place.address, older_than_s=day, dry_run=False)
    assert (young.content, young.num_young) == ((), 1) and place.objects() == before
    with pytest.raises(UsageError, match="may be a publication under way"):
        collect_garbage(place.address, older_than_s=60, dry_run=False)
    later = time.time() + 2 * day
    monkeypatch.setattr("acestep_pipeline.storage.store_care.time.time", lambda: later)
    assert find_garbage_places(place.address) == [place.address]
    tried = collect_garbage(place.address, older_than_s=day, dry_run=True)
    assert [stored.key for stored in tried.content] == [stray] and place.objects() == before
    assert collect_garbage(place.address, older_than_s=day, dry_run=False).size == 5
    del before[stray]
    assert place.objects() == before
    place.put({"releases/1.json": b"{}", stray: b"stray"})
    with pytest.raises(UsageError, match=r"releases/1.json can't be read \(KeyError\)"):
        collect_garbage(place.address, older_than_s=day, dry_run=False)
    assert stray in place.objects()


def test_gc_gives_up_uploads_that_were_never_finished(s3_folder, tmp_path, monkeypatch):
    address = f"{s3_folder.url}/lora/x"
    push(write(tmp_path / "run", FILES), address)
    key = f"{s3_folder.name}/lora/x/content/{'0' * 64}"
    upload = s3_folder.client.create_multipart_upload(Bucket=s3_folder.server.bucket, Key=key)["UploadId"]
    s3_folder.client.upload_part(
        Bucket=s3_folder.server.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 100
    )
    assert collect_garbage(address, older_than_s=7200, dry_run=False).num_young == 1
    later = time.time() + 1e6
    monkeypatch.setattr("acestep_pipeline.storage.store_care.time.time", lambda: later)
    assert len(collect_garbage(address, older_than_s=7200, dry_run=False).unfinished) == 1
    assert open_store(address).unfinished("content/") == []


def test_published_names_are_found_below_an_address(place, tmp_path):
    above = place.address.rpartition("/lora/x")[0]
    push(write(tmp_path / "run", FILES), place.address)
    push(write(tmp_path / "run", FILES), f"{above}/lora/loo-subsets/y", version="v1")
    place.put({"../z/" + MANIFEST_NAME: b"{}"} if place.address.startswith("/") else {})
    found = {name: manifest and manifest.version for name, manifest in find_published(above)}
    assert {"lora/x": None, "lora/loo-subsets/y": "v1"}.items() <= found.items()
    assert [name for name, _ in find_published(place.address)] == [""]


# --- what reads s3:// without knowing of releases --------------------------------------------------------------------


def test_a_release_is_a_folder_like_any_other_to_all_that_reads_s3(s3_folder, tmp_path):
    run = write(tmp_path / "run", FILES)
    push(run, f"{s3_folder.url}/lora/jazz")
    s3_folder.put({f"lora/plain/{LORA_WEIGHTS_NAME}": b"as it is", "lora/notes.txt": b"no adapter"})
    assert list_adapters(f"{s3_folder.url}/lora").keys() == {"jazz", "plain"}
    copy = local_copy(f"{s3_folder.url}/lora/jazz", show_progress=False)
    files = content(copy)
    del files[MANIFEST_NAME]
    assert files == FILES
    before = identities(copy)
    write(run, {"README.md": b"# second"})
    push(run, f"{s3_folder.url}/lora/jazz", force=True)
    assert local_copy(f"{s3_folder.url}/lora", show_progress=False) == copy.parent
    changed = {name for name, identity in identities(copy).items() if before.get(name) != identity}
    assert changed == {"README.md", MANIFEST_NAME} and (copy / "README.md").read_bytes() == b"# second"
    folder, hashes = read_manifest(f"{s3_folder.url}/lora/jazz")
    assert folder == copy and hashes["README.md"] == hashlib.sha256(b"# second").hexdigest()
    assert content(copy.parent / "plain") == {LORA_WEIGHTS_NAME: b"as it is"}


def test_a_server_that_does_not_heed_conditions_is_refused(s3_folder, tmp_path, monkeypatch):
    """A proxy takes the conditions out of the requests, as a server that doesn't know them would."""
    run = write(tmp_path / "run", FILES)
    make = s3_store.open_client

    def careless(num_workers):
        client = make(num_workers)

        def strip(request, **kwargs):
            for name in ("If-None-Match", "If-Match"):
                del request.headers[name]

        client.meta.events.register("before-sign.s3.PutObject", strip)
        return client

    monkeypatch.setattr(s3_store, "open_client", careless)
    with pytest.raises(UsageError, match="does not heed conditional writes"):
        push(run, f"{s3_folder.url}/lora/x")
    assert [stored.key for stored in open_store(f"{s3_folder.url}/lora/x").list_keys()] == [".conditional-writes"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    run = write(tmp_path / "run", FILES)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"can't be written \((Not a directory|File exists)\)"):
        push(run, str(tmp_path / "file" / "x"))
    assert os.listdir(tmp_path / "run")


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_said_within_15_seconds(s3_folder, monkeypatch):
    """Its queue of connections is full, so that a connection is neither made nor refused."""
    with socket.socket() as listener, contextlib.ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            each = waiting.enter_context(socket.socket())
            each.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                each.connect(listener.getsockname())
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(UsageError, match=r"http://127.0.0.1:\d+ can't be reached \(ConnectTimeoutError\)"):
            find_release(open_store(f"{s3_folder.url}/lora/x"))
        assert 5 < time.monotonic() - begun < 15
