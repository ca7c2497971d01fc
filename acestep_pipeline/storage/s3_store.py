"""Releases kept on S3: the keys below a prefix (`stores`), read and written with conditions and checksums."""

import contextlib
import time
from collections.abc import Callable, Iterable
from email.utils import parsedate_to_datetime
from pathlib import Path

from ..errors import UsageError
from . import s3_downloads, s3_uploads
from .copies import NUM_WORKERS
from .folder_store import BLOCK_BYTES, Stored, digest
from .release_manifest import PROBE_KEY
from .s3 import RemoteFile, open_client, parse_address, read_object, s3_errors, shown
from .transfer_progress import ByteCount, Workers

# What says that a condition does not hold, that another request was writing, that what to compare with is gone.
_LOST = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409", "NoSuchKey", "404"}


class S3Store:
    """Keys below `s3://bucket/prefix`. Every method raises `UsageError` or `RunError` for what S3 refuses."""

    def __init__(self, url: str, *, num_workers: int = NUM_WORKERS) -> None:
        self.bucket, self.folder = parse_address(url)
        self.url = url.rstrip("/")
        # How far the server's clock is ahead of this machine's, to the second.
        self.clock_ahead_s = 0.0
        # When, by the server's clock, the listing began.
        self.listed_at = 0.0
        with s3_errors(url):
            self.client = open_client(num_workers)
            s3_uploads.watch_bodies(self.client)

    def list_keys(self, prefix: str = "") -> list[Stored]:
        """Everything whose key begins with `prefix`."""
        found = []
        with s3_errors(self.url):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.folder + prefix
            )
            for page in pages:
                self._look_at_clock(page["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
                for entry in page.get("Contents", []):
                    key, modified = entry["Key"].removeprefix(self.folder), entry["LastModified"].timestamp()
                    found.append(Stored(key, entry["Size"], entry["ETag"], modified))
        return found

    def _look_at_clock(self, date: str) -> None:
        with contextlib.suppress(TypeError, ValueError):
            now = parsedate_to_datetime(date).timestamp()
            self.clock_ahead_s = now - time.time()
            self.listed_at = self.listed_at or now

    def list_level(self, prefix: str) -> tuple[list[str], list[str]]:
        """The keys directly below `prefix`, and the prefixes (ending in /) below which there are more."""
        with s3_errors(self.url):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.folder + prefix, Delimiter="/"
            )
            keys, prefixes = [], []
            for page in pages:
                keys += [entry["Key"].removeprefix(self.folder) for entry in page.get("Contents", [])]
                prefixes += [entry["Prefix"].removeprefix(self.folder) for entry in page.get("CommonPrefixes", [])]
        return keys, prefixes

    def read(self, key: str, *, max_bytes: int) -> tuple[bytes, str] | None:
        """A small object and its tag; None where there is none."""
        with s3_errors(self.url):
            return read_object(self.client, self.bucket, self.folder + key, max_bytes=max_bytes)

    def write(self, key: str, data: bytes, *, replaces: str | None) -> bool:
        """Write a small object if there is none (`replaces` None) or it still has the tag `replaces`; whether it did.

        False also after a success whose answer was lost and that was tried again: read it to know.
        """
        condition = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces}
        with s3_errors(self.url, writing=True):
            try:
                self.client.put_object(
                    Bucket=self.bucket, Key=self.folder + key, Body=data, ContentType="application/json", **condition
                )
            except self.client.exceptions.ClientError as error:
                code = str(error.response.get("Error", {}).get("Code", ""))
                if code == "NotImplemented":
                    raise self._unconditional() from None
                if code not in _LOST:
                    raise
                return False
        return True

    def check_conditional_writes(self) -> None:
        """Make sure that the server refuses a write whose condition does not hold.

        Raises:
            UsageError: it does not, so that of two publishers both would believe to have won.
        """
        created = self.write(PROBE_KEY, b"{}", replaces=None)
        if created and self.write(PROBE_KEY, b"{}", replaces=None):
            raise self._unconditional()
        if self.write(PROBE_KEY, b"{}", replaces='"00000000000000000000000000000000"'):
            raise self._unconditional()

    def _unconditional(self) -> UsageError:
        return UsageError(
            f"{shown(self.url)}: this S3 server does not heed conditional writes (If-None-Match, If-Match), so that "
            "publishers could undo each other's work; use one that does, such as AWS, or a folder."
        )

    def put(self, path: Path, key: str, *, size: int, sha256: str | None, count: ByteCount, workers: Workers) -> None:
        """Upload a file's content; the server checks SHA-256, of the whole or of each part. It is computed if it isn't
        known."""
        with s3_errors(self.url, writing=True):
            s3_uploads.send(
                self.client,
                self.bucket,
                self.folder + key,
                path,
                size=size,
                sha256=sha256,
                workers=workers,
                count=count,
            )

    def fetch(self, stored: Stored, path: Path, *, count: ByteCount, workers: Workers) -> str | None:
        """Download to `path`, no more than `stored.size` bytes; what S3 knows of the content is checked. Returns its
        SHA-256 where that was computed on the way."""
        remote = RemoteFile(self.folder + stored.key, stored.size, stored.etag)
        with s3_errors(self.url):
            return s3_downloads.fetch(self.client, self.bucket, remote, path, workers=workers, count=count)

    def hash(self, key: str, *, size: int, count: Callable[[int], None]) -> str | None:
        """The SHA-256 of what lies under a key, as it is read now; None where there is nothing or another size."""
        with s3_errors(self.url):
            from botocore.exceptions import FlexibleChecksumError

            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=self.folder + key)
            except self.client.exceptions.NoSuchKey:
                return None
            if answer["ContentLength"] != size:
                return None
            try:
                return digest(answer["Body"].iter_chunks(BLOCK_BYTES), count)
            except FlexibleChecksumError:  # it is not even what S3 believes it to be
                return ""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove what lies under these keys."""
        with s3_errors(self.url, writing=True):
            for key in keys:
                self.client.delete_object(Bucket=self.bucket, Key=self.folder + key)

    def unfinished(self, prefix: str) -> list[Stored]:
        """Uploads in parts that were begun and neither finished nor given up; `etag` is the upload's id."""
        with s3_errors(self.url, writing=True):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self.folder + prefix
            )
            return [
                Stored(each["Key"].removeprefix(self.folder), 0, each["UploadId"], each["Initiated"].timestamp())
                for page in pages
                for each in page.get("Uploads", [])
            ]

    def give_up(self, uploads: Iterable[Stored]) -> None:
        """Abort such uploads, which frees their parts."""
        with s3_errors(self.url, writing=True):
            for each in uploads:
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=self.folder + each.key, UploadId=each.etag)
