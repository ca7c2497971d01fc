"""Set a bucket up for releases, and say what each kind of user must be allowed there."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import UsageError
from .s3 import open_client, parse_address, s3_errors, shown

# What begins the names of our lifecycle rules: others in the bucket are kept.
_RULE_PREFIX = "acestep-"
UNFINISHED_DAYS, OLD_VERSION_DAYS, COLD_DAYS = 7, 30, 90
# Of the layout, what is read rarely once it is some months old.
COLD_KINDS = ("trajectories", "results")
# Of lora/ it is the checkpoints, lora/<name>/checkpoints/, by far the most of it. A rule's prefix has no wildcard for
# the name, so S3 is to tell them from adapters in use: what nobody reads for 30 days goes to a colder tier, after 90
# to the next, and either is read at once and without a fee ("S3 Intelligent-Tiering", user guide).
CHECKPOINTS_KIND, TIERING_DAYS = "lora", 1
ROLES = {
    "reader": "pull, ls, verify; training and generating from s3://",
    "trainer": "what a reader may, and push, but for models/; nothing can be removed",
    "ci": "what a reader may, and push to results/",
    "keeper": "what a trainer may, push to models/, rollback, and gc",
}


def set_up_bucket(address: str, *, dry_run: bool = False) -> list[str]:
    """Create the bucket if need be; switch on versions, encryption and lifecycle rules; close it to the public.

    Lifecycle rules of others are kept. A server that doesn't know a setting is told of, not an error.

    Returns:
        A sentence for each setting.

    Raises:
        UsageError: no such address, or S3 refuses.
    """
    bucket, _ = parse_address(address)
    with s3_errors(address), _named_permissions(address):
        client = open_client(1)
        found = [_create(client, bucket, dry_run)]
        settings: list[tuple[str, Callable[[], Any]]] = [
            (
                "versions are kept, so that nothing is lost by overwriting or deleting",
                lambda: client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"}),
            ),
            (
                "content is encrypted (AES-256, the server's key)",
                lambda: client.put_bucket_encryption(
                    Bucket=bucket,
                    ServerSideEncryptionConfiguration={
                        "Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]
                    },
                ),
            ),
            (
                "nothing in it can be made public",
                lambda: client.put_public_access_block(
                    Bucket=bucket,
                    PublicAccessBlockConfiguration={
                        "BlockPublicAcls": True,
                        "IgnorePublicAcls": True,
                        "BlockPublicPolicy": True,
                        "RestrictPublicBuckets": True,
                    },
                ),
            ),
            (
                f"unfinished uploads go after {UNFINISHED_DAYS} days, deleted and overwritten versions after "
                f"{OLD_VERSION_DAYS}; {', '.join(COLD_KINDS)} become STANDARD_IA after {COLD_DAYS}; "
                f"{CHECKPOINTS_KIND} INTELLIGENT_TIERING, checkpoints that nobody reads being colder after 30",
                lambda: _put_lifecycle(client, address),
            ),
        ]
        for sentence, apply in settings:
            found.append(_apply(client, sentence, apply, dry_run))
    return found


@contextlib.contextmanager
def _named_permissions(address: str) -> Iterator[None]:
    """Say what setting a bucket up takes, where it is not allowed. Use it within `s3_errors`."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if error.response.get("Error", {}).get("Code", "") != "AccessDenied":
            raise
        raise UsageError(
            f"{shown(address)}: these credentials may not set a bucket up; ask for s3:ListBucket, s3:CreateBucket, "
            "s3:PutBucketVersioning, s3:PutEncryptionConfiguration, s3:PutBucketPublicAccessBlock, "
            "s3:GetLifecycleConfiguration and s3:PutLifecycleConfiguration, or have its owner run it."
        ) from None


def _create(client: Any, bucket: str, dry_run: bool) -> str:
    try:
        client.list_objects_v2(Bucket=bucket, MaxKeys=1)  # a HEAD would not say why it is refused
        return f"the bucket {bucket} is there"
    except client.exceptions.ClientError as error:
        if str(error.response.get("Error", {}).get("Code", "")) != "NoSuchBucket":
            raise
    if dry_run:
        return f"would create the bucket {bucket}"
    region = client.meta.region_name
    where = {} if region in (None, "us-east-1") else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    try:
        client.create_bucket(Bucket=bucket, **where)
    except client.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code == "BucketAlreadyExists":
            raise UsageError(f"the bucket {bucket} belongs to someone else; choose another name.") from None
        if code == "InvalidBucketName":
            raise UsageError(f"{bucket} is no name for a bucket: 3 to 63 of a-z, 0-9 and -.") from None
        raise
    return f"the bucket {bucket} was created"


