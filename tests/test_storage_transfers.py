"""Large files on their way to and from a real S3 server: in parts, cut, continued, checked, and at a limited rate."""

import base64
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from acestep_pipeline import storage
from acestep_pipeline.errors import RunError
from acestep_pipeline.paths import cache_dir
from acestep_pipeline.storage.folder_sync import SYNC_FOLDER
from acestep_pipeline.storage.stores import open_store
from acestep_pipeline.storage.transfer_progress import ByteCount, Workers, counting, small_and_large
from tests.s3_server import deaf_proxy, noting_proxy
from tests.test_publishing import push, write
from tests.test_storage import content, noise

ROOT = Path(__file__).parents[1]
PART = 5 << 20  # the smallest that S3 takes


@pytest.fixture
def small_parts(monkeypatch):
    """Whatever has more than 6 MB travels in parts of 5 MB."""
    monkeypatch.setattr("acestep_pipeline.storage.transfer_progress.LARGE_BYTES", 6 << 20)
    monkeypatch.setattr("acestep_pipeline.storage.transfer_progress.PART_BYTES", PART)


def sync(source, target, **options):
    return storage.sync(source, target, show_progress=False, **options)


def kill_in_the_middle(code: str, is_time) -> None:
    """Run code in a process of its own, with small parts, and end it with SIGKILL once it `is_time`."""
    code = (
        "from acestep_pipeline import storage; from acestep_pipeline.storage import transfer_progress; "
        f"transfer_progress.LARGE_BYTES, transfer_progress.PART_BYTES = {6 << 20}, {PART}; {code}"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not is_time():
        assert process.poll() is None, "it ended before it was time"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture
def asked(s3_folder, monkeypatch):
    """What comes to the server from now on: `asked("PUT", "partNumber=")` are the heads of requests with that."""
    with noting_proxy(s3_folder.server) as (url, heads):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)

        def of_kind(method: str, *marks: str) -> list[str]:
            return [head for head in heads if head.startswith(f"{method} ") and all(mark in head for mark in marks)]

        of_kind.forget = heads.clear
        yield of_kind


def test_an_upload_that_was_killed_sends_only_the_parts_that_are_not_there(s3_folder, tmp_path, small_parts, asked):
    whole = noise("large", 8 * PART - 7)
    folder = write(tmp_path / "a", {"large": whole})
    bucket = {"Bucket": s3_folder.server.bucket}

    def num_parts() -> int:
        found = s3_folder.client.list_multipart_uploads(**bucket, Prefix=f"{s3_folder.name}/").get("Uploads", [])
        return sum(
            len(s3_folder.client.list_parts(**bucket, Key=each["Key"], UploadId=each["UploadId"]).get("Parts", []))
            for each in found
        )

    kill_in_the_middle(
        f"storage.sync({str(folder)!r}, {s3_folder.url!r}, num_workers=1, max_bytes_per_s=1e7)",
        lambda: num_parts() >= 3,
    )
    there = num_parts()
    assert 3 <= there < 8 and storage.list(s3_folder.url) == []
    asked.forget()
    sync(folder, s3_folder.url)
    assert 1 <= len(asked("PUT", "partNumber=")) <= 8 - there
    assert content(folder) == {"large": storage.open(f"{s3_folder.url}/large").read()}
    assert not list((cache_dir() / "uploads").iterdir()), "its record is gone with it"
    digests = b"".join(hashlib.sha256(whole[at : at + PART]).digest() for at in range(0, len(whole), PART))
    head = s3_folder.client.head_object(**bucket, Key=f"{s3_folder.name}/large", ChecksumMode="ENABLED")
    assert head["ChecksumSHA256"] == base64.b64encode(hashlib.sha256(digests).digest()).decode() + "-8"


def test_parts_of_another_content_are_sent_again(s3_folder, tmp_path, monkeypatch, small_parts, asked):
    folder = write(tmp_path / "a", {"large": noise("one", 3 * PART)})
    with deaf_proxy(s3_folder.server, b"partNumber=3", times=99) as (url, _), monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setattr("acestep_pipeline.storage.s3_uploads.cache_dir", lambda: tmp_path / "cache")
        with pytest.raises(RunError, match="the connection to .* broke"):
            sync(folder, s3_folder.url, num_workers=1)
        assert storage.list(s3_folder.url) == [] and len(list((tmp_path / "cache" / "uploads").iterdir())) == 1
    changed = noise("two", PART) + noise("one", 3 * PART)[PART:]
    write(folder, {"large": changed})
    (record,) = (tmp_path / "cache" / "uploads").iterdir()
    monkeypatch.setattr("acestep_pipeline.storage.s3_uploads._upload_record", lambda *where: record)
    sync(folder, s3_folder.url)
    assert len(asked("PUT", "partNumber=1 ")) == len(asked("PUT", "partNumber=")) == 1 and not record.exists()
    assert storage.open(f"{s3_folder.url}/large").read() == changed


