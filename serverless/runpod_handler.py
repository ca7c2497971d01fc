#!/usr/bin/env python
"""A RunPod serverless worker: `MODE=runpod` of the image.

Try it without RunPod: `--test_input '{"input": {"task": "generate", "prompt": "lo-fi"}}'`, or `--rp_serve_api`.
Jobs are those of `acestep_pipeline/jobs/schema.py`. `/stream` tells how one goes; its last item is the result.
"""

import argparse
import os
import signal
import sys
import threading
import traceback

# At these levels RunPod's worker writes every answer into the log, links and all. Its default is DEBUG, read at its
# import.
TELLTALE = ("NOTSET", "TRACE", "DEBUG")
if os.environ.get("RUNPOD_LOG_LEVEL", "DEBUG").upper() in TELLTALE:
    os.environ["RUNPOD_LOG_LEVEL"] = "INFO"

import runpod  # noqa: E402

from acestep_pipeline.jobs.results import without_links  # noqa: E402
from acestep_pipeline.jobs.worker import Worker, sentence  # noqa: E402

WORKER = Worker()


async def handler(job: dict):
    """Do a job; yields its events. RunPod cancels this when the job is cancelled, and the work ends in order."""
    stop = threading.Event()
    with _stopping_on_sigterm(stop):
        try:
            async for event in WORKER.stream_async(job["input"], job_id=job["id"], stop=stop):
                yield event
        except Exception as error:
            _log(error)
            yield {"error": sentence(error)}  # which makes RunPod mark the job as failed


async def handle_local(job: dict) -> dict:
    """`handler` for --test_input, which reads no events and writes what it gets into the log: they are printed, and
    the result has no links."""
    result: dict = {}
    async for event in handler(job):
        print(without_links(event), flush=True)
        result = without_links(event)
    return result


class _stopping_on_sigterm:
    """While a job runs, SIGTERM (the worker is being taken away) stops it, and then does what RunPod does with it."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __enter__(self) -> None:
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number, frame) -> None:
        self._stop.set()
        if callable(self._before):
            self._before(number, frame)

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def _log(error: Exception) -> None:
    said = sentence(error)
    print(f"error: {said}", file=sys.stderr, flush=True)
    if type(error).__name__ in said:  # a defect of ours
        traceback.print_exception(error)


if __name__ == "__main__":
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--rp_log_level", default="")
    if options.parse_known_args()[0].rp_log_level.upper() in TELLTALE:
        sys.exit("error: at this --rp_log_level the log would hold the links to results; use INFO.")
    is_local_run = any(argument.startswith("--test_input") for argument in sys.argv[1:])
    runpod.serverless.start({"handler": handle_local if is_local_run else handler, "return_aggregate_stream": True})
