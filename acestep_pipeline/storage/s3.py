"""The objects under one `s3://` address: list them, fetch one and check it, and say in one sentence what S3 refuses.

boto3 finds the credentials (environment, `~/.aws`, the machine's role) and the server: `AWS_ENDPOINT_URL` names any
S3-compatible one. It is an optional package, imported when it is used.
"""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..data.text.text_files import one_line
from ..errors import RunError, UsageError
from ..paths import without_secrets
from .s3_checksums import is_encrypted, is_md5
from .s3_direct import attach

_ADDRESS = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/(.*))?", re.DOTALL)
_ATTEMPTS = 3
_MAY_NOT_WRITE = (
    "these credentials may not write there; ask for s3:PutObject on it (for gc: s3:DeleteObject and "
    "s3:ListBucketMultipartUploads)"
)
_CREDENTIALS_FIX = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`"
_REFUSED = {
    "NoSuchBucket": "there is no such bucket at THE_SERVER; correct the name, or AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": f"the credentials are wrong; {_CREDENTIALS_FIX}",
    "InvalidAccessKeyId": f"the credentials are not known at THE_SERVER; {_CREDENTIALS_FIX}",
    "AccessDenied": "these credentials may not read it; ask for s3:ListBucket and s3:GetObject on it",
    "BadDigest": "what arrived there is not what was sent; run it again",
    "XAmzContentChecksumMismatch": "what arrived there is not what was sent; run it again",
    "ExpiredToken": "the credentials have expired; renew them",
    "InvalidToken": "the session token is wrong; renew the credentials, or unset AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
}
_REFUSED["403"] = _REFUSED["AccessDenied"]  # the answer to a HEAD has no body to say more in
_OTHER_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}


@dataclass(frozen=True)
class RemoteFile:
    """An object: its full key, its size in bytes and its ETag, which changes with its content; of a release's file the
    SHA-256 that the manifest gives."""

    key: str
    size: int
    etag: str
    sha256: str | None = field(default=None, compare=False)


def parse_address(url: str) -> tuple[str, str]:
    """The bucket, and the folder's key: "" for the whole bucket, else ending in /."""
    match = _ADDRESS.fullmatch(url)
    if match is None:
        raise UsageError(f"{shown(url)} is not an address; write s3://bucket/folder, without keys or passwords.")
    folder = (match[2] or "").rstrip("/")
    return match[1], f"{folder}/" if folder else ""


def shown(url: str) -> str:
    """An address on one line and without secrets, for messages."""
    return one_line(url if _ADDRESS.fullmatch(url) else without_secrets(url))


def open_client(num_workers: int) -> Any:
    """A client for so many requests at a time, with boto3's settings and credentials. Call it within `s3_errors`.

    It is botocore's own, without the methods that boto3 adds: made in an eighth of the time.
    """
    import botocore.session
    from botocore.config import Config

    # Three attempts of 3.5 s, with up to 1 and 2 s between them: a server that can't be reached is said within 15 s.
    config = Config(
        retries={"mode": "standard"}, connect_timeout=3.5, read_timeout=60, max_pool_connections=max(10, num_workers)
    )
    try:
        session = botocore.session.Session()
        session.register_component("data_loader", _descriptions())
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
        client = session.create_client("s3", config=config)
    except ValueError:  # botocore's "Invalid endpoint"
        raise UsageError(f"AWS_ENDPOINT_URL {_endpoint()} is no address; write http(s)://host:port.") from None
    attach(session, client)
    return client


@functools.cache
def _descriptions() -> Any:
    """What botocore reads of the services' descriptions, read once."""
    from botocore.loaders import Loader

    class NamesOnly(Loader):
        """Takes each folder for a service's. botocore's looks into all of the 400, for each kind of description."""

        def list_available_services(self, type_name: str) -> list[str]:
            folders = [Path(folder) for folder in self.search_paths]
            return sorted({entry.name for folder in folders if folder.is_dir() for entry in os.scandir(folder)})

    return NamesOnly()


def _parse_time(value: Any) -> datetime:
    """A time of S3's. botocore's parser first finds out how it is written, which for a listing's takes longest."""
    if isinstance(value, str) and value[10:11] == "T":
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(value)
    from botocore.utils import parse_timestamp

    return parse_timestamp(value)


def _endpoint() -> str:
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return one_line(without_secrets(address)) if address else "the S3 server"


def list_folder(client: Any, bucket: str, folder: str) -> list[RemoteFile]:
    """Every object whose key begins with `folder`, in the order of the keys."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder)
    return [
        RemoteFile(entry["Key"], entry["Size"], entry["ETag"]) for page in pages for entry in page.get("Contents", [])
    ]


@contextlib.contextmanager
def s3_errors(url: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what boto3 raises while reading (or `writing`) into one sentence. Nothing of its own texts is passed on:
    some hold addresses with passwords in them (a proxy's, an endpoint's)."""
    try:
        from botocore import exceptions as failures
    except ImportError:
        raise UsageError(f"{shown(url)} needs boto3: pip install 'ace-step-lora[s3]'.") from None
    wanted, name = shown(url), lambda error: type(error).__name__
    endpoint = _endpoint()
    try:
        yield
    except failures.ClientError as error:
        code = one_line(str(error.response.get("Error", {}).get("Code", "")))
        if code in ("NoSuchKey", "PreconditionFailed") or (code == "404" and error.operation_name == "HeadObject"):
            raise RunError(f"{wanted} changed while it was read; run it again, what is complete is kept.") from None
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
            raise RunError(f"{wanted}: {endpoint} is busy or broken ({code}); run it again later.") from None
        if writing and code == "AccessDenied":
            raise UsageError(f"{wanted}: {_MAY_NOT_WRITE}.") from None
        if code in _OTHER_REGION:
            raise UsageError(f"{wanted}: {_describe_region(error.response)}.") from None
        reason = _REFUSED.get(code, f"THE_SERVER refused it ({code}); check the address and the credentials")
        reason = reason.replace("THE_SERVER", endpoint)
        raise UsageError(f"{wanted}: {reason}.") from None
    except (failures.IncompleteReadError, failures.ResponseStreamingError) as error:
        raise RunError(f"{wanted}: the connection broke ({name(error)}); run it again to continue.") from None
    except (failures.NoCredentialsError, failures.PartialCredentialsError, failures.ProfileNotFound) as error:
        raise UsageError(f"{wanted}: no credentials ({name(error)}); {_CREDENTIALS_FIX}.") from None
    except (failures.ConnectionClosedError, failures.ReadTimeoutError) as error:
        reason = f"the connection to {endpoint} broke ({name(error)})"
        raise RunError(f"{wanted}: {reason}; run it again to continue, or check AWS_ENDPOINT_URL.") from None
    except (failures.ConnectionError, failures.HTTPClientError) as error:
        raise UsageError(f"{wanted}: {endpoint} can't be reached ({name(error)}); check AWS_ENDPOINT_URL.") from None
    except failures.BotoCoreError as error:  # a credential source that fails, a damaged configuration, …
        raise UsageError(f"{wanted} can't be read ({name(error)}); check the AWS settings.") from None


def _describe_region(response: dict) -> str:
    """Where a bucket is, as far as S3 says so, and what to set."""
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") or response.get("Error", {}).get("Region") or ""
    if not re.fullmatch(r"[a-z0-9-]{1,40}", region):
        return "the bucket is in another region; set AWS_DEFAULT_REGION to it"
    return f"the bucket is in another region, {region}; set AWS_DEFAULT_REGION={region}"


def read_object(client: Any, bucket: str, key: str, *, max_bytes: int) -> tuple[bytes, str] | None:
    """A small object and its ETag, read again if it arrives damaged; None where there is none.

    What tells is the checksum that S3 sends along, or else an ETag that is the content's MD5. Call it within
    `s3_errors`. Raises `UsageError` where it is larger, `RunError` where it stays damaged.
    """
    from botocore.exceptions import ClientError, FlexibleChecksumError, IncompleteReadError, ResponseStreamingError

    where = f"s3://{bucket}/{one_line(key)}"
    for _ in range(_ATTEMPTS):
        try:
            answer = client.get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            # 404 where the answer's body, which has the code, was cut.
            if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                return None
            raise
        if answer["ContentLength"] > max_bytes:
            raise UsageError(f"{where} is larger than {max_bytes} bytes, which it can't rightly be.")
        try:
            # To the end: botocore looks at the checksum only there.
            data = b"".join(answer["Body"].iter_chunks(1 << 20))
        except (FlexibleChecksumError, IncompleteReadError, ResponseStreamingError):
            continue
        plain = is_md5(bucket, answer["ETag"]) and not is_encrypted(answer)
        if not plain or hashlib.md5(data, usedforsecurity=False).hexdigest() == answer["ETag"].strip('"'):
            return data, answer["ETag"]
    raise RunError(f"{where} arrived damaged {_ATTEMPTS} times, or cut; run it again.")
