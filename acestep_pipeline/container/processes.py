"""Several processes on one machine, with the statuses of one.

`python -m acestep_pipeline.container.processes N SCRIPT [argument ...]`: torchrun's agent starts and watches them;
torchrun itself would end with status 1 and a report of its own in each case.
"""

import logging
import os
import sys
import tempfile

# A full update and a checkpoint; whoever stops the container has the last word.
GRACE_S = 300


def run(num_processes: int, command: list[str]) -> int:
    """Run `command` once for each process of this machine; the status is 128 + signal if a signal was sent here, else
    that of the first process that failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="container",
            max_restarts=0,
            monitor_interval=0.5,
            signals_to_handle="SIGTERM,SIGINT",
            shutdown_timeout=GRACE_S,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, command[0])(*command[1:])
        except SignalException as stop:
            return 128 + int(stop.sigval)
        except ChildFailedError as error:
            first = min(error.failures.values(), key=lambda failure: failure.timestamp)
            status = first.exitcode
            return status if status > 0 else 128 - status
    return 0


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), [sys.executable, *sys.argv[2:]]))
