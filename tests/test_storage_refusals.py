"""What servers, disks and clocks refuse, as a user of `acestep-lora storage` meets it: one sentence and exit status 2,
and nothing half-done."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from acestep_pipeline import paths
from acestep_pipeline.cli import main
from acestep_pipeline.errors import UsageError
from acestep_pipeline.storage import copies, hub_pull
from acestep_pipeline.storage.folder_sync import sync_folder
from acestep_pipeline.storage.hub_address import parse_hub_address
from acestep_pipeline.storage.publishing import publish, read_latest
from acestep_pipeline.storage.store_care import verify
from acestep_pipeline.storage.stores import open_store
from tests.fault_proxy import faulty, refusing
from tests.test_hub import hub  # noqa: F401
from tests.test_publishing import write
from tests.test_storage import content, noise

REGION = "the bucket is in another region, eu-west-1; set AWS_DEFAULT_REGION=eu-west-1."
REFUSALS = {
    "PermanentRedirect": (301, REGION),
    "AuthorizationHeaderMalformed": (400, REGION),
    "IllegalLocationConstraintException": (400, REGION),
    "RequestTimeTooSkewed": (403, "this machine's clock is wrong; set it."),
    "ExpiredToken": (400, "the credentials have expired; renew them."),
    "InvalidToken": (400, "the session token is wrong; renew the credentials, or unset AWS_SESSION_TOKEN."),
    "AccessDenied": (403, "; ask for s3:ListBucket"),
    "WhatNobodyKnows": (400, "refused it (WhatNobodyKnows); check the address and the credentials."),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_what_s3_refuses_for_good_is_one_sentence(code, s3_folder, tmp_path, capfd, monkeypatch):
    run = write(tmp_path / "run", {"a": b"x"})
    status, said = REFUSALS[code]
    with refusing(code, status, {"x-amz-bucket-region": "eu-west-1"}) as (url, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        for command in (
            ("ls", "s3://bucket/lora"),
            ("push", run, "s3://bucket/lora/x"),
            ("pull", "s3://bucket/lora/x", tmp_path / "copy"),
            ("sync", run, "s3://bucket/x"),
            ("init", "s3://bucket"),
        ):
            with pytest.raises(SystemExit) as ended:
                main(["storage", *map(str, command)])
            out, err = capfd.readouterr()
            assert ended.value.code == 2 and out == "", (command, err)
            assert err.startswith("error: s3://bucket") and err.count("\n") == 1 and said in err, (command, err)
        # Asked once each; another region is looked up, and none of it goes on for ever.
        assert len(asked) <= 10 and not (tmp_path / "copy").exists()


def test_credentials_that_expire_meanwhile_lose_nothing(s3_folder, tmp_path, monkeypatch):
    address, run = f"{s3_folder.url}/lora/x", write(tmp_path / "run", {"a": b"1", "b": noise("b", 50_000)})
    server, first = s3_folder.server, publish(run, address, show_progress=False).manifest
    write(run, {"a": b"2", "c": noise("c", 50_000)})
    expired, after = 0, 0
    while True:
        with faulty(server, expires_after=after) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            try:
                published = publish(run, address, force=True, show_progress=False, num_workers=1)
            except UsageError as error:
                assert str(error) == f"{address}: the credentials have expired; renew them."
                expired += 1
            else:
                break
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert read_latest(open_store(address))[0] == first
        after += 1
    assert expired >= 8 and published.manifest.release == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    assert verify(address, every_release=True, show_progress=False)[1] == []


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


MUSIC = {f"{number}.wav": noise(str(number), 400_000) for number in range(6)}


@pytest.mark.parametrize("way", ["mirror", "sync", "hub"])
@pytest.mark.parametrize("known", [True, False], ids=["known before", "noticed meanwhile"])
def test_a_disk_without_room_is_said_and_the_transfer_goes_on_later(
    way, known, s3_folder, small_disk, request, monkeypatch
):
    """Into the cache of `--train_data_dir s3://…`, by sync, and from the Hub; releases: see test_publishing."""
    if way == "hub":
        served = request.getfixturevalue("hub")
        served.add("datasets/tester/music", {"main": write(small_disk.parent / "music", MUSIC)})
    else:
        s3_folder.put(MUSIC)
    target = small_disk / "copy"

    def fetch() -> None:
        if way == "mirror":
            copies.pull(s3_folder.url, target, num_workers=1, show_progress=False)
        elif way == "sync":
            sync_folder(s3_folder.url, str(target), num_workers=1, show_progress=False)
        else:
            hub_pull.pull_from_hub(parse_hub_address("hf://datasets/tester/music"), target, num_workers=1)

    with monkeypatch.context() as patch:
        if not known:  # somebody else writes there at the same time
            for module in (paths, hub_pull):
                patch.setattr(module, "free_space_bytes", lambda directory: 1 << 40)
        with pytest.raises(UsageError, match="make room") as refused:
            fetch()
        assert str(small_disk) in str(refused.value) and "\n" not in str(refused.value)
        assert known or "(No space left on device)" in str(refused.value)
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    fetch()
    assert {name: data for name, data in content(target).items() if name.endswith(".wav")} == MUSIC


def test_no_action_waits_for_an_endpoint_that_is_not_there(s3_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    run = write(tmp_path / "run", {"a": b"x"})
    for command in (("verify", "s3://bucket/x"), ("rollback", "s3://bucket/x", "1"), ("sync", run, "s3://bucket/x"),
                    ("sync", "s3://bucket/x", run), ("init", "s3://bucket")):  # fmt: skip
        begun = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            main(["storage", *map(str, command)])
        err = capfd.readouterr().err
        assert ended.value.code == 2 and "http://127.0.0.1:9 can't be reached" in err and err.count("\n") == 1
        assert time.monotonic() - begun < 15
