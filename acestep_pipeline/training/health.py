"""Updates whose loss or gradient is NaN or infinite: left out and named; several in a row end the run."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import RunError
from .run_directory import describe_kept

MAX_IN_A_ROW = 3
# Below this a gradient scaler isn't looking for its scale any more: no scale makes NaN finite.
LEAST_SCALE = 1.0


class NanGuard:
    """Decides for every update whether it may reach the adapter.

    All processes come to the same decision: the loss is summed over them, and so is the gradient. The numbers of
    updates left out are part of a checkpoint, so that a resumed run stops where an uninterrupted one would.
    """

    def __init__(self, *, stops: bool, scaler: torch.amp.GradScaler | None) -> None:
        """`stops`: end the run after `MAX_IN_A_ROW` such updates, one after another. `scaler`: fp16's, or None."""
        self.stops, self.scaler = stops, scaler
        self.left_out = self.in_a_row = 0

    def refuses(self, loss: float, grad_norm: float) -> bool:
        """Whether an update must be left out; counts it if so.

        An infinite gradient is fp16's way of finding its scale: the scaler skips such a step by itself.
        """
        finds_scale = self.scaler is not None and self.scaler.get_scale() >= LEAST_SCALE
        refused = not math.isfinite(loss) or not (math.isfinite(grad_norm) or finds_scale)
        self.left_out += refused
        self.in_a_row = self.in_a_row + 1 if refused else 0
        if refused and self.scaler is not None:
            self.scaler.update(self.scaler.get_scale())  # forgets this gradient, which has no say in the scale
        return refused

    def report(
        self,
        accelerator: Accelerator,
        losses: list[tuple[list[str], torch.Tensor, torch.Tensor]],
        *,
        update: int,
        output_dir: Path,
    ) -> None:
        """Name the tracks and timesteps of a refused update. Call it on every process.

        Args:
            losses: of each micro-batch of this process: its tracks, their timesteps `[batch]`, and its loss.
            update: its number.
            output_dir: where checkpoints are.

        Raises:
            RunError: it is the last in a row that is put up with.
        """
        own = [
            (f"{track} at t = {sigma:.3f}", bool(loss.isfinite()))
            for tracks, sigmas, loss in losses
            for track, sigma in zip(tracks, sigmas.tolist(), strict=True)
        ]
        items = gather_object(own)
        # Where no loss is at fault, any of the items may have made the gradient.
        guilty = [item for item, finite in items if not finite] or [item for item, _ in items]
        what = "loss" if any(not finite for _, finite in items) else "gradient"
        sentence = f"the {what} of update {update} is not finite ({'; '.join(dict.fromkeys(guilty))})"
        if self.stops and self.in_a_row >= MAX_IN_A_ROW:
            raise RunError(
                f"{sentence}, the third update in a row that had to be left out; start again with a lower "
                "--learning_rate or --max_grad_norm, or continue with --resume_from_checkpoint latest --on_nan skip. "
                f"{describe_kept(output_dir)}"
            )
        advice = ""
        if self.in_a_row >= MAX_IN_A_ROW:
            advice = f" It is the {self.in_a_row}th in a row; a lower --learning_rate or --max_grad_norm may help."
        accelerator.print(f"\nwarning: {sentence}: left out.{advice}")

    def state_dict(self) -> dict:
        """The counts."""
        return {"left_out": self.left_out, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.left_out, self.in_a_row = state["left_out"], state["in_a_row"]
