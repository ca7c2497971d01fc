"""RunPod's side of a serverless worker, as a real HTTP server on loopback: it hands out jobs, hears how they go, and
stops them."""

import contextlib
import json
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from tests.loopback import serving

POD = "pod-1"
KEY = "runpod-secret-key"
POLL_S = 1.0  # how long a request for a job is held open; RunPod's own holds it longer


class Queue:
    """Jobs to hand out, and what came back of each: `streams`, and `results` once it is over."""

    def __init__(self) -> None:
        self._jobs: queue.Queue = queue.Queue()
        self._stops: queue.Queue = queue.Queue()
        self.streams: dict[str, list] = defaultdict(list)
        self.results: dict[str, dict] = {}
        self.pings: list[str] = []
        self.changed = threading.Condition()
        self.url = ""

    @property
    def environment(self) -> dict[str, str]:
        """What RunPod sets in a worker's environment."""
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{self.url}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self.url}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{self.url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{self.url}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_AI_API_KEY": KEY,
            "RUNPOD_POD_ID": POD,
        }

    def put(self, job_id: str, job: dict) -> None:
        self._jobs.put({"id": job_id, "input": job})

    def stop(self, job_id: str) -> None:
        """Cancel a job that is running."""
        self._stops.put(job_id)

    def wait(self, what: Callable[[], object], timeout_s: float = 300.0):
        """What `what` returns, as soon as it is true."""
        end = time.monotonic() + timeout_s
        with self.changed:
            while not (found := what()):
                left = end - time.monotonic()
                assert left > 0, f"nothing came: {dict(self.streams)} {self.results}"
                self.changed.wait(min(left, 1.0))
        return found

    def get(self, path: str) -> tuple[int, dict | None]:
        if path.startswith("/ping/"):
            self.pings.append(path)
            return 200, {}
        source = self._jobs if path.startswith("/job-take/") else self._stops
        try:
            found = source.get(timeout=POLL_S)
        except queue.Empty:
            return 204, None
        return 200, found if source is self._jobs else {"jobsToStop": [found]}

    def post(self, path: str, content: dict) -> None:
        _, kind, _, job_id = path.split("/")
        with self.changed:
            if kind == "job-stream":
                self.streams[job_id].append(content["output"])
            else:
                self.results[job_id] = content
            self.changed.notify_all()


@contextlib.contextmanager
def running_queue() -> Iterator[Queue]:
    """A queue behind an HTTP server on a free port."""
    jobs = Queue()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            assert self.headers["Authorization"] == KEY
            status, content = jobs.get(urlsplit(self.path).path)
            self._answer(status, content)

        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            jobs.post(urlsplit(self.path).path, content)
            self._answer(200, {})

        def _answer(self, status: int, content: dict | None) -> None:
            body = b"" if content is None else json.dumps(content).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a worker that was ended
                self.send_response(status)
                if body:
                    self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    with serving(Handler) as server:
        jobs.url = f"http://127.0.0.1:{server.server_port}"
        yield jobs