def _apply(client: Any, sentence: str, apply: Callable[[], Any], dry_run: bool) -> str:
    if dry_run:
        return f"would set: {sentence}"
    try:
        apply()
    except client.exceptions.ClientError as error:
        if error.response.get("Error", {}).get("Code", "") not in ("NotImplemented", "MethodNotAllowed"):
            raise
        return f"NOT set, this server doesn't know it: {sentence}"
    return f"set: {sentence}"


def _put_lifecycle(client: Any, address: str) -> None:
    bucket, folder = parse_address(address)
    try:
        rules = client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    except client.exceptions.ClientError as error:
        if error.response.get("Error", {}).get("Code", "") != "NoSuchLifecycleConfiguration":
            raise
        rules = []
    others = [rule for rule in rules if not rule.get("ID", "").startswith(_RULE_PREFIX)]
    configuration = {"Rules": others + lifecycle_rules(folder)}
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=configuration)


def lifecycle_rules(folder: str) -> list[dict]:
    """The lifecycle rules for what lies below `folder` ("" or ending in /), as S3 takes them."""
    clean_up = {
        "ID": f"{_RULE_PREFIX}clean-up",
        "Status": "Enabled",
        "Filter": {"Prefix": folder},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": UNFINISHED_DAYS},
        "NoncurrentVersionExpiration": {"NoncurrentDays": OLD_VERSION_DAYS},
        "Expiration": {"ExpiredObjectDeleteMarker": True},
    }
    cold = [
        {
            "ID": f"{_RULE_PREFIX}cold-{kind}",
            "Status": "Enabled",
            "Filter": {"Prefix": f"{folder}{kind}/"},
            "Transitions": [{"Days": COLD_DAYS, "StorageClass": "STANDARD_IA"}],
        }
        for kind in COLD_KINDS
    ]
    checkpoints = {
        "ID": f"{_RULE_PREFIX}checkpoints",
        "Status": "Enabled",
        "Filter": {"Prefix": f"{folder}{CHECKPOINTS_KIND}/"},
        "Transitions": [{"Days": TIERING_DAYS, "StorageClass": "INTELLIGENT_TIERING"}],
    }
    return [clean_up, *cold, checkpoints]


def access_policy(role: str, address: str) -> dict:
    """The IAM policy with the least that a role needs below an address (names: `ROLES`).

    Raises:
        UsageError: no such role or address.
    """
    if role not in ROLES:
        raise UsageError(f"there is no role {role!r}; choose {', '.join(ROLES)}.")
    bucket, folder = parse_address(address)
    arn = f"arn:aws:s3:::{bucket}"
    listing = {"Sid": "List", "Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": [arn]}
    if folder:
        listing["Condition"] = {"StringLike": {"s3:prefix": [folder, f"{folder}*"]}}
    statements = [listing, _allow("Read", ["s3:GetObject"], [f"{arn}/{folder}*"])]
    written = {
        "reader": [],
        "trainer": ["lora", "datasets", "trajectories", "results"],
        "ci": ["results"],
        "keeper": ["models", "lora", "datasets", "trajectories", "results"],
    }[role]
    below = [f"{arn}/{folder}{kind}/*" for kind in written]
    if written:
        statements.append(
            _allow("Publish", ["s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"], below)
        )
    if role == "keeper":
        # Content alone: manifests are not removed.
        content = [f"{arn}/{folder}{kind}/*/content/*" for kind in written]
        statements.append(_allow("CollectGarbage", ["s3:DeleteObject"], content))
        statements.append(_allow("FindUnfinished", ["s3:ListBucketMultipartUploads"], [arn]))
    return {"Version": "2012-10-17", "Statement": statements}


def _allow(sid: str, actions: list[str], resources: list[str]) -> dict:
    return {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resources}
