"""What S3 knows of an object's content, and whether a file is that."""

import base64
import binascii
import contextlib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .s3 import RemoteFile


def to_base64(digest: bytes) -> str:
    """A digest as S3 writes it."""
    return base64.b64encode(digest).decode()


def is_intact(client: Any, bucket: str, file: "RemoteFile", path: Path) -> bool:
    """Whether a download has the size that was listed and, where the ETag is made of MD5s, those."""
    return has_etag(client, bucket, file, path) is not False


def has_etag(client: Any, bucket: str, file: "RemoteFile", path: Path) -> bool | None:
    """Whether a file has an object's size and checksums; None where S3 has none that can be compared.

    An ETag is the content's MD5, but not for objects encrypted with KMS or a customer's key, nor in directory buckets
    (S3 user guide, "Checking object integrity"). For an upload in parts, see `checksum_of_parts`.
    """
    if path.stat().st_size != file.size:
        return False
    if not is_md5(bucket, file.etag):
        parts = checksum_of_parts(client, bucket, file)
        return None if parts is None else parts.matches(_digests(path, parts.sizes, parts.algorithm))
    if _digests(path, [file.size], "md5")[0].hex() == file.etag.strip('"'):
        return True
    head = client.head_object(Bucket=bucket, Key=file.key)
    return None if is_encrypted(head) else False


def is_md5(bucket: str, etag: str) -> bool:
    """Whether an ETag looks like the content's MD5."""
    return re.fullmatch('"?[0-9a-f]{32}"?', etag) is not None and not bucket.endswith("--x-s3")


def is_encrypted(head: dict) -> bool:
    """Whether the ETag in an answer of botocore's is no MD5, as the object is encrypted with KMS or one's own key."""
    return head.get("ServerSideEncryption", "").startswith("aws:kms") or "SSECustomerAlgorithm" in head


@dataclass(frozen=True)
class PartsChecksum:
    """What checks an object that was uploaded in parts: the digest of its parts' digests, and the parts' sizes."""

    sizes: list[int]
    algorithm: str
    expected: bytes

    def matches(self, digests: list[bytes]) -> bool:
        return hashlib.new(self.algorithm, b"".join(digests), usedforsecurity=False).digest() == self.expected


def checksum_of_parts(client: Any, bucket: str, file: "RemoteFile") -> PartsChecksum | None:
    """The SHA-256 that was sent with an upload in parts, or else the MD5 in its ETag, a dash and the parts' number.

    None where it did not come in parts, or in parts of unequal sizes, where the server doesn't know of them, or where
    the ETag is all there is and not made of MD5s.
    """
    match = re.fullmatch(r'"?([0-9a-f]{32})-(\d+)"?', file.etag)
    if not match or bucket.endswith("--x-s3"):
        return None
    parts, where = int(match[2]), {"Bucket": bucket, "Key": file.key}
    first = client.head_object(**where, PartNumber=1)["ContentLength"]
    if not first * (parts - 1) < file.size <= first * parts:
        return None
    sizes = [first] * (parts - 1) + [file.size - first * (parts - 1)]
    head = client.head_object(**where, ChecksumMode="ENABLED")
    sha256, _, number = head.get("ChecksumSHA256", "").partition("-")
    with contextlib.suppress(binascii.Error):
        if number == match[2] and head["ETag"] == file.etag:
            return PartsChecksum(sizes, "sha256", base64.b64decode(sha256, validate=True))
    return None if is_encrypted(head) else PartsChecksum(sizes, "md5", bytes.fromhex(match[1]))


def _digests(path: Path, sizes: list[int], algorithm: str) -> list[bytes]:
    """The digest of each of a file's consecutive parts of so many bytes."""
    digests = []
    with path.open("rb") as file:
        for size in sizes:
            digest = hashlib.new(algorithm, usedforsecurity=False)
            while size and (block := file.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
            digests.append(digest.digest())
    return digests
