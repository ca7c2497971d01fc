"""LOG_FORMAT=json: whatever a command and its libraries print, as one JSON object a line."""

import json
import re
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from typing import BinaryIO

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def log_line(stream: str, text: str) -> str:
    """The object: `time` (UTC), `stream`, `level` (info, warning, error; from the line's beginning), `message`."""
    begun = re.match(r"(warning|error)\b", text.lower())
    record = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "stream": stream,
        "level": begun[1] if begun else "info",
        "message": text,
    }
    return json.dumps(record, ensure_ascii=False)


def run_logged(arguments: list[str], environment: dict[str, str]) -> int:
    """Run a command, pass SIGTERM, SIGINT and SIGHUP on to it, print its output as JSON lines, return its status.

    A status is 128 + signal for a command that a signal ended.
    """
    early: list[int] = []
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: early.append(number))
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: process.send_signal(number))
    for number in early:
        process.send_signal(number)
    printing = threading.Lock()
    readers = [
        threading.Thread(target=_print_lines, args=(pipe, name, printing))
        for pipe, name in ((process.stdout, "stdout"), (process.stderr, "stderr"))
    ]
    for reader in readers:
        reader.start()
    status = process.wait()
    for reader in readers:
        reader.join()
    return status if status >= 0 else 128 - status


def _print_lines(pipe: BinaryIO, stream: str, printing: threading.Lock) -> None:
    for line in pipe:
        for part in line.decode("utf-8", "replace").splitlines():  # of a library's own progress bar, too
            if part.strip():
                with printing:
                    sys.stdout.write(log_line(stream, part.rstrip()) + "\n")
                    sys.stdout.flush()