def test_an_upload_that_was_given_up_meanwhile_begins_anew(s3_folder, tmp_path, small_parts, monkeypatch):
    folder = write(tmp_path / "a", {"large": noise("one", 2 * PART)})
    monkeypatch.setattr("acestep_pipeline.storage.s3_uploads._upload_record", lambda *where: tmp_path / "record")
    (tmp_path / "record").write_text("no-such-upload")
    sync(folder, s3_folder.url)
    assert storage.open(f"{s3_folder.url}/large").read() == noise("one", 2 * PART)


@pytest.mark.parametrize("what", ["UploadPart", "CompleteMultipartUpload"])
def test_an_upload_whose_last_answer_was_lost_is_finished(what, s3_folder, tmp_path, monkeypatch, small_parts):
    folder = write(tmp_path / "a", {"large": noise("one", 2 * PART)})
    marker = b"partNumber=2" if what == "UploadPart" else f"POST /{s3_folder.server.bucket}/".encode()
    with deaf_proxy(s3_folder.server, marker, times=1 if what == "UploadPart" else 2) as (url, lost):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        sync(folder, s3_folder.url)
        assert lost
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_folder.server.url)
    assert storage.open(f"{s3_folder.url}/large").read() == noise("one", 2 * PART)


@pytest.mark.parametrize("kind", ["sync", "pull", "local_copy"])
def test_a_download_that_was_killed_fetches_only_the_parts_that_are_not_here(
    kind, s3_folder, tmp_path, small_parts, asked
):
    whole = noise("large", 8 * PART - 7)
    address, copy = f"{s3_folder.url}/x", tmp_path / "copy"
    run = write(tmp_path / "run", {"large": whole})
    push(run, address) if kind == "pull" else sync(run, address)
    where = {
        "sync": copy / SYNC_FOLDER / "arriving",
        "pull": tmp_path / ".partial-copy" / "arriving",
        "local_copy": cache_dir() / "s3" / s3_folder.server.bucket / ".ace-step-pull" / "partial",
    }[kind]
    # Slowed by the limit; copies into the cache have none, so that one is slowed by its disk.
    code = {
        "sync": f"storage.sync({address!r}, {str(copy)!r}, num_workers=1, max_bytes_per_s=1e7)",
        "pull": f"storage.pull({address!r}, {str(copy)!r}, num_workers=1, max_bytes_per_s=1e7)",
        "local_copy": "import os, time; write = os.pwrite; os.pwrite = lambda *a: (time.sleep(0.1), write(*a))[1]; "
        f"from acestep_pipeline.storage.copies import local_copy; local_copy({address!r}, num_workers=1)",
    }[kind]

    def num_parts() -> int:
        ledgers = list(where.glob("*.parts")) if where.is_dir() else []
        return max((len(ledger.read_text().splitlines()) - 1 for ledger in ledgers), default=0)

    kill_in_the_middle(code, lambda: num_parts() >= 3)
    here = num_parts()
    assert 3 <= here < 8
    asked.forget()
    if kind == "sync":
        sync(address, copy)
    elif kind == "pull":
        storage.pull(address, copy, show_progress=False)
    else:
        from acestep_pipeline.storage.copies import local_copy

        copy = local_copy(address, show_progress=False)
    assert content(copy)["large"] == whole and len(asked("GET", "Range: bytes=")) == 8 - here
    assert not where.exists()


def test_parts_that_were_spoilt_on_the_disk_are_fetched_again(s3_folder, tmp_path, small_parts, asked):
    whole = noise("large", 3 * PART)
    s3_folder.put({"x/large": whole})
    copy = tmp_path / "copy"
    kill_in_the_middle(
        f"storage.sync({s3_folder.url + '/x'!r}, {str(copy)!r}, num_workers=1, max_bytes_per_s=5e6)",
        lambda: any(len(path.read_text().splitlines()) > 1 for path in copy.rglob("*.parts")),
    )
    (ledger,) = copy.rglob("*.parts")
    with ledger.with_name(ledger.name.removesuffix(".parts")).open("r+b") as file:
        file.seek(100)
        file.write(b"?")
    asked.forget()
    sync(f"{s3_folder.url}/x", copy)
    assert content(copy) == {"large": whole} and len(asked("GET", "Range: bytes=")) > 3
    s3_folder.put({"x/large": whole[::-1]})
    assert sync(f"{s3_folder.url}/x", copy).sent == ("large",) and content(copy) == {"large": whole[::-1]}


