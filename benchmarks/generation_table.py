#!/usr/bin/env python
"""Writes the tables of generation in README's "How fast" from `results/generate_*.json`.

    python benchmarks/generation_table.py          into README.md
    python benchmarks/generation_table.py --check  exit status 1 if README.md says something else

What was not run is blank.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.errors import one_sentence_errors
from benchmarks.generate import ALL, EIGHT, SUITES, describe
from benchmarks.generation_ways import Case
from benchmarks.pages import README, write_pages
from benchmarks.results_file import RESULTS, read_rows


def main(argv: list[str] | None = None) -> None:
    """Write README.md, or compare it."""
    write_pages("benchmarks/generation_table.py", __doc__, {README: tables}, argv)


def tables(results: Path = RESULTS) -> str:
    """One track by each way; one batch with several adapters; whether all ways sound alike."""
    rows = {suite: read_rows(results / f"generate_{suite}.json") for suite in SUITES}
    lines = [
        "| a track | on | plain diffusers | compiled | with an adapter | here | compiled | with an adapter | compiled "
        "| fused | compiled |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *table_lines(rows, ALL, prompts=1),
        "",
        "| a batch | on | one adapter | four adapters, in pairs | in turn |",
        "|---|---|---|---|---|",
        *table_lines(rows, EIGHT, prompts=8),
        "",
        *(f"- {line}" for suite in SUITES for line in agreement(rows[suite], suite)),
    ]
    return "\n".join(lines)


def table_lines(rows: dict[str, list[dict]], ways: tuple[str, ...], *, prompts: int) -> list[str]:
    """A line for each configuration with so many prompts; the first way in milliseconds, the others beside it."""
    lines = []
    for suite, stages in SUITES.items():
        for stage, configurations in stages.items():
            for case, _ in configurations:
                if case.prompts == prompts:
                    found = [find(rows[suite], case, way, stage) for way in ways]
                    on = next((f"{row['hardware']}, {row['precision']}" for row in found if row), "")
                    cells = [cell(row) for row in found]
                    to = "" if case.decoded else ", to latents"
                    lines.append(f"| {describe(case)}{to} | {on} | {' | '.join(cells)} |")
    return lines


def find(rows: list[dict], case: Case, way: str, stage: str) -> dict | None:
    """The row of a configuration, if it was run, and memory did not run out."""
    found = (row for row in rows if Case(**row["case"]) == case and (row["stage"], row["way"]) == (stage, way))
    return next((row for row in found if "ms" in row), None)


def cell(row: dict | None) -> str:
    """Milliseconds of the first way, the time of another over it, with quartiles."""
    if row is None:
        return ""
    if row["vs_first"] is None:
        return "{median:,.0f} ms ({q1:,.0f}–{q3:,.0f})".format(**row["ms"])
    return "{median:.2f} × ({q1:.2f}–{q3:.2f})".format(**row["vs_first"])


def agreement(rows: list[dict], suite: str) -> list[str]:
    """How far latents are from those of the way that they ought to equal, and what hot-swaps had to compile."""
    # XL's timbre token, which diffusers leaves out, makes another sound.
    alike = [row for row in rows if row.get("difference") is not None and row["case"]["size"] != "xl"]
    differences = [row["difference"] for row in alike]
    compiled = [row["graphs_compiled_by_swaps"] for row in rows if row.get("graphs_compiled_by_swaps") is not None]
    precision = next((f", {row['precision']}" for row in rows if "precision" in row), "")
    most = f"{max(differences):.0e} of them at most{precision}" if differences else "not run"
    swaps = f"{sum(compiled)}" if compiled else "not run"
    return [
        f"{suite.upper()}, how far latents are from plain diffusers' with the same adapter: {most}",
        f"{suite.upper()}, graphs compiled anew when another adapter and another weight came: {swaps}",
    ]


if __name__ == "__main__":
    with one_sentence_errors():
        main()
