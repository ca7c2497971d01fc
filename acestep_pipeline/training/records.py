"""What one process writes down for all of them while a run trains: a line an update, and checkpoints."""

import time
from collections.abc import Callable
from pathlib import Path

from .tracking import MetricsFile
from .uploading import Uploads


class Records:
    """Made when the training begins, on the main process alone."""

    def __init__(
        self, output_dir: Path, *, first_update: int, save_checkpoint: Callable[..., Path], uploads: Uploads
    ) -> None:
        """Go on with `metrics.jsonl` after update `first_update`. `save_checkpoint(update=…)` writes a checkpoint and
        returns its folder, which `uploads` gets."""
        self._metrics = MetricsFile(output_dir, first_update=first_update)
        self._save, self._uploads = save_checkpoint, uploads
        self._started = time.monotonic() - self._metrics.seconds

    @property
    def seconds(self) -> float:
        """How long the run has trained by now, whenever it was resumed."""
        return time.monotonic() - self._started

    def add_update(self, update: int, values: dict) -> None:
        """A line of `metrics.jsonl`; `RunError` where the disk is full."""
        self._metrics.write({"update": update, **values, "seconds": round(self.seconds, 3)})

    def add_checkpoint(self, update: int) -> None:
        """A checkpoint; what `save_checkpoint` raises."""
        self._metrics.flush_to_disk()
        self._uploads.add_checkpoint(self._save(update=update))

    def close(self) -> float:
        """Close the file; returns how long the run has trained, in seconds."""
        self._metrics.close()
        return self.seconds
