#!/usr/bin/env python
"""Writes how right `acestep-lora estimate` is into docs/training.md, from `results/estimate_*.json`.

    python benchmarks/estimate_table.py          into docs/training.md
    python benchmarks/estimate_table.py --check  exit status 1 if docs/training.md says something else

What was not run is blank.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.errors import one_sentence_errors
from benchmarks.estimate import SUITES, describe
from benchmarks.pages import TRAINING_PAGE, write_pages
from benchmarks.results_file import RESULTS, find, read_rows


def main(argv: list[str] | None = None) -> None:
    """Write docs/training.md, or compare it."""
    write_pages("benchmarks/estimate_table.py", __doc__, {TRAINING_PAGE: tables}, argv)


def tables(results: Path = RESULTS) -> str:
    """A line for each full-size case, and how far predictions for smaller models are off."""
    rows = {suite: read_rows(results / f"estimate_{suite}.json") for suite in SUITES}
    lines = [
        "| an update | on | memory: predicted | measured | time: predicted | by published figures | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for suite, stages in SUITES.items():
        for case in stages["full_size"]:
            lines.append(f"| {describe(case)} | {' | '.join(cells(find(rows[suite], 'full_size', case)))} |")
    return "\n".join([*lines, "", *(f"- {small_models(rows[suite], suite)}" for suite in SUITES)])


def cells(row: dict | None) -> list[str]:
    """The cells after the first; blank if it was not run, or memory ran out."""
    if row is None or "measured_bytes" not in row:
        return [""] * 6
    seconds = [row["predicted_s"].get("this"), row["predicted_s"].get("published"), row["measured_s"]]
    return [
        row["hardware"],
        f"{sum(row['predicted_bytes'].values()) / 1e6:,.0f} MB",
        f"{row['measured_bytes'] / 1e6:,.0f} MB",
        *("" if value is None else f"{value:.3g} s" for value in seconds),
    ]


def small_models(rows: list[dict], suite: str) -> str:
    """The span of what is predicted over what was measured."""
    found = [find(rows, "small", case) for case in SUITES[suite]["small"]]
    found = [row for row in found if row and "measured_bytes" in row]
    what = f"{suite.upper()}, smaller models, predicted over measured"
    if not found:
        return f"{what}: not run"
    sizes, times = [row["bytes_ratio"] for row in found], [row["time_ratio"]["this"] for row in found]
    return (
        f"{what}: memory {min(sizes):.2f} to {max(sizes):.2f}, time {min(times):.2f} to {max(times):.2f} "
        f"({len(found)} cases)"
    )


if __name__ == "__main__":
    with one_sentence_errors():
        main()
