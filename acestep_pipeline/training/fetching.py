"""Fetches the rest of a checkpoint while the DiT trains: `python -m acestep_pipeline.training.fetching CHECKPOINT`.

Previews and the samples at the end load the whole checkpoint; here its files come before. In a process of its own,
which an update's cores and Python's lock don't notice and which ends with the run.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

_SOURCE = Path(__file__).resolve().parents[2]
# Kept, as their pipes are to stay open until this process ends.
_STARTED: list[subprocess.Popen] = []


def fetch_meanwhile(checkpoint: dict) -> subprocess.Popen:
    """Start to fetch all of a checkpoint that isn't here, and return at once.

    What goes wrong is said by whoever loads the checkpoint in the end, who fetches what is lacking then, and waits for
    what is on its way.

    Args:
        checkpoint: arguments of `resolve_checkpoint` by name.
    """
    path = os.pathsep.join(filter(None, (str(_SOURCE), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "acestep_pipeline.training.fetching", json.dumps(checkpoint, default=str)],
        stdin=subprocess.PIPE,  # its end tells that this process is gone
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
        process_group=0,  # a signal to the run's group is for the run to heed
    )
    _STARTED.append(process)
    return process


def _main(checkpoint: dict) -> None:
    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(19)
    from ..checkpoint_source import open_checkpoint

    status = 1
    try:
        open_checkpoint(**checkpoint).fetch()
        status = 0
    finally:
        os._exit(status)  # not through an end that the thread above would abort; nobody reads what went wrong


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
