"""Carry files to and from S3, small ones in one request, large ones in parts; a cut one goes on with the parts it had.

Everything is called within `s3_errors`. What is sent carries its SHA-256, of the whole or of each part, which S3
compares with what arrives and keeps (`x-amz-checksum-sha256`).
"""

import base64
import hashlib
import io
import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..data.text.text_files import one_line
from ..engines import map_in_order
from ..errors import RunError
from ..files import write_text
from ..paths import cache_dir
from .s3 import RemoteFile, is_intact
from .transfer_progress import ByteCount, is_large

# Parts of a large file, the last one apart, are of this size or larger, and at most so many (S3 user guide, "Multipart
# upload limits").
PART_BYTES = 8 * 1024**2
_MAX_PARTS = 10_000
_LEDGER = ".parts"
# How often what arrives damaged is fetched, and a request whose answer breaks off is made.
_ATTEMPTS, _REQUESTS = 3, 5
_BLOCK_BYTES, _LIMITED_BLOCK_BYTES = 1 << 20, 1 << 16


def _parts(size: int) -> list[tuple[int, int]]:
    """Where each part of a file begins and ends."""
    part = max(PART_BYTES, -(-size // _MAX_PARTS))
    return [(start, min(start + part, size)) for start in range(0, size, part)]


# --- upload ----------------------------------------------------------------------------------------------------------


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
    client: Any, bucket: str, key: str, path: Path, *, size: int, sha256: str, threads: int, count: ByteCount
) -> None:
    """Upload a file of this size and SHA-256.

    Raises `RunError` where it changes meanwhile. Of a large file, an upload that was begun here for the same key and
    did not end is continued: parts that are there as they should be are not sent again.
    """
    if is_large(size):
        if not _send_parts(client, bucket, key, path, size=size, threads=threads, count=count):
            # Someone else has finished or given up the upload that was begun.
            count(-size)
            if not _send_parts(client, bucket, key, path, size=size, threads=threads, count=count):
                raise RunError(f"s3://{bucket}/{one_line(key)} is being written by others as well; run it again.")
        return
    with path.open("rb") as file:
        client.put_object(
            Bucket=bucket, Key=key, Body=CountedBody(file, count), ChecksumSHA256=_base64(bytes.fromhex(sha256))
        )


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _send_parts(client: Any, bucket: str, key: str, path: Path, *, size: int, threads: int, count: ByteCount) -> bool:
    """Upload in parts; False where the upload is no longer there and the object isn't either."""
    before = path.stat()
    where = {"Bucket": bucket, "Key": key}
    record = _upload_record(client, bucket, key)
    upload, there = _begun_upload(client, where, record)
    where["UploadId"] = upload
    parts = _parts(size)

    def send_part(number: int) -> tuple[dict, bytes]:
        start, end = parts[number - 1]
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        digest = hashlib.sha256(data).digest()
        etag = _tag_if_equal(there.get(number), data, digest)
        if etag is None:
            body = CountedBody(io.BytesIO(data), count) if count.is_limited else data
            sent = client.upload_part(**where, PartNumber=number, Body=body, ChecksumSHA256=_base64(digest))
            etag = sent["ETag"]
            if body is data:
                count(len(data))
        else:
            count.skip(len(data))
        return {"PartNumber": number, "ETag": etag, "ChecksumSHA256": _base64(digest)}, digest

    checksum = None
    try:
        sent = list(map_in_order(send_part, range(1, len(parts) + 1), num_workers=threads))
        if (path.stat().st_size, path.stat().st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise RunError(f"{one_line(str(path))} changed while it was sent; run it again.")
        checksum = f"{_base64(hashlib.sha256(b''.join(digest for _, digest in sent)).digest())}-{len(sent)}"
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
    place = json.dumps([client.meta.endpoint_url, bucket, key, PART_BYTES])
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
        return part["ETag"] if part["ChecksumSHA256"] == _base64(digest) else None
    return part["ETag"] if part["ETag"].strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest() else None


def _head_or_none(client: Any, bucket: str, key: str) -> dict | None:
    try:
        return client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    except client.exceptions.ClientError:
        return None


# --- download --------------------------------------------------------------------------------------------------------


def fetch(client: Any, bucket: str, file: RemoteFile, path: Path, *, threads: int, count: ByteCount) -> None:
    """Download one object to `path`, again if it arrives damaged.

    A large one that breaks off leaves its parts and a list of them (`<name>.parts`), and the next call for the same
    object and path fetches the others. Raises `RunError` when the object has changed since it was listed, or stays
    damaged.
    """
    from botocore.exceptions import FlexibleChecksumError

    for _ in range(_ATTEMPTS):
        try:
            (_fetch_parts if is_large(file.size) else _fetch_whole)(client, bucket, file, path, threads, count)
            if is_intact(client, bucket, file, path):
                return
            count(-file.size)
        except FlexibleChecksumError:
            pass  # as damaged as one whose MD5 is wrong
    raise RunError(
        f"s3://{bucket}/{one_line(file.key)} arrived damaged {_ATTEMPTS} times, or changed meanwhile; run it again, "
        "what is complete is kept."
    )


def _fetch_whole(client: Any, bucket: str, file: RemoteFile, path: Path, threads: int, count: ByteCount) -> None:
    for attempt in range(_REQUESTS):
        arrived = 0
        try:
            with path.open("wb") as sink:
                for block in _blocks(client, bucket, file, (0, file.size), count):
                    sink.write(block)
                    arrived += len(block)
                    count(len(block))
            return
        except _broken() as error:
            _pause_or_raise(attempt, error)
        finally:
            if arrived != file.size:
                count(-arrived)


def _fetch_parts(client: Any, bucket: str, file: RemoteFile, path: Path, threads: int, count: ByteCount) -> None:
    parts = _parts(file.size)
    ledger = path.with_name(path.name + _LEDGER)
    identity = json.dumps([bucket, file.key, file.etag, file.size, len(parts)])
    done = _read_ledger(ledger, identity, path, file.size)
    if not done:
        with path.open("wb") as sink:
            sink.truncate(file.size)
        ledger.write_text(f"{identity}\n", encoding="utf-8")
    lock = threading.Lock()
    with path.open("r+b", buffering=0) as sink, ledger.open("a", encoding="utf-8") as record:

        def fetch_part(number: int) -> None:
            start, end = parts[number]
            if number in done:
                count.skip(end - start)
                return
            for attempt in range(_REQUESTS):
                try:
                    for block in _blocks(client, bucket, file, (start, end), count):
                        _write_at(sink.fileno(), block, start)
                        start += len(block)
                        count(len(block))
                    break
                except _broken() as error:
                    _pause_or_raise(attempt, error)
            with lock:
                record.write(f"{number}\n")
                record.flush()

        for _ in map_in_order(fetch_part, range(len(parts)), num_workers=threads):
            pass
    ledger.unlink()


def _read_ledger(ledger: Path, identity: str, path: Path, size: int) -> set[int]:
    """The numbers of the parts that an earlier download of the same object left in `path`."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != size or not ledger.is_file():
        return set()
    first, *numbers = ledger.read_text(encoding="utf-8").split("\n")
    # The last line may have been cut: what follows it is empty only where it was not.
    return {int(number) for number in numbers[:-1] if re.fullmatch(r"\d{1,5}", number)} if first == identity else set()


def _blocks(client: Any, bucket: str, file: RemoteFile, span: tuple[int, int], count: ByteCount) -> Iterator[bytes]:
    """The bytes of an object from one place to another, and never more than these."""
    start, end = span
    whole = span == (0, file.size)
    ranged = {} if whole else {"Range": f"bytes={start}-{end - 1}"}
    answer = client.get_object(Bucket=bucket, Key=file.key, IfMatch=file.etag, **ranged)
    if answer["ContentLength"] > end - start:  # before it fills the disk
        raise RunError(f"s3://{bucket}/{one_line(file.key)} is larger than the server said it was.")
    yield from answer["Body"].iter_chunks(_LIMITED_BLOCK_BYTES if count.is_limited else _BLOCK_BYTES)


def _write_at(descriptor: int, block: bytes, offset: int) -> None:
    view = memoryview(block)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _broken() -> tuple[type[Exception], ...]:
    """What botocore raises where an answer breaks off."""
    from botocore import exceptions

    return exceptions.IncompleteReadError, exceptions.ResponseStreamingError, exceptions.ReadTimeoutError


def _pause_or_raise(attempt: int, error: Exception) -> None:
    if attempt + 1 == _REQUESTS:
        raise error
    time.sleep(random.uniform(0, 0.1 * 2**attempt))


def keep_unfinished(folder: Path) -> None:
    """Remove what a cut transfer left in a folder, but for large downloads that can go on."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        name = path.name.removesuffix(_LEDGER)
        pair = (folder / name, folder / f"{name}{_LEDGER}")
        if not all(each.is_file() and not each.is_symlink() for each in pair):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
