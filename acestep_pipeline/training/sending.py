"""The process that publishes one folder for a run (`uploading`): `python -m acestep_pipeline.training.sending JOB`."""

import contextlib
import json
import os
import sys
import threading
from pathlib import Path

from ..errors import RunError, UsageError
from ..storage.publishing import publish


def _main(job: dict) -> None:
    """Publish, and say on stdout as JSON which release it is or what went wrong; end when the parent does."""

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(19)  # on a core that an update needs it gets a sixtieth
    directory, address = Path(job.pop("directory")), job.pop("address")
    try:
        published = publish(directory, address, force=True, **job)
        outcome = {"release": published.manifest.release}
    except (UsageError, RunError) as error:
        outcome = {"error": str(error)}
    print(json.dumps(outcome), flush=True)
    os._exit(0)  # not after threads that a server keeps waiting


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
