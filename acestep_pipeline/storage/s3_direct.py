"""The requests that a transfer makes many of, for objects and parts, sent past most of botocore at half the work.

botocore builds each of its requests from S3's description, through its hooks, and waits before a body whether the
server will have it. Here its signer signs a request and its HTTP session (urllib3) sends it, with the same settings of
time, proxies and certificates. Where requests go, and for which region they are signed, is learned from a listing
that botocore sent: nothing is known here of addressing styles and endpoints. Whatever is not a plain success is no
answer: the caller then asks botocore, whose retries, refusals and errors stay the only ones.
"""

import functools
import os
import re
import socket
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .s3_checksums import is_md5, to_base64

# What a signed listing consists of. With more than this (a session of S3 Express, a payer, a proxy's or a plug-in's
# headers), requests are botocore's affair.
_KNOWN_HEADERS = {
    "user-agent", "x-amz-date", "x-amz-content-sha256", "authorization", "x-amz-security-token",
    "amz-sdk-invocation-id", "amz-sdk-request",
}  # fmt: skip
_CREDENTIAL = re.compile(r"AWS4-HMAC-SHA256 Credential=.+/\d{8}/([a-z0-9-]+)/(s3)/aws4_request, ")
_PART_QUERY = {"uploadId": "UploadId", "partNumber": "PartNumber"}
_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # the SHA-256 of an empty body


@dataclass(frozen=True)
class Answer:
    """An object's bytes, block by block, and its SHA-256 in base64 where S3 sent it along."""

    blocks: Iterator[bytes]
    sha256: str | None


@dataclass(frozen=True)
class _Place:
    """Where requests for the objects of a bucket go."""

    url: str
    region: str
    service: str
    user_agent: str

    def holds(self, bucket: str) -> bool:
        parts = urlsplit(self.url)
        return parts.path.endswith(f"/{bucket}") or (parts.path == "" and parts.netloc.startswith(f"{bucket}."))