def test_what_is_sent_carries_its_sha_256_to_the_end(s3_folder, tmp_path):
    sync(write(tmp_path / "a", {"x": b"1"}), s3_folder.url)
    head = s3_folder.client.head_object(
        Bucket=s3_folder.server.bucket, Key=f"{s3_folder.name}/x", ChecksumMode="ENABLED"
    )
    assert head["ChecksumSHA256"] == base64.b64encode(hashlib.sha256(b"1").digest()).decode()


@pytest.mark.parametrize("size", [300_000, 2 * PART])
def test_no_direction_is_faster_than_the_limit(size, s3_folder, tmp_path, small_parts):
    run, rate = write(tmp_path / "a", {"x": noise("x", size), "y": b"1"}), size / 1.0
    for source, target in ((run, s3_folder.url), (s3_folder.url, tmp_path / "b"), (run, tmp_path / "c")):
        begun = time.monotonic()
        sync(source, target, max_bytes_per_s=rate)
        assert time.monotonic() - begun > 0.95
    begun = time.monotonic()
    push(run, f"{s3_folder.url}/lora/x", max_bytes_per_s=rate)
    storage.pull(f"{s3_folder.url}/lora/x", tmp_path / "d", show_progress=False, max_bytes_per_s=rate)
    assert time.monotonic() - begun > 1.9


def test_bytes_that_need_not_travel_are_counted_and_not_waited_for():
    counted = []
    count = ByteCount(counted.append, max_bytes_per_s=10.0)
    begun = time.monotonic()
    count.skip(10**6)
    count(-5)
    assert counted == [10**6, -5] and time.monotonic() - begun < 1


def test_the_bar_shows_rate_and_time_left(capfd):
    with counting(4_000_000, "Syncing", show_progress=True) as count:
        count(1_000_000)
        time.sleep(0.2)
        count(1_000_000)
    err = capfd.readouterr().err
    assert re.search(r"Syncing: +50%.*2\.00M/4\.00M \[00:0\d<00:0\d, .*B/s\]", err), err


def test_a_client_without_names_of_files_still_reads_what_large_files_are(s3_folder, tmp_path, small_parts):
    """What travelled in parts is one object to other clients."""
    whole = noise("large", 2 * PART)
    sync(write(tmp_path / "a", {"large": whole}), s3_folder.url)
    answer = s3_folder.client.get_object(Bucket=s3_folder.server.bucket, Key=f"{s3_folder.name}/large")
    assert answer["Body"].read() == whole
    (stored,) = open_store(s3_folder.url).list_keys()
    assert stored.etag.strip('"').endswith("-2") and stored.size == os.path.getsize(tmp_path / "a" / "large")


def test_small_files_travel_beside_large_ones_and_all_keep_to_the_number_of_requests(monkeypatch):
    monkeypatch.setattr("acestep_pipeline.storage.transfer_progress.LARGE_BYTES", 100)
    lock, under_way, most, small_began = threading.Lock(), [], [], threading.Event()

    def request(name) -> str:
        with lock:
            under_way.append(name)
            most.append(len(under_way))
        if name == "small":
            small_began.set()
        time.sleep(0.002)
        with lock:
            under_way.remove(name)
        return name

    def work(size: int, workers: Workers) -> int:
        if size < 100:
            request("small")
            return size
        first, *rest = range(8)
        list(workers.map(request, [first]))
        assert small_began.wait(5), "small ones wait for the large one"
        list(workers.map(request, rest))
        return size

    sizes = [1, 200, 2, 3, 300, *range(4, 60)]
    assert sorted(small_and_large(work, sizes, lambda size: size, num_workers=3)) == sorted(sizes)
    assert max(most) == 3


@pytest.mark.parametrize("bad", [7, 200])
def test_a_file_that_fails_ends_the_others(bad, monkeypatch):
    monkeypatch.setattr("acestep_pipeline.storage.transfer_progress.LARGE_BYTES", 100)
    made = []

    def request(number: int) -> None:
        made.append(number)
        time.sleep(0.002)
        if number == bad:
            raise RunError("this one")

    def work(size: int, workers: Workers) -> None:
        list(workers.map(request, range(200, 1200))) if size >= 100 else request(size)

    with pytest.raises(RunError, match="this one"):
        list(small_and_large(work, [*range(50), 500], lambda size: size, num_workers=2))
    assert len(made) < 300, "parts of the large file were still sent"
