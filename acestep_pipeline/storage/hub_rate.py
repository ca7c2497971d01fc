"""A limit to the rate of huggingface_hub's transfers, which has none itself: its HTTP client is given a slower one."""

import contextlib
from collections.abc import Iterator

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import _http

from ..data.text.text_files import one_line
from ..errors import UsageError
from .transfer_progress import ByteCount

_BLOCK_BYTES = 1 << 16


class _Paced(httpx2.SyncByteStream):
    """A body that is sent or received no faster than `count` lets it."""

    def __init__(self, body: httpx2.SyncByteStream, count: ByteCount) -> None:
        self._body, self._count = body, count

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._body:
            for start in range(0, len(chunk), _BLOCK_BYTES):
                block = chunk[start : start + _BLOCK_BYTES]
                yield block
                self._count(len(block))

    def close(self) -> None:
        self._body.close()


@contextlib.contextmanager
def hub_rate(max_bytes_per_s: float | None) -> Iterator[None]:
    """Keep all that huggingface_hub sends and receives in this process to a rate, together, until the context ends.

    Its Xet transfers, which go past its HTTP client, are left out meanwhile: the Hub serves and takes the same files
    over HTTP. None: no limit.
    """
    if max_bytes_per_s is None:
        yield
        return
    count = ByteCount(lambda size: None, max_bytes_per_s)

    def pace(message: httpx2.Request | httpx2.Response) -> None:
        if not isinstance(message.stream, _Paced):  # a redirected request has the stream of the first
            message.stream = _Paced(message.stream, count)

    factory, xet = _http._GLOBAL_CLIENT_FACTORY, constants.HF_HUB_DISABLE_XET

    def open_client() -> httpx2.Client:
        client = factory()
        client.event_hooks = {kind: [*client.event_hooks[kind], pace] for kind in ("request", "response")}
        return client

    set_client_factory(open_client)
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        set_client_factory(factory)
        constants.HF_HUB_DISABLE_XET = xet


def check_limited_sizes(sizes: dict[str, int], max_bytes_per_s: float | None) -> None:
    """Refuse a limit to the rate of files, `sizes` in bytes by their names, that the Hub sends by Xet alone.

    Raises:
        UsageError: names the first.
    """
    for name, size in sizes.items():
        if max_bytes_per_s is not None and size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise UsageError(
                f"{one_line(name)} has {size / 1e9:.0f} GB, which the Hub sends by Xet alone, at any rate: leave "
                "--max_bandwidth out, or limit it with your system's tools."
            )