class DirectRequests:
    """Sends for one client, from any thread, once that has listed the bucket."""

    def __init__(self, session: Any, client: Any) -> None:
        self._session, self._config = session, client.meta.config
        self._place: _Place | None = None
        self._http: Any = None
        client.meta.events.register_last("before-send.s3.ListObjectsV2", self._learn)

    def _learn(self, request: Any, **_) -> None:
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        headers = {name.lower(): _text(value) for name, value in request.headers.items()}
        signed = _CREDENTIAL.match(headers.get("authorization", ""))
        url = urlsplit(request.url)
        if signed is None or headers.keys() - _KNOWN_HEADERS or url.username is not None:
            self._place = None
            return
        if self._http is None:
            config = self._config
            self._http = URLLib3Session(
                verify=self._session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE", True),
                proxies=get_environ_proxies(request.url) if config.proxies is None else config.proxies,
                proxies_config=config.proxies_config,
                timeout=(config.connect_timeout, config.read_timeout),
                max_pool_connections=config.max_pool_connections,
                client_cert=config.client_cert,
                socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
            )
        base = f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"
        self._place = _Place(base, signed[1], signed[2], headers["user-agent"])

    def get(self, bucket: str, key: str, *, etag: str, size: int, span: tuple[int, int], block: int) -> Answer | None:
        """The bytes from one place to before another of the object that has this ETag and size, in blocks of so many.

        Returns:
            None where botocore is to be asked. Where the connection breaks later, the blocks end with an error of
            botocore's.
        """
        start, end = span
        whole = span == (0, size)
        wanted = {"x-amz-checksum-mode": "ENABLED"} if whole else {"Range": f"bytes={start}-{end - 1}"}
        answer = self._send("GET", bucket, key, headers={"If-Match": etag, **wanted})
        if answer is None:
            return None
        found = answer.headers
        # There is a checksum that will be compared (of a part, with the other parts'); botocore may know of others.
        known = not whole or "x-amz-checksum-sha256" in found or (is_md5(bucket, etag) and not _is_encrypted(found))
        if (
            not known
            or answer.status_code != (200 if whole else 206)
            or found.get("Content-Length") != str(end - start)
            or found.get("ETag", "").strip('"') != etag.strip('"')
            or "-" in found.get("x-amz-checksum-sha256", "")
        ):
            answer.raw.close()
            return None
        sha256 = found.get("x-amz-checksum-sha256") if whole else None
        return Answer(_blocks(answer.raw, end - start, block), sha256)

    def put(self, where: dict, data: bytes, sha256: bytes) -> str | None:
        """Send an object, or a part of an upload, to `where` in botocore's words; `sha256` is of the data.

        Returns:
            Its ETag; None where botocore is to be asked.
        """
        from botocore.utils import percent_encode_sequence

        part = [(name, str(where[key])) for name, key in _PART_QUERY.items() if key in where]
        checksum = to_base64(sha256)
        answer = self._send(
            "PUT",
            where["Bucket"],
            where["Key"],
            query=percent_encode_sequence(part),
            headers={"x-amz-checksum-sha256": checksum},
            data=data,
            sha256=sha256.hex(),
        )
        if answer is None:
            return None
        try:
            rest = answer.content
        except Exception:  # noqa: BLE001 - whatever it is, botocore meets it again and says what it is
            return None
        if answer.status_code != 200 or rest or answer.headers.get("x-amz-checksum-sha256", checksum) != checksum:
            return None
        return answer.headers.get("ETag")

    def _send(self, method, bucket, key, *, headers, query="", data=b"", sha256=_NOTHING) -> Any:
        """botocore's response, its body unread; None where it isn't known where to, or there is none."""
        from botocore.awsrequest import AWSRequest
        from botocore.utils import percent_encode

        place = self._place
        if place is None or not place.holds(bucket):
            return None
        url = f"{place.url}/{percent_encode(key, safe='/~')}{'?' if query else ''}{query}"
        headers = {**headers, "User-Agent": place.user_agent}
        try:
            request = AWSRequest(method, url, headers=headers, data=data, stream_output=True)
            request.context["sha256"] = sha256
            credentials = self._session.get_credentials().get_frozen_credentials()  # renewed where they expire
            _signer()(credentials, place.service, place.region).add_auth(request)
            return self._http.send(request.prepare())
        except Exception:  # noqa: BLE001 - whatever it is, botocore meets it again and says what it is
            return None


@functools.cache
def _signer() -> type:
    from botocore.auth import S3SigV4Auth

    class Signer(S3SigV4Auth):
        """botocore's, for a body whose SHA-256 is known."""

        def payload(self, request: Any) -> str:
            return request.context["sha256"]

    return Signer


def _blocks(raw: Any, size: int, block: int) -> Iterator[bytes]:
    """The `size` bytes of a response's body. What breaks off is an error of botocore's, as it would be there."""
    from botocore.exceptions import IncompleteReadError, ResponseStreamingError

    left = size
    if not size:
        raw.read()  # gives the connection back
    try:
        while left:
            try:
                data = raw.read(min(block, left))
            except Exception as error:  # noqa: BLE001 - urllib3's and the socket's
                raise ResponseStreamingError(error=type(error).__name__) from None
            if not data:
                raise IncompleteReadError(actual_bytes=size - left, expected_bytes=size)
            left -= len(data)
            yield data
    finally:
        if left:
            raw.close()  # what is still to come on this connection is no answer to another request


def _is_encrypted(headers: Any) -> bool:
    kind = headers.get("x-amz-server-side-encryption", "")
    return kind.startswith("aws:kms") or "x-amz-server-side-encryption-customer-algorithm" in headers


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


_OF_CLIENTS: "weakref.WeakKeyDictionary[Any, DirectRequests]" = weakref.WeakKeyDictionary()


def attach(session: Any, client: Any) -> None:
    """Let a client that a botocore session made have a direct way as well."""
    _OF_CLIENTS[client] = DirectRequests(session, client)


def direct_requests(client: Any) -> DirectRequests | None:
    """A client's direct way, if it has one."""
    return _OF_CLIENTS.get(client)
