#!/usr/bin/env python
"""Writes the table of caching in README's "How fast" from `results/latent_cache_*.json`, and judges the targets.

    python benchmarks/latent_cache_table.py          into README.md
    python benchmarks/latent_cache_table.py --check  exit status 1 if README.md says something else

What was not run is blank.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.errors import one_sentence_errors
from benchmarks.latent_cache import SUITES, Case, describe
from benchmarks.pages import README, write_pages
from benchmarks.results_file import RESULTS, read_rows


def main(argv: list[str] | None = None) -> None:
    """Write README.md, or compare it."""
    write_pages("benchmarks/latent_cache_table.py", __doc__, {README: tables}, argv)


def tables(results: Path = RESULTS) -> str:
    """A line for each suite, and the targets."""
    rows = {suite: read_rows(results / f"latent_cache_{suite}.json") for suite in SUITES}
    lines = [
        "| filling the cache | on | × real time (quartiles) | a naive loop | times as fast "
        "| a track: decoding, VAE, text |",
        "|---|---|---|---|---|---|",
    ]
    for suite, case in SUITES.items():
        ours, naive = (find(rows[suite], case, way) for way in ("ours", "naive"))
        lines.append(f"| {describe(case)} | {' | '.join(cells(ours, naive))} |")
    return "\n".join([*lines, "", *(f"- {target(rows[suite], suite)}" for suite in SUITES)])


def find(rows: list[dict], case: Case, way: str) -> dict | None:
    """The row of a configuration, if it was run, and memory did not run out."""
    found = (row for row in rows if Case(**row["case"]) == case and row["way"] == way)
    return next((row for row in found if "times_real_time" in row), None)


def cells(ours: dict | None, naive: dict | None) -> list[str]:
    """The cells after the first."""
    if ours is None or naive is None:
        return [""] * 5
    precision = ours["vae_precision"]
    if precision != ours["text_precision"]:
        precision += f" (text {ours['text_precision']})"
    return [
        f"{ours['hardware']}, {precision}",
        *("{median:.1f} ({q1:.1f}–{q3:.1f})".format(**row["times_real_time"]) for row in (ours, naive)),
        "{median:.2f} ({q1:.2f}–{q3:.2f})".format(**ours["times_as_fast"]),
        ", ".join(f"{1000 * seconds:,.0f}" for seconds in ours["parts_s_per_track"].values()) + " ms",
    ]


def target(rows: list[dict], suite: str) -> str:
    """What was aimed at, and whether it was met, missed or not run."""
    ours = find(rows, SUITES[suite], "ours")
    if suite == "cpu":
        what, least, value = "CPU, at least 1.5 times as fast as a naive loop", 1.5, "times_as_fast"
    else:
        what, least, value = "GPU, at least 200 times real time", 200, "times_real_time"
        if ours and not re.search(r"\bH[12]00\b", ours["hardware"]):  # what the target is for
            ours = None
    if ours is None:
        return f"{what}: not run"
    median = ours[value]["median"]
    return f"{what}: {median:.2f}, {'met' if median >= least else 'missed'}"


if __name__ == "__main__":
    with one_sentence_errors():
        main()
