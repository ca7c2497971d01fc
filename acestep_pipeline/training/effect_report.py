"""The effect of a run as a reader gets it: `effect.json`, the lines at the end of the run, the model card's section,
and the picture of where the update is."""

import math
from pathlib import Path

import numpy as np

from ..plots import plot_update_norms
from .comparison import Comparison, Interval, Measured, percent
from .effect import Verdict
from .style_distance import StyleDistance, describe_style
from .update_norms import ModuleNorm, group_by, relative_norm


def effect_record(measured: Measured, verdict: Verdict, style: StyleDistance | str | None, *, updates: int) -> dict:
    """The content of `effect.json`: equal runs give equal ones. Numbers to six digits; null for what is unknown, and
    for a style distance (or why there is none) that wasn't asked for."""
    norms = measured.norms
    return {
        "verdict": verdict.verdict,
        "since_update": verdict.since_update,
        "judged_on": verdict.judged_on,
        "why": verdict.why,
        "use": verdict.use,
        "next": verdict.next,
        "updates": updates,
        "held_out": None if measured.held_out is None else _comparison_record(measured.held_out),
        "training": _comparison_record(measured.trained_on),
        "update_norms": {
            "all": _digits(relative_norm(norms)),
            "kinds": {kind: _digits(value) for kind, value in group_by(norms, "kind").items()},
            "blocks": {_block_name(block): _digits(value) for block, value in group_by(norms, "block").items()},
            "modules": {norm.name: _digits(relative_norm([norm])) for norm in norms},
        },
        "style_distance": _style_record(style),
    }


def _comparison_record(comparison: Comparison) -> dict:
    change = comparison.change
    bins = zip(comparison.timesteps, comparison.change_by_bin(), strict=True)
    return {
        "tracks": list(comparison.tracks),
        "draws": comparison.without.shape[1],
        "loss_without": _digits(comparison.loss_without),
        "loss_with": _digits(comparison.loss_with),
        "change": _digits(change.mean),
        "interval_95": [_digits(change.low), _digits(change.high)],
        "bins": [
            {
                **timesteps,
                "loss_without": _digits(without),
                "loss_with": _digits(without + of_bin.mean),
                "change": _digits(of_bin.mean),
                "interval_95": [_digits(of_bin.low), _digits(of_bin.high)],
            }
            for timesteps, (without, of_bin) in bins
        ],
    }


def _style_record(style: StyleDistance | str | None) -> dict | str | None:
    if not isinstance(style, StyleDistance):
        return style
    return {
        "without": _digits(style.without),
        "with_adapter": _digits(style.with_adapter),
        "change": _digits(style.change),
        "bootstrap_95": [_digits(style.low), _digits(style.high)],
        "p": _digits(style.p),
        "within_training": _digits(style.within),
        "clips": style.clips,
        "training_clips": style.training_clips,
    }


def _digits(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _block_name(block: int | None) -> str:
    return "outside" if block is None else str(block)


def draw_update_norms(norms: tuple[ModuleNorm, ...], path: Path) -> None:
    """The heat map of relative norms: blocks by kinds of layers."""
    blocks = list(group_by(norms, "block"))
    kinds = list(group_by(norms, "kind"))
    values = np.full((len(blocks), len(kinds)), np.nan)
    for norm in norms:
        values[blocks.index(norm.block), kinds.index(norm.kind)] = relative_norm([norm])
    plot_update_norms([_block_name(block) for block in blocks], kinds, values, path)


def describe_update(norms: tuple[ModuleNorm, ...]) -> str:
    """How large the update is, and where most of it is."""
    kinds, blocks = group_by(norms, "kind"), group_by(norms, "block")
    kind, block = (max(groups, key=groups.get) for groups in (kinds, blocks))
    place = "outside the blocks" if block is None else f"in block {block}"
    return (
        f"{percent(relative_norm(norms), signed=False)} of the adapted weights' norm; most in {kind} "
        f"({percent(kinds[kind], signed=False)}) and {place} ({percent(blocks[block], signed=False)})"
    )


def effect_lines(measured: Measured, verdict: Verdict, style: StyleDistance | str | None) -> list[str]:
    """What is printed at the end of the run."""
    judged = measured.held_out or measured.trained_on
    return [
        f"{_sentence(verdict.headline)}: {verdict.why}.",
        f"  by timestep    {_by_timestep(judged)}",
        f"  update         {describe_update(measured.norms)}",
        *([] if style is None else [f"  style          {_describe_style(style)}"]),
        f"  use            {verdict.use}",
        f"  advice         {verdict.next}",
    ]


def effect_section(measured: Measured, verdict: Verdict, style: StyleDistance | str | None, *, plot: str) -> str:
    """The model card's section, without its heading; `plot` is the heat map's relative path."""
    rows = ["| loss | without the adapter | with it | change | 95 % interval |", "|---|---|---|---|---|"]
    for name, comparison in (("held-out", measured.held_out), ("training", measured.trained_on)):
        if comparison is None:
            continue
        number, draws = comparison.without.shape
        rows.append(
            _row(f"**{number} {name} tracks**, {draws} draws each", comparison.loss_without, comparison.change)
        )
        for timesteps, (without, change) in zip(comparison.timesteps, comparison.change_by_bin(), strict=True):
            rows.append(_row(f"timesteps {timesteps['t_min']:.2f} to {timesteps['t_max']:.2f}", without, change))
    return "\n".join(
        [
            f"**{_sentence(verdict.headline)}**: {verdict.why}.",
            "",
            f"Use: {verdict.use}. {verdict.next}",
            "",
            *rows,
            "",
            "Every loss is of the same windows, noise and timesteps (1 is pure noise) with and without the adapter.",
            "",
            f"![norm of the update of each layer]({plot})",
            "",
            f"The update is {describe_update(measured.norms)}.",
            *([] if style is None else ["", f"Style (timbre and density, not melody): {_describe_style(style)}."]),
        ]
    )


def _describe_style(style: StyleDistance | str) -> str:
    return style if isinstance(style, str) else describe_style(style)


def _row(name: str, without: float, change: Interval) -> str:
    ends = (percent(end / without) for end in (change.low, change.high))
    interval = " to ".join(ends) if np.isfinite(change.low) else "unknown"
    return f"| {name} | {without:.4f} | {without + change.mean:.4f} | {percent(change.mean / without)} | {interval} |"


def _by_timestep(comparison: Comparison) -> str:
    return ", ".join(
        f"{_span(timesteps)} {percent(change.mean / without)}"
        for timesteps, (without, change) in zip(comparison.timesteps, comparison.change_by_bin(), strict=True)
    )


def _span(timesteps: dict[str, float]) -> str:
    ends = (f"{timesteps[end]:.2f}" for end in ("t_min", "t_max"))
    return "t " + " to ".join(dict.fromkeys(ends))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
