"""Buckets that `acestep-lora storage init` makes, and its IAM policies, tried as users of a real server."""

import json
import time
from pathlib import Path

import boto3
import pytest

from acestep_pipeline.cli import main
from acestep_pipeline.errors import UsageError
from acestep_pipeline.storage import bucket_setup
from acestep_pipeline.storage.bucket_setup import ROLES, access_policy, lifecycle_rules, set_up_bucket
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Folder, running_s3_server
from tests.test_publishing import FILES, write
from tests.test_storage_command import storage

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def iam_server(tmp_path_factory):
    """A server that users can be made on."""
    with running_s3_server(tmp_path_factory.mktemp("s3-iam"), ["-s3.iam.readOnly=false"]) as server:
        yield server


@pytest.fixture
def bucket(iam_server, monkeypatch):
    for name, value in iam_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACESTEP_S3_ROOT", f"s3://{iam_server.bucket}")
    return S3Folder(iam_server)


def test_a_bucket_is_made_set_up_and_set_up_again(bucket, capfd, monkeypatch):
    client, name = bucket.client, f"new-{bucket.name}"
    monkeypatch.setenv("ACESTEP_S3_ROOT", f"s3://{name}")
    assert f"would create the bucket {name}" in storage(capfd, "init", "--dry-run")[1]
    assert name not in [each["Name"] for each in client.list_buckets()["Buckets"]]
    status, out, _ = storage(capfd, "init")
    assert status == 0 and f"the bucket {name} was created\nset: versions are kept" in out
    assert client.get_bucket_versioning(Bucket=name)["Status"] == "Enabled"
    rules = client.get_bucket_encryption(Bucket=name)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rules[0]["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    assert f"the bucket {name} is there\n" in storage(capfd, "init", f"s3://{name}")[1]
    for role in ROLES:
        assert json.dumps(access_policy(role, f"s3://{name}"), indent=2) in out
    with pytest.raises(SystemExit):
        main(["storage", "init", "/a/folder"])
    assert "/a/folder is no bucket; write s3://bucket" in capfd.readouterr().err


def test_the_lifecycle_rules_are_ones_that_s3_takes_and_others_are_kept(bucket, monkeypatch):
    """This server takes no such rules: botocore checks their form, and what would be sent is looked at."""
    sent = []
    make = bucket_setup.open_client
    theirs = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "x/"}, "Expiration": {"Days": 1}}

    def remembering(num_workers):
        client = make(num_workers)
        client.meta.events.register(
            "provide-client-params.s3.PutBucketLifecycleConfiguration",
            lambda params, **kwargs: sent.append(params["LifecycleConfiguration"]["Rules"]),
        )
        monkeypatch.setattr(
            client, "get_bucket_lifecycle_configuration", lambda Bucket: {"Rules": [theirs, *lifecycle_rules("old/")]}
        )
        return client

    monkeypatch.setattr(bucket_setup, "open_client", remembering)
    said = set_up_bucket(f"s3://{bucket.server.bucket}/team")
    assert sent == [[theirs, *lifecycle_rules("team/")]]
    tiers = {rule["Filter"]["Prefix"]: rule["Transitions"][0]["StorageClass"] for rule in sent[0][2:]}
    assert tiers == {
        "team/trajectories/": "STANDARD_IA",
        "team/results/": "STANDARD_IA",
        "team/lora/": "INTELLIGENT_TIERING",
    }
    assert any(sentence.startswith("NOT set, this server doesn't know it: unfinished uploads") for sentence in said)


def act_as(role: str, bucket: S3Folder, monkeypatch) -> None:
    iam = boto3.client("iam", endpoint_url=bucket.server.url, aws_access_key_id=ACCESS_KEY,
                       aws_secret_access_key=SECRET_KEY, region_name="us-east-1")  # fmt: skip
    name = f"{role}-{bucket.name}"
    iam.create_user(UserName=name)
    policy = access_policy(role, f"s3://{bucket.server.bucket}")
    for statement in policy["Statement"]:
        if statement["Sid"] == "FindUnfinished":
            statement["Action"] = ["s3:List*"]  # this server doesn't know AWS's s3:ListBucketMultipartUploads
        if statement["Sid"] == "Publish":
            statement["Action"].remove("s3:ListMultipartUploadParts")  # nor that
    iam.put_user_policy(UserName=name, PolicyName="role", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])


@pytest.mark.parametrize(
    ("role", "writes"),
    [
        ("reader", []),
        ("trainer", ["lora", "datasets", "results"]),
        ("ci", ["results"]),
        ("keeper", ["lora", "datasets", "models", "results"]),
    ],
)
def test_a_role_may_do_its_work_and_nothing_else(role, writes, bucket, tmp_path, capfd, monkeypatch):
    run, new = write(tmp_path / "run", FILES), bucket.name
    for kind in ("lora", "datasets", "models", "results"):
        assert storage(capfd, "push", run, f"{kind}/{new}")[0] == 0
    write(run, {"README.md": b"# new"})
    act_as(role, bucket, monkeypatch)
    assert f"lora/{new}  release 1" in storage(capfd, "ls", "lora")[1]
    assert storage(capfd, "pull", f"models/{new}", tmp_path / "copy")[0] == 0
    for kind in ("lora", "datasets", "models", "results"):
        status, _, err = storage(capfd, "push", run, f"{kind}/{new}", "--force")
        assert status == (0 if kind in writes else 2), (kind, err)
        assert kind in writes or "may not write there; ask for s3:PutObject" in err
    stray = f"lora/{new}/content/{'0' * 64}"
    bucket.client.put_object(Bucket=bucket.server.bucket, Key=stray, Body=b"stray")
    later = time.time() + 1e6
    with monkeypatch.context() as patch:
        patch.setattr("acestep_pipeline.storage.store_care.time.time", lambda: later)
        status, out, err = storage(capfd, "gc", f"lora/{new}")
    if role == "keeper":
        assert status == 0 and "removed 1 objects" in out
    else:
        assert status == 2 and "s3:DeleteObject" in err
        assert bucket.client.head_object(Bucket=bucket.server.bucket, Key=stray)
    store = boto3.client("s3", endpoint_url=bucket.server.url, region_name="us-east-1")
    with pytest.raises(store.exceptions.ClientError, match="AccessDenied"):
        store.delete_object(Bucket=bucket.server.bucket, Key=f"lora/{new}/manifest.json")


def test_the_policies_in_docs_are_those_that_the_command_prints():
    for role in ROLES:
        assert json.loads((ROOT / "docs" / "iam" / f"{role}.json").read_text()) == access_policy(
            role, "s3://my-bucket"
        )
    below = access_policy("reader", "s3://my-bucket/team")["Statement"]
    assert below[0]["Condition"] == {"StringLike": {"s3:prefix": ["team/", "team/*"]}}
    assert below[1]["Resource"] == ["arn:aws:s3:::my-bucket/team/*"]
    with pytest.raises(UsageError, match="there is no role 'admin'"):
        access_policy("admin", "s3://my-bucket")
