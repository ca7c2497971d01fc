"""Validation while training: when, what is kept of it, the best adapter so far, and when to stop for lack of gain."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from ..adapters.trainable import save_lora
from ..data.latent_cache import CachedTrack
from ..files import write_tensors
from ..paths import LORA_WEIGHTS_NAME
from .run_directory import BEST_DIR, VALIDATION_NAME, naming_failed_writes
from .tracking import MetricsFile
from .validation_loss import LossMeter

# Where nothing was said: so many validations, or fewer, if they would cost more than this share of the training.
DEFAULT_VALIDATIONS = 20
DEFAULT_COST = 0.1
# A training item costs as much as three forward passes: one, and a backward pass that costs two.
PASSES_OF_AN_ITEM = 3


@dataclass(frozen=True)
class Progress:
    """The lowest validation loss so far, the update it was measured after, and the validations since without a lower
    one."""

    best_loss: float | None = None
    best_update: int = 0
    without_gain: int = 0

    def after(self, loss: float, update: int) -> "Progress":
        """The progress after one more validation. A loss that is not finite is no gain."""
        if self.best_loss is None or loss < self.best_loss:
            return Progress(loss, update, 0)
        return replace(self, without_gain=self.without_gain + 1)


def default_validation_steps(num_updates: int, *, items_per_update: int, num_passes: int) -> int:
    """Updates between validations of `num_passes` forward passes each: 20 validations over the run, or as many fewer
    as keep them within a tenth of the training's cost; those before the first update and after the last are extra."""
    affordable = DEFAULT_COST * PASSES_OF_AN_ITEM * num_updates * items_per_update / max(1, num_passes)
    return -(-num_updates // max(1, min(DEFAULT_VALIDATIONS, int(affordable))))


class Validator:
    """Measures the held-out tracks before the first update, every `steps` updates and after the last.

    Writes a line of `validation.jsonl` each time (`update`, `loss`, `bins`: the loss by timestep, `tracks`: that of
    each track), and the adapter into `best/` when the loss is lower than ever before. Without held-out tracks it does
    nothing.
    """

    def __init__(
        self,
        meter: LossMeter,
        tracks: Sequence[CachedTrack],
        *,
        output_dir: Path,
        steps: int,
        patience: int | None,
        log_to_tracker: bool,
    ) -> None:
        """Take what measures, the held-out tracks (any number), the updates between validations, and the validations
        without gain that end the run (None: none do)."""
        self.meter = meter
        self.draws = meter.draws(tracks)
        self.output_dir = Path(output_dir)
        self.steps = steps
        self.patience = patience
        self.log_to_tracker = log_to_tracker
        self.progress = Progress()
        self.last_update: int | None = None
        self._file: MetricsFile | None = None

    @property
    def should_stop(self) -> bool:
        """Whether the patience is at an end."""
        return self.patience is not None and self.progress.without_gain >= self.patience

    def is_due(self, update: int, num_updates: int) -> bool:
        """Whether to validate now that so many updates of the run are done."""
        return len(self.draws) > 0 and (update % self.steps == 0 or update == num_updates)

    def validate(self, transformer: torch.nn.Module, *, update: int) -> None:
        """Measure the model after `update` updates; call it on all processes.

        `transformer` is what the adapter is saved from where it is the best so far. A measurement that a resumed run
        has already is not repeated.
        """
        if not len(self.draws) or update == self.last_update:
            return
        losses = self.meter.measure(self.draws)
        loss = float(losses.mean())
        kept_until = -1 if self.last_update is None else self.last_update
        self.progress, self.last_update = self.progress.after(loss, update), update
        bins = [float(losses[:, self.draws.bins == number].mean()) for number in range(self.draws.bins[-1] + 1)]
        if self.log_to_tracker:
            logged = {f"validation_loss/bin_{number}": value for number, value in enumerate(bins)}
            self.meter.accelerator.log({"validation_loss": loss} | logged, step=update)
        if not self.meter.accelerator.is_main_process:
            return
        if self.progress.best_update == update > 0:
            with naming_failed_writes(self.output_dir, f"{BEST_DIR}/{LORA_WEIGHTS_NAME}"):
                save_lora(transformer, self.output_dir / BEST_DIR)
        tracks = {track.id: float(of_track) for track, of_track in zip(self.draws.tracks, losses.mean(1), strict=True)}
        if self._file is None:
            self._file = MetricsFile(self.output_dir, name=VALIDATION_NAME, first_update=kept_until)
        self._file.write({"update": update, "loss": loss, "bins": bins, "tracks": tracks})

    def state_dict(self) -> dict:
        """What a resumed run needs: the progress, and the best adapter so far, with its file's metadata."""
        state = {**asdict(self.progress), "last_update": self.last_update, "best": None}
        if self.progress.best_update:
            with safe_open(self._best_file, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                # safetensors gives the metadata in an order of its own.
                metadata = dict(sorted((file.metadata() or {}).items()))
                state["best"] = {"metadata": metadata, "tensors": tensors}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave; a best adapter of a time after the checkpoint gives way to its own."""
        self.progress = Progress(*(state[name] for name in ("best_loss", "best_update", "without_gain")))
        self.last_update = state["last_update"]
        if not self.meter.accelerator.is_main_process:
            return
        if state["best"] is None:
            self._best_file.unlink(missing_ok=True)
            return
        with naming_failed_writes(self.output_dir, f"{BEST_DIR}/{LORA_WEIGHTS_NAME}"):
            write_tensors(self._best_file, state["best"]["tensors"], state["best"]["metadata"])

    @property
    def _best_file(self) -> Path:
        return self.output_dir / BEST_DIR / LORA_WEIGHTS_NAME

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
