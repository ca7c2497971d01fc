"""What a transfer shows and how it is cut and paced: a bar with rate and time left, a limit, files in turn, parts."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

from ..engines import map_in_order
from ..progress import progress_bar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Larger files come one after another in parallel parts; beside them smaller ones, each in one request.
LARGE_BYTES = 64 * 1024**2
# Parts of a large file, the last one apart, are of this size or larger, and at most so many (S3 user guide, "Multipart
# upload limits").
PART_BYTES = 8 * 1024**2
_MAX_PARTS = 10_000


def is_large(size: int) -> bool:
    """Whether a file of so many bytes travels in parts."""
    return size >= LARGE_BYTES


def part_spans(size: int, part: int | None = None) -> list[tuple[int, int]]:
    """Where each part of a file begins and ends: parts of so many bytes, or as we send them."""
    part = part or max(PART_BYTES, -(-size // _MAX_PARTS))
    return [(start, min(start + part, size)) for start in range(0, size, part)]


class ByteCount:
    """Called with the bytes that have gone over the line (less than none: they go again), from any thread.

    Where the rate is limited, the call returns only when the next bytes may go: all threads together keep to it.
    """

    def __init__(self, update: Callable[[int], object], max_bytes_per_s: float | None = None) -> None:
        self.is_limited = max_bytes_per_s is not None
        self._update, self._rate = update, max_bytes_per_s
        self._lock, self._free_at = threading.Lock(), 0.0

    def skip(self, size: int) -> None:
        """Count bytes that need not go over the line."""
        with self._lock:
            self._update(size)

    def __call__(self, size: int) -> None:
        with self._lock:
            self._update(size)
            if self._rate is None or size <= 0:
                return
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + size / self._rate
            wait_s = self._free_at - now
        time.sleep(wait_s)


UNCOUNTED = ByteCount(lambda size: None)


@contextlib.contextmanager
def counting(
    total: int, title: str, *, show_progress: bool, max_bytes_per_s: float | None = None
) -> Iterator[ByteCount]:
    """A bar of `total` bytes, as the function that counts them and keeps the rate."""
    with progress_bar(total=total, desc=title, unit="B", unit_scale=True, disable=not show_progress) as bar:
        yield ByteCount(bar.update, max_bytes_per_s)


class Workers:
    """So many requests at a time, whoever makes them: for the small files of a transfer, for parts of a large one."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._lock, self._free, self._waiting = threading.Lock(), number, deque()
        self._has_ended = False

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`map_in_order`. What waits for its turn when `end` is called is cancelled."""

        def in_turn(item: Item) -> Result:
            self._wait()
            try:
                if self._has_ended:
                    raise CancelledError
                return function(item)
            finally:
                self._next()

        return map_in_order(in_turn, items, num_workers=self.number)

    def end(self) -> None:
        self._has_ended = True

    # First come, first served, which a semaphore is not: small files would wait until a large one is through.

    def _wait(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def _next(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1


def small_and_large(
    work: Callable[[Item, Workers], Result],
    items: Iterable[Item],
    size_of: Callable[[Item], int],
    *,
    num_workers: int,
) -> Iterator[Result]:
    """`work(item, workers)` for each: small ones beside each other, each in one request, beside them the large ones,
    one after another, each in parts; the results in the order in which they are there."""
    items, workers = list(items), Workers(num_workers)
    small = [item for item in items if not is_large(size_of(item))]
    with ThreadPoolExecutor(1) as executor:
        under_way = deque(executor.submit(work, item, workers) for item in items if is_large(size_of(item)))
        try:
            for result in workers.map(lambda item: work(item, workers), small):
                yield result
                while under_way and under_way[0].done():
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            workers.end()
            executor.shutdown(cancel_futures=True)
