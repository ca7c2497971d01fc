"""Pictures of a run: its loss, and how far it moved each layer."""

from pathlib import Path

import matplotlib
import numpy as np

from .files import write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  the backend is chosen first: there may be no screen


def plot_loss(
    metrics: list[dict], path: Path, *, validations: list[dict] = (), best_update: int | None = None
) -> None:
    """Draw the loss (raw and smoothed over a tenth of the run) and the learning rate by update, and over them the
    validation loss.

    Args:
        metrics: lines of `metrics.jsonl` whose loss is a number.
        validations: lines of `validation.jsonl`; may be empty.
        best_update: that of the lowest validation loss, to mark where it overfitted from there on.
    """
    updates = [line["update"] for line in metrics]
    losses = [line["loss"] for line in metrics]
    window = max(1, len(losses) // 10)
    smoothed = [
        sum(losses[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(losses))
    ]
    figure, axis = pyplot.subplots(figsize=(8, 4), dpi=110, layout="constrained")
    axis.plot(updates, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss")
    axis.plot(updates, smoothed, color="tab:blue", linewidth=2, label=f"mean of {window} updates")
    measured = [(line["update"], line["loss"]) for line in validations if line["loss"] is not None]
    if measured:
        axis.plot(*zip(*measured, strict=True), color="tab:orange", marker="o", markersize=3, label="validation loss")
    if best_update is not None:
        axis.axvline(best_update, color="tab:orange", linestyle=":", label=f"overfitted since update {best_update}")
    axis.set_xlabel("optimizer update")
    axis.set_ylabel("flow-matching loss")
    rate = axis.twinx()
    rate.plot(updates, [line["lr"] for line in metrics], color="tab:gray", linewidth=1, linestyle="--")
    rate.set_ylabel("learning rate", color="tab:gray")
    rate.set_ylim(bottom=0)
    axis.legend(loc="upper right")
    _save(figure, path)


def plot_update_norms(
    rows: list[str], columns: list[str], values: np.ndarray, path: Path, *, relative: bool = True
) -> None:
    """Draw a heat map of the norms of updates.

    Args:
        rows, columns: what they are of: blocks, and kinds of layers.
        values: `[rows, columns]`, ||dW|| / ||W||; NaN where no layer was adapted.
        relative: False: they are ||dW|| alone.
    """
    size = (2.5 + 0.8 * len(columns), 2.5 + 0.28 * len(rows))
    figure, axis = pyplot.subplots(figsize=size, dpi=110, layout="constrained")
    highest = np.nanmax(values, initial=0.0)
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=highest or 1)
    axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylabel("block")
    if len(rows) <= 12:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                shown = f"{value:.1%}" if relative else f"{value:.3g}"
                color = "black" if value > 0.6 * highest else "white"
                axis.text(column, row, shown, ha="center", va="center", color=color, fontsize=7)
    figure.colorbar(image, label="norm of update" + " / of weight" * relative, format=lambda value, _: f"{value:.3g}")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    try:
        write_atomically(path, figure.savefig)
    finally:
        pyplot.close(figure)
