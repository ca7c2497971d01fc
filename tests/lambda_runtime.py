"""AWS Lambda's Runtime API on loopback (docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html): what a function in a
container is called through."""

import contextlib
import json
import queue
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

from tests.loopback import serving

PREFIX = "/2018-06-01/runtime"


class Runtime:
    """Invocations to hand out, and what came back of each: (kind, content), the kind being response or error."""

    def __init__(self) -> None:
        self.invocations: queue.Queue = queue.Queue()
        self.answers: queue.Queue = queue.Queue()
        self.address = ""

    def invoke(self, event: object, *, request_id: str = "8476a536-e9f4-11e8-9739-2dfe598c3fcd") -> dict:
        """Call the function, and wait for what it returns."""
        self.invocations.put((request_id, event))
        path, content = self.answers.get(timeout=300)
        assert path == f"{PREFIX}/invocation/{request_id}/response", (path, content)
        return content


@contextlib.contextmanager
def running_runtime() -> Iterator[Runtime]:
    """A Runtime API on a free port; `address` is for AWS_LAMBDA_RUNTIME_API."""
    runtime = Runtime()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            assert self.path == f"{PREFIX}/invocation/next"
            request_id, event = runtime.invocations.get()
            headers = {
                "Lambda-Runtime-Aws-Request-Id": request_id,
                "Lambda-Runtime-Deadline-Ms": str(int(1000 * (time.time() + 900))),
                "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:us-east-1:123456789012:function:acestep",
                "Lambda-Runtime-Trace-Id": "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700;Sampled=1",
                "Content-Type": "application/json",
            }
            self._answer(200, json.dumps(event).encode(), headers)

        def do_POST(self) -> None:
            chunked = self.headers.get("Transfer-Encoding") == "chunked"
            body = self._chunks() if chunked else self.rfile.read(int(self.headers["Content-Length"]))
            runtime.answers.put((self.path, json.loads(body)))
            self._answer(202, b"{}", {})

        def _chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a function that was ended
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    with serving(Handler) as server:
        runtime.address = f"127.0.0.1:{server.server_port}"
        yield runtime
