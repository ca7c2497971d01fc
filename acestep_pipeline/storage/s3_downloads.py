"""Bring objects from S3 into files: small ones in one request, large ones in parts; what was cut goes on from there.

Everything is called within `s3_errors`. What arrives is hashed on its way and compared with the checksum that S3 has.
Requests go directly (`s3_direct`) where that can be, and through botocore where it can't or fails.
"""

import hashlib
import json
import os
import random
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from ..data.text.text_files import one_line
from ..errors import RunError
from .s3 import RemoteFile
from .s3_checksums import checksum_of_parts, is_intact, is_md5, to_base64
from .s3_direct import Answer, direct_requests
from .transfer_progress import ByteCount, Workers, is_large, part_spans

# An object whose own parts are larger is fetched in ours, and hashed when all is there.
_MAX_PART_BYTES = 64 * 1024**2
_LEDGER = ".parts"
# How often what arrives damaged is fetched, and a request whose answer breaks off is made.
_ATTEMPTS, _REQUESTS = 3, 5
_BLOCK_BYTES, _LIMITED_BLOCK_BYTES = 1 << 20, 1 << 16
# Of a file more at a time would have Linux (6.18, ext4) take pages in long rows, which a virtual machine's host may
# first have to give: writing 1 GB then took 1.7 s instead of 0.2 s.
_WRITE_BYTES = 1 << 16


def fetch(client: Any, bucket: str, file: RemoteFile, path: Path, *, workers: Workers, count: ByteCount) -> str | None:
    """Download one object to `path`, again if it arrives damaged.

    A large one that breaks off leaves its parts and a list of them (`<name>.parts`), and the next call for the same
    object and path fetches the others. Raises `RunError` when the object has changed since it was listed, or stays
    damaged.

    Returns:
        The SHA-256 of what has arrived, where it was computed on the way.
    """
    from botocore.exceptions import FlexibleChecksumError

    for attempt in range(_ATTEMPTS):
        try:
            if is_large(file.size):
                sha256, intact = None, _fetch_parts(client, bucket, file, path, workers, count, direct=not attempt)
            else:
                sha256, intact = _fetch_whole(client, bucket, file, path, count, direct=not attempt)
            if intact or (intact is None and is_intact(client, bucket, file, path)):
                return sha256
            count(-file.size)
        except FlexibleChecksumError:
            pass  # as damaged as one whose MD5 is wrong
    raise RunError(
        f"s3://{bucket}/{one_line(file.key)} arrived damaged {_ATTEMPTS} times, or changed meanwhile; run it again, "
        "what is complete is kept."
    )


def _fetch_whole(
    client: Any, bucket: str, file: RemoteFile, path: Path, count: ByteCount, *, direct: bool
) -> tuple[str | None, bool | None]:
    """Returns the SHA-256, if that is what was computed, and whether the checksum is right; None where there is none
    to compare."""
    for attempt in range(_REQUESTS):
        arrived = 0
        try:
            with path.open("wb", buffering=0) as sink:
                answer = _ask(client, bucket, file, (0, file.size), count, direct=direct and not attempt)
                digest = hashlib.new("sha256" if answer.sha256 else "md5", usedforsecurity=False)
                for block in answer.blocks:
                    digest.update(block)
                    _write_at(sink.fileno(), block, arrived)
                    arrived += len(block)
                    count(len(block))
            break
        except _broken() as error:
            _pause_or_raise(attempt, error)
        finally:
            if arrived != file.size:
                count(-arrived)
    if answer.sha256:
        return digest.hexdigest(), to_base64(digest.digest()) == answer.sha256
    # An ETag that looks like an MD5 may be none.
    return None, (digest.hexdigest() == file.etag.strip('"') and is_md5(bucket, file.etag)) or None


def _fetch_parts(
    client: Any, bucket: str, file: RemoteFile, path: Path, workers: Workers, count: ByteCount, *, direct: bool
) -> bool | None:
    """Returns whether the checksum is right; None where it can't be computed on the way."""
    checksum = checksum_of_parts(client, bucket, file)
    if checksum is not None and checksum.sizes[0] > _MAX_PART_BYTES:
        checksum = None
    parts = part_spans(file.size, checksum.sizes[0] if checksum else None)
    ledger = path.with_name(path.name + _LEDGER)
    identity = json.dumps([bucket, file.key, file.etag, file.size, parts[0][1]])
    done = _read_ledger(ledger, identity, path, file.size)
    if not done:
        with path.open("wb") as sink:
            sink.truncate(file.size)
        ledger.write_text(f"{identity}\n", encoding="utf-8")
    # One thread writes to the file at a time: Linux would let the others spin for its lock, at twice the work in all.
    lock, writing = threading.Lock(), threading.Lock()
    with path.open("r+b", buffering=0) as sink, ledger.open("a", encoding="utf-8") as record:

        def fetch_part(number: int) -> bytes | None:
            start, end = parts[number]
            digest = hashlib.new(checksum.algorithm, usedforsecurity=False) if checksum else None
            if number in done:
                count.skip(end - start)
                if digest:
                    digest.update(os.pread(sink.fileno(), end - start, start))
                return digest and digest.digest()
            for attempt in range(_REQUESTS):
                try:
                    answer = _ask(client, bucket, file, (start, end), count, direct=direct and not attempt)
                    for block in answer.blocks:
                        if digest:
                            digest.update(block)
                        with writing:
                            _write_at(sink.fileno(), block, start)
                        start += len(block)
                        count(len(block))
                    break
                except _broken() as error:
                    _pause_or_raise(attempt, error)
            with lock:
                record.write(f"{number}\n")
                record.flush()
            return digest and digest.digest()

        digests = list(workers.map(fetch_part, range(len(parts))))
    ledger.unlink()
    return checksum and checksum.matches(digests)


def _read_ledger(ledger: Path, identity: str, path: Path, size: int) -> set[int]:
    """The numbers of the parts that an earlier download of the same object left in `path`."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != size or not ledger.is_file():
        return set()
    first, *numbers = ledger.read_text(encoding="utf-8").split("\n")
    # The last line may have been cut: what follows it is empty only where it was not.
    return {int(number) for number in numbers[:-1] if re.fullmatch(r"\d{1,5}", number)} if first == identity else set()


def _ask(
    client: Any, bucket: str, file: RemoteFile, span: tuple[int, int], count: ByteCount, *, direct: bool
) -> Answer:
    """The bytes of an object from one place to another, and never more than these."""
    start, end = span
    block = _LIMITED_BLOCK_BYTES if count.is_limited else _BLOCK_BYTES
    way = direct_requests(client) if direct else None
    answer = way and way.get(bucket, file.key, etag=file.etag, size=file.size, span=span, block=block)
    if answer is not None:
        return answer
    ranged = {} if span == (0, file.size) else {"Range": f"bytes={start}-{end - 1}"}
    answer = client.get_object(Bucket=bucket, Key=file.key, IfMatch=file.etag, **ranged)
    if answer["ContentLength"] > end - start:  # before it fills the disk
        raise RunError(f"s3://{bucket}/{one_line(file.key)} is larger than the server said it was.")
    sha256 = None if ranged else answer.get("ChecksumSHA256")
    return Answer(answer["Body"].iter_chunks(block), None if sha256 and "-" in sha256 else sha256)


def _write_at(descriptor: int, block: bytes, offset: int) -> None:
    view = memoryview(block)
    while view:
        written = os.pwrite(descriptor, view[:_WRITE_BYTES], offset)
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
