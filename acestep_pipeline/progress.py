"""Progress bars that suit a terminal and a log file alike."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm


class _Lines:
    """A stream that gets lines where tqdm redraws one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._stream.write(f"{line}\n")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def progress_bar(**arguments) -> "tqdm":
    """A tqdm bar; into a log file it prints a line every ten seconds rather than redrawing ten times a second."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, **arguments)
    return tqdm(mininterval=10.0, ncols=120, file=_Lines(sys.stderr), **arguments)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the bars that diffusers and transformers draw for a loading of seconds, torch's deprecation of the
    `weight_norm` that diffusers' Oobleck uses, diffusers' wonder at the `timestep_mu` and `timestep_sigma` in a
    converted DiT's config, which training reads, and PEFT's at a second adapter. Downloads keep their bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    configs = diffusers_logging.get_logger("diffusers.configuration_utils")
    configs.addFilter(_is_of_interest)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute", category=UserWarning)
            yield
    finally:
        configs.removeFilter(_is_of_interest)
        for library in libraries:
            library.enable_progress_bar()


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence the bars of `datasets`, where there is one around many of its readings."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def _is_of_interest(record: logging.LogRecord) -> bool:
    return "timestep_mu" not in record.getMessage()
