"""Send files to S3: small ones in one request, large ones in parts; a cut one goes on with the parts that are there.

Everything is called within `s3_errors`. What is sent carries its SHA-256, of the whole or of each part, which S3
compares with what arrives and keeps (`x-amz-checksum-sha256`). Requests go directly (`s3_direct`) where that can be,
and through botocore where it can't or fails.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

from ..data.text.text_files import one_line
from ..errors import RunError
from ..files import sha256 as sha256_of
from ..files import write_text
from ..paths import cache_dir
from .s3_checksums import to_base64
from .s3_direct import direct_requests
from .transfer_progress import PART_BYTES, ByteCount, Workers, is_large, part_spans


class CountedBody:
    """A file to send that counts what is read of it for the network (and not what is read for a signature)."""

    def __init__(self, file: BinaryIO, count: ByteCount) -> None:
        self._file, self._count, self.is_sending = file, count, False

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if self.is_sending:
            self._count(len(data))
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        before = self._file.tell()
        after = self._file.seek(offset, whence)
        if self.is_sending and after < before:  # it is sent again
            self._count(after - before)
        return after

    def tell(self) -> int:
        return self._file.tell()


def watch_bodies(client: Any) -> None:
    """Tell each `CountedBody` of a client's requests when it is read to be sent."""

    def tell(is_sending: bool) -> Any:
        def handler(request, **kwargs) -> None:
            if isinstance(request.body, CountedBody):
                request.body.is_sending = is_sending

        return handler

    client.meta.events.register_first("request-created.s3", tell(False))
    client.meta.events.register_last("request-created.s3", tell(True))


def send(
    client: Any,
    bucket: str,
    key: str,
    path: Path,
    *,
    size: int,
    sha256: str | None,
    workers: Workers,
    count: ByteCount,
) -> None:
    """Upload a file of this size and, if it is known, SHA-256.

    Raises `RunError` where it changes meanwhile. Of a large file, an upload that was begun here for the same key and
    did not end is continued: parts that are there as they should be are not sent again.
    """
    if is_large(size):
        if not _send_parts(client, bucket, key, path, size=size, workers=workers, count=count):
            # Someone else has finished or given up the upload that was begun.
            count(-size)
            if not _send_parts(client, bucket, key, path, size=size, workers=workers, count=count):
                raise RunError(f"s3://{bucket}/{one_line(key)} is being written by others as well; run it again.")
        return
    where = {"Bucket": bucket, "Key": key}
    if size <= PART_BYTES:
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest() if sha256 is None else bytes.fromhex(sha256)
        _send_bytes(client, where, data, digest, count)
        return
    checksum = to_base64(bytes.fromhex(sha256 or sha256_of(path)))
    with path.open("rb") as file:
        client.put_object(**where, Body=CountedBody(file, count), ChecksumSHA256=checksum)


def _send_bytes(client: Any, where: dict, data: bytes, digest: bytes, count: ByteCount) -> str:
    """Send an object, or (with UploadId and PartNumber in `where`) a part of one; returns its ETag."""
    checksum = {"ChecksumSHA256": to_base64(digest)}
    request = client.upload_part if "PartNumber" in where else client.put_object
    if count.is_limited:  # botocore reads what it sends in small blocks
        return request(**where, **checksum, Body=CountedBody(io.BytesIO(data), count))["ETag"]
    direct = direct_requests(client)
    etag = direct and direct.put(where, data, digest)
    if etag is None:
        etag = request(**where, **checksum, Body=data)["ETag"]
    count(len(data))
    return etag


def _send_parts(
    client: Any, bucket: str, key: str, path: Path, *, size: int, workers: Workers, count: ByteCount
) -> bool:
    """Upload in parts; False where the upload is no longer there and the object isn't either."""
    before = path.stat()
    where = {"Bucket": bucket, "Key": key}
    record = _upload_record(client, bucket, key)
    upload, there = _begun_upload(client, where, record)
    where["UploadId"] = upload
    parts = part_spans(size)

    def send_part(number: int) -> tuple[dict, bytes]:
        start, end = parts[number - 1]
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        digest = hashlib.sha256(data).digest()
        etag = _tag_if_equal(there.get(number), data, digest)
        if etag is None:
            etag = _send_bytes(client, {**where, "PartNumber": number}, data, digest, count)
        else:
            count.skip(len(data))
        return {"PartNumber": number, "ETag": etag, "ChecksumSHA256": to_base64(digest)}, digest

    checksum = None
    try:
        sent = list(workers.map(send_part, range(1, len(parts) + 1)))
        if (path.stat().st_size, path.stat().st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise RunError(f"{one_line(str(path))} changed while it was sent; run it again.")
        checksum = f"{to_base64(hashlib.sha256(b''.join(digest for _, digest in sent)).digest())}-{len(sent)}"
        found = client.complete_multipart_upload(**where, MultipartUpload={"Parts": [part for part, _ in sent]})
    except client.exceptions.ClientError as error:
        if error.response.get("Error", {}).get("Code") not in ("NoSuchUpload", "404", "InvalidPart"):
            raise
        record.unlink(missing_ok=True)
        found = _head_or_none(client, bucket, key)  # the answer to its completion may have been lost
        if checksum is None or found is None or found.get("ChecksumSHA256") != checksum:
            return False
    record.unlink(missing_ok=True)
    if found.get("ChecksumSHA256", checksum) != checksum:
        raise RunError(f"s3://{bucket}/{one_line(key)}: what arrived there is not what was sent; run it again.")
    return True


def _upload_record(client: Any, bucket: str, key: str) -> Path:
    """Where the id of an unfinished upload to this key is kept."""
    place = json.dumps([client.meta.endpoint_url, bucket, key])
    return cache_dir() / "uploads" / hashlib.sha256(place.encode()).hexdigest()[:32]


def _begun_upload(client: Any, where: dict, record: Path) -> tuple[str, dict[int, dict]]:
    """The id of the upload that was begun, and its parts by number; of a new one where there is none."""
    if record.is_file():
        upload = record.read_text(encoding="utf-8")
        try:
            pages = client.get_paginator("list_parts").paginate(**where, UploadId=upload)
            return upload, {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}
        except client.exceptions.ClientError:
            pass  # it is no more, or its parts may not be listed
    upload = client.create_multipart_upload(**where, ChecksumAlgorithm="SHA256")["UploadId"]
    write_text(record, upload)
    return upload, {}


def _tag_if_equal(part: dict | None, data: bytes, digest: bytes) -> str | None:
    """The ETag of a part that is there, if it is these bytes."""
    if part is None or part["Size"] != len(data):
        return None
    if "ChecksumSHA256" in part:
        return part["ETag"] if part["ChecksumSHA256"] == to_base64(digest) else None
    return part["ETag"] if part["ETag"].strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest() else None


def _head_or_none(client: Any, bucket: str, key: str) -> dict | None:
    try:
        return client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    except client.exceptions.ClientError:
        return None
