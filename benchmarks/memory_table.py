#!/usr/bin/env python
"""Writes what fits into which memory into docs/training.md, from `results/memory_*.json`.

    python benchmarks/memory_table.py          into docs/training.md
    python benchmarks/memory_table.py --check  exit status 1 if docs/training.md says something else

What was not run is blank.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.errors import one_sentence_errors
from benchmarks.memory import CPU_STAGES, GPU_STAGES, SONGS, SUITES, TARGETS
from benchmarks.pages import TRAINING_PAGE, write_pages
from benchmarks.results_file import RESULTS, find, read_rows

NAMES = {
    "c": "2 B, 60 s, not quantised",
    "c_checkpointed": "the same, checkpointing",
    "vram_12gb": "2 B, up to 120 s, checkpointing",
    "vram_8gb": "2 B, 60 s, base in 4 bits",
    "xl_vram_16gb": "XL, 60 s, base in 4 bits",
}


def main(argv: list[str] | None = None) -> None:
    """Write docs/training.md, or compare it."""
    write_pages("benchmarks/memory_table.py", __doc__, {TRAINING_PAGE: tables}, argv)


def tables(results: Path = RESULTS) -> str:
    """A line for each target, and how far predictions are from what was counted and measured."""
    rows = {suite: read_rows(results / f"memory_{suite}.json") for suite in SUITES}
    minutes = [f"{song_s // 60} min" for song_s in SONGS]
    lines = [
        f"| | flags | limit | update | cache | samples | on a GPU, songs of {minutes[0]} | a song of {minutes[1]} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, target in TARGETS.items():
        predicted = predicted_cells(find(rows["cpu"], "targets", target))
        measured = [measured_cell(find(rows["gpu"], name, case), target.limit_gb) for case in GPU_STAGES[name]]
        cells = [NAMES[name], f"`{target.flags}`", f"{target.limit_gb}", *predicted, *measured]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in agreement(rows["cpu"]))])


def predicted_cells(row: dict | None) -> list[str]:
    """GB of update, cache and samples: the most for songs of any length."""
    if row is None:
        return [""] * 3
    songs = row["predicted_for"].values()
    update, cache, samples = (
        f"{max(song[f'{phase}_bytes'] for song in songs) / 1e9:.1f}" for phase in ("update", "encoding", "samples")
    )
    passes = {song["windows_in_a_pass"] for song in songs}
    return [f"{update} ({max(passes)} in a pass)", cache, samples]


def measured_cell(row: dict | None, limit_gb: float) -> str:
    """E.g. `10.9, met (an H100)`."""
    if row is None:
        return ""
    if row.get("out_of_memory"):
        return f"does not fit ({row['hardware']})"
    peak = (row["allocated_bytes"] + row["outside_bytes"]) / 1e9
    return f"{peak:.1f}, {'met' if peak <= limit_gb else 'missed'} ({row['hardware']})"


def agreement(rows: list[dict]) -> list[str]:
    """Fake tensors beside formulas, and the embedded checkpoint's peaks by length of the song."""
    targets = [row for case in CPU_STAGES["targets"] if (row := find(rows, "targets", case))]
    ratios = [row["unquantised_adamw"]["ratio"] for row in targets]
    span = f"{min(ratios):.2f} to {max(ratios):.2f} of what real code takes on fake tensors" if ratios else "not run"
    tiles = [row for case in CPU_STAGES["tiles"] if (row := find(rows, "tiles", case))]
    tile_ratios = [row["predicted_bytes"] / size for row in tiles for size in row["accounted_bytes"].values()]
    coded = f"{min(tile_ratios):.2f} to {max(tile_ratios):.2f}" if tile_ratios else "not run"
    songs = [(case, find(rows, "songs", case)) for case in CPU_STAGES["songs"]]
    peaks = [f"{row['resident_bytes'] / 1e6:,.0f} MB ({case.song_s // 60} min)" for case, row in songs if row]
    return [
        f"Memory of an update at full width, unquantised, AdamW, as predicted for a CPU's kernels: {span}",
        f"The same of coding songs of one and ten minutes in tiles, where decoded audio comes on top: {coded}",
        f"Peak of the process that trains the embedded checkpoint on a song: {', '.join(peaks) or 'not run'}",
    ]


if __name__ == "__main__":
    with one_sentence_errors():
        main()
