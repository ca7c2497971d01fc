"""The direct way to S3, past most of botocore, against a real server: what goes that way, and what does not."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys

import pytest

from acestep_pipeline import storage
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.storage.s3 import list_folder, open_client
from acestep_pipeline.storage.s3_direct import direct_requests
from tests.s3_server import corrupting_proxy, encrypting_proxy, noting_proxy
from tests.test_publishing import FILES, write
from tests.test_storage import content, noise

ODD_KEYS = [
    "plain",
    "sp ace/a+b%20c&d=é?.txt",
    "日本語/🎵 曲.flac",
    "line\nbreak\t.",
    "~-_.!*'();:@,$#[]\"<>^`{|}.",
    "a.b/..c/.d",
]


@pytest.fixture
def through_botocore(monkeypatch):
    """The operations, by name, that our clients let botocore send from now on."""
    made = []

    def watched(num_workers):
        client = open_client(num_workers)
        client.meta.events.register("provide-client-params.s3", lambda model, **_: made.append(model.name))
        return client

    monkeypatch.setattr("acestep_pipeline.storage.s3_store.open_client", watched)
    return made


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("acestep_pipeline.storage.transfer_progress.LARGE_BYTES", 6 << 20)
    monkeypatch.setattr("acestep_pipeline.storage.transfer_progress.PART_BYTES", 5 << 20)


def sync(source, target):
    return storage.sync(source, target, show_progress=False)


def test_objects_and_parts_go_directly_and_carry_their_sha_256(s3_folder, tmp_path, small_parts, through_botocore):
    files = FILES | {"large": noise("large", 12 << 20)}
    sync(write(tmp_path / "a", files), s3_folder.url)
    sync(s3_folder.url, tmp_path / "b")
    assert content(tmp_path / "b") == files
    assert not {"PutObject", "UploadPart", "GetObject"} & set(through_botocore)
    for name, data in FILES.items():
        head = s3_folder.client.head_object(
            Bucket=s3_folder.server.bucket, Key=f"{s3_folder.name}/{name}", ChecksumMode="ENABLED"
        )
        assert head["ChecksumSHA256"] == base64.b64encode(hashlib.sha256(data).digest()).decode()


@pytest.mark.parametrize("key", ODD_KEYS)
def test_any_key_is_signed_as_botocore_signs_it(key, s3_folder):
    bucket, key = s3_folder.server.bucket, f"{s3_folder.name}/{key}"
    client, data = open_client(1), noise(key, 1000)
    direct = direct_requests(client)
    assert direct.put({"Bucket": bucket, "Key": key}, data, hashlib.sha256(data).digest()) is None, (
        "not yet known where"
    )
    list_folder(client, bucket, "")
    etag = direct.put({"Bucket": bucket, "Key": key}, data, hashlib.sha256(data).digest())
    assert s3_folder.client.get_object(Bucket=bucket, Key=key)["Body"].read() == data
    answer = direct.get(bucket, key, etag=etag, size=1000, span=(0, 1000), block=300)
    assert [len(block) for block in answer.blocks] == [300, 300, 300, 100] and answer.sha256
    assert b"".join(direct.get(bucket, key, etag=etag, size=1000, span=(2, 900), block=1000).blocks) == data[2:900]


def test_whatever_is_no_plain_success_is_botocores(s3_folder):
    client, bucket, key = open_client(1), s3_folder.server.bucket, f"{s3_folder.name}/x"
    direct = direct_requests(client)
    client.list_objects_v2(Bucket=bucket)
    etag = direct.put({"Bucket": bucket, "Key": key}, b"data", hashlib.sha256(b"data").digest())
    asked = {"etag": etag, "size": 4, "span": (0, 4), "block": 9}
    assert direct.get(bucket, key, **asked)
    assert direct.get(bucket, f"{key}?", **asked) is None, "it isn't there"
    assert direct.get(bucket, key, **asked | {"etag": '"0"'}) is None, "it has changed"
    assert direct.get(bucket, key, **asked | {"size": 3, "span": (0, 3)}) is None, "it is larger"
    assert direct.get("another", key, **asked) is None, "the bucket has not been listed"
    assert direct.put({"Bucket": bucket, "Key": key}, b"data", hashlib.sha256(b"date").digest()) is None, (
        "not the data"
    )
    # A header that only this request has: botocore may have to set it for the others, too.
    client.list_objects_v2(Bucket=bucket, RequestPayer="requester")
    assert direct.get(bucket, key, **asked) is None
    client.list_objects_v2(Bucket=bucket)
    assert direct.get(bucket, key, **asked)


def test_what_has_no_checksum_that_is_compared_here_is_botocores(s3_folder):
    """botocore compares CRC-32 and the like; parts from other programs have no SHA-256, but an ETag of MD5s."""
    client, bucket = open_client(1), s3_folder.server.bucket
    s3_folder.put({"x": b"data"})
    (file,) = list_folder(client, bucket, f"{s3_folder.name}/")
    asked = {"size": 4, "span": (0, 4), "block": 9}
    answer = direct_requests(client).get(bucket, file.key, etag=file.etag, **asked)
    assert answer.sha256 is None and b"".join(answer.blocks) == b"data"
    with corrupting_proxy(s3_folder.server, hashlib.md5(b"data").hexdigest().encode(), b"0" * 30 + b"-1", 9) as (
        url,
        _,
    ):
        os.environ["AWS_ENDPOINT_URL"] = url  # the fixture s3_folder puts it back
        other = open_client(1)
        (file,) = list_folder(other, bucket, f"{s3_folder.name}/")
        assert file.etag.strip('"') == "0" * 30 + "-1"
        assert direct_requests(other).get(bucket, file.key, etag=file.etag, **asked) is None


def test_what_breaks_off_or_is_damaged_is_asked_of_botocore(s3_folder, tmp_path, through_botocore, monkeypatch):
    s3_folder.put({"a": b"a song by NOBODY, " * 10})
    with corrupting_proxy(s3_folder.server, b"NOBODY", b"NOBADY", times=1) as (url, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        sync(s3_folder.url, tmp_path / "a")
        assert len(done) == 1 and through_botocore.count("GetObject") == 1
    assert content(tmp_path / "a") == {"a": b"a song by NOBODY, " * 10}
    with corrupting_proxy(s3_folder.server, b"NOBODY", b"NOBADY", times=99) as (url, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(RunError, match="arrived damaged 3 times"):
            sync(s3_folder.url, tmp_path / "b")
        assert len(done) == 3


def test_a_proxy_is_gone_through(s3_folder, tmp_path, through_botocore, monkeypatch):
    server = s3_folder.server.url
    with noting_proxy(s3_folder.server) as (url, heads):
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("HTTP_PROXY", url)
        sync(write(tmp_path / "a", {"x": b"1"}), s3_folder.url)
        sync(s3_folder.url, tmp_path / "b")
    assert content(tmp_path / "b") == {"x": b"1"} and not {"PutObject", "GetObject"} & set(through_botocore)
    for method in ("PUT", "GET"):
        assert any(head.startswith(f"{method} {server}/{s3_folder.server.bucket}/") for head in heads)


def test_credentials_are_renewed_for_each_request(s3_folder, tmp_path, monkeypatch):
    """A program gives them, for a minute: they are due for renewal at once."""
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    program, calls = tmp_path / "credentials.py", tmp_path / "calls"
    program.write_text(
        "import datetime, json\n"
        f"open({str(calls)!r}, 'a').write('.')\n"
        "end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=1)\n"
        f"print(json.dumps({{'Version': 1, 'AccessKeyId': {keys['AWS_ACCESS_KEY_ID']!r}, 'SecretAccessKey': "
        f"{keys['AWS_SECRET_ACCESS_KEY']!r}, 'Expiration': end.isoformat()}}))\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")
    for name in keys:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    s3_folder.put({"x": b"1234"})
    client = open_client(1)
    (file,) = list_folder(client, s3_folder.server.bucket, f"{s3_folder.name}/")
    before = len(calls.read_text())
    for _ in range(2):
        answer = direct_requests(client).get(
            s3_folder.server.bucket, file.key, etag=file.etag, size=4, span=(0, 4), block=4
        )
        assert b"".join(answer.blocks) == b"1234"
    assert len(calls.read_text()) == before + 2


def test_a_certificate_is_trusted_if_aws_ca_bundle_says_so(s3_folder, tmp_path, monkeypatch, through_botocore):
    program, certificate, key = shutil.which("openssl"), tmp_path / "certificate.pem", tmp_path / "key.pem"
    if program is None:
        pytest.skip("the program openssl, which makes the certificate, is missing")
    subprocess.run(
        [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=s3", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    certificate.write_bytes(certificate.read_bytes() + key.read_bytes())
    with encrypting_proxy(s3_folder.server, certificate) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(UsageError, match="https://127.0.0.1:.* can't be reached"):
            storage.list(s3_folder.url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        sync(write(tmp_path / "a", FILES), s3_folder.url)
        sync(s3_folder.url, tmp_path / "b")
    assert content(tmp_path / "b") == FILES and not {"PutObject", "GetObject"} & set(through_botocore)
