"""A TCP proxy before an S3 server that does to a share of the requests what networks and servers do."""

import contextlib
import random
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.loopback import listening, serving
from tests.s3_server import S3Server

_BODY = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>busy</Message></Error>'
_REFUSALS = {
    "SlowDown": b"503 Slow Down",
    "InternalError": b"500 Internal Server Error",
    "ServiceUnavailable": b"503 Service Unavailable",
    "ExpiredToken": b"400 Bad Request",
}
# What may happen to a request: its connection is cut before it or within it, or before the answer or within that; the
# server refuses it; a byte of it or of the answer is changed; the answer takes its time.
FAULTS = (
    "cut before",
    "cut request",
    "lose answer",
    "cut answer",
    *_REFUSALS,
    "spoil request",
    "spoil answer",
    "wait",
)


@dataclass
class FaultProxy:
    """Where it listens, what share of the requests it harms, after how many the credentials expire, and how often it
    did what."""

    url: str
    random: random.Random
    share: float
    expires_after: int | None = None
    done: Counter = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self) -> str | None:
        """The fault of the next request."""
        with self.lock:
            fault = self.random.choice(FAULTS) if self.random.random() < self.share else None
            if self.expires_after is not None and self.done.total() >= self.expires_after:
                fault = "ExpiredToken"
            self.done[fault or "none"] += 1
        return fault


def _spoilt(data: bytes) -> bytes:
    """Another byte in the middle of the body; headers are left alone, as without them each side waits for a minute."""
    body = data.find(b"\r\n\r\n") + 4
    if body >= len(data):
        return data
    middle = (body + len(data)) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _pass_on(proxy: FaultProxy, near: socket.socket, far: socket.socket) -> None:
    fault, answering = None, True
    while True:
        readable, _, _ = select.select([near, far], [], [])
        if near in readable:
            if not (data := near.recv(1 << 16)):
                return
            if answering:  # the first piece of a new request
                fault, answering = proxy.draw(), False
                if fault == "cut before":
                    return
                if fault in _REFUSALS:
                    body = _BODY % fault.encode()
                    near.sendall(b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n"
                                 b"Connection: close\r\n\r\n" % (_REFUSALS[fault], len(body)) + body)  # fmt: skip
                    return
            if fault == "cut request":
                far.sendall(data[: len(data) // 2])
                return
            if fault == "spoil request":
                data, fault = _spoilt(data), None
            far.sendall(data)
        elif far in readable:
            if not (data := far.recv(1 << 16)):
                return
            if data.startswith(b"HTTP/1.1 100"):
                near.sendall(data)
                continue
            answering = True
            if fault == "lose answer":
                return
            if fault == "cut answer":
                near.sendall(data[: len(data) // 2])
                return
            if fault == "wait":
                time.sleep(0.05)
            if fault == "spoil answer":
                data, fault = _spoilt(data), None
            near.sendall(data)


@contextlib.contextmanager
def faulty(
    server: S3Server, *, seed: int = 0, share: float = 0.0, expires_after: int | None = None
) -> Iterator[FaultProxy]:
    """A proxy in front of `server` that harms `share` of the requests, drawn from `seed`; the credentials expire after
    so many requests."""
    target = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))

    def serve(near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(target) as far:
            _pass_on(proxy, near, far)

    with listening(serve) as port:
        proxy = FaultProxy(f"http://127.0.0.1:{port}", random.Random(seed), share, expires_after)
        yield proxy


@contextlib.contextmanager
def refusing(code: str, status: int, headers: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """A server that refuses every request as S3 does; yields its URL and the list of what was asked ("GET /path")."""
    asked: list[str] = []
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>no</Message>'
        f"<Region>{headers.get('x-amz-bucket-region', '')}</Region></Error>"
    ).encode()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def _refuse(self):
            asked.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _refuse

    with serving(Handler) as server:
        yield f"http://127.0.0.1:{server.server_port}", asked
