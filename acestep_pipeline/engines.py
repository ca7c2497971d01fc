"""Run one function over many items, on the cores of this machine or on a Ray cluster, with results in order.

Both engines give the same results: the function must be pure and its items and results picklable. On Ray the function
travels by reference (its module must be installed on every machine) and so do files: every worker opens them itself,
under the name that the item gives. They must therefore lie on a file system that all machines share, or the function
must fetch them, for instance with `storage.local_copy`.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from .errors import RunError, UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")
Engine = Literal["local", "ray"]

# Items in flight for each worker: enough that one slow item keeps no other worker waiting, few enough for memory.
LOOK_AHEAD = 4


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    engine: Engine = "local",
    num_workers: int | None = None,
) -> Iterator[Result]:
    """Yield `function(item)` for each item, in the order of `items`.

    Items are taken lazily: no more than `LOOK_AHEAD` × workers of them are waiting, running, or done and not yet
    yielded, so memory does not grow with their number. The first exception of `function` is raised in its item's
    place and ends the iteration. Closing the iterator early cancels what has not begun and waits for (local) or stops
    (Ray) what has.

    Args:
        engine: "local" runs threads, for functions that spend their time in code that releases Python's lock
            (libsndfile, soxr, numpy, hashing, network). "ray" runs tasks of one core each: on the cluster that
            `RAY_ADDRESS` names, else on a Ray of its own on this machine, which is gone when the iteration ends. A
            Ray that the caller has initialised is used and left running. Workers on a cluster have their own
            environment; this process's `ACESTEP_` variables (where the caches are, for one) are passed on to them,
            credentials are not.
        num_workers: how many at a time; None for this machine's cores, or all the cluster's.

    Raises:
        UsageError: Ray is asked for and missing, or can't be started or reached.
        RunError: Ray lost a task with its worker (killed for memory, crashed, machine gone), three retries included.
    """
    if num_workers is not None and num_workers < 1:
        raise UsageError(f"{num_workers} workers can do no work; give one or more.")
    if engine == "local":
        return _map_on_threads(function, items, num_workers or _cpu_count())
    if engine == "ray":
        return _map_on_ray(_import_ray(), function, items, num_workers)
    raise UsageError(f"there is no engine {engine!r}; choose local or ray.")


def _cpu_count() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _map_on_threads(function: Callable, items: Iterable, num_workers: int) -> Iterator:
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="map_in_order")
    pending = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) == LOOK_AHEAD * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError("the engine ray needs Ray: pip install 'ace-step-lora[ray]'.") from None
    return ray


def _map_on_ray(ray: Any, function: Callable, items: Iterable, num_workers: int | None) -> Iterator:
    is_ours = not ray.is_initialized()
    if is_ours:
        _start(ray, num_workers)
    pending = deque()
    try:
        num_workers = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(num_cpus=1, max_retries=3, runtime_env=_environment())(function)
        for item in items:
            pending.append(task.remote(item))
            if len(pending) == LOOK_AHEAD * num_workers:
                yield _result(ray, pending.popleft())
        while pending:
            yield _result(ray, pending.popleft())
    finally:
        if is_ours:
            ray.shutdown()  # ends the tasks too, also on a cluster
        else:
            for reference in pending:
                ray.cancel(reference)


def _start(ray: Any, num_workers: int | None) -> None:
    """Join the cluster that `RAY_ADDRESS` names, or start Ray here; quietly, and without reports to Ray's makers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    own = {} if address else {"num_cpus": num_workers or _cpu_count(), "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, configure_logging=False, **own)
    except (OSError, RuntimeError, ValueError) as error:  # what ray.init raises; ConnectionError is an OSError
        what = f"the cluster of RAY_ADDRESS {address} can't be joined" if address else "Ray can't be started here"
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{what} ({type(error).__name__}: {reason}); mend that, or use the engine local.") from error


def _environment() -> dict[str, dict[str, str]]:
    """Ray's `runtime_env` with the project's own variables; it is logged in the clear, so nothing secret is in it."""
    return {"env_vars": {name: value for name, value in os.environ.items() if name.startswith("ACESTEP_")}}


def _result(ray: Any, reference: Any) -> Any:
    """The result of a task, or its exception as the function raised it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, Exception):
            raise
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise RunError(
            f"Ray lost a task with its worker ({type(error).__name__}); run it again, with fewer workers if memory "
            "was short."
        ) from error
