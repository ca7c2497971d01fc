#!/usr/bin/env python
"""Writes tables of `results/training_speed_*.json`: how fast, into README.md, and what each trick gains, into
docs/training.md; and judges the targets.

    python benchmarks/training_table.py          into both pages
    python benchmarks/training_table.py --check  exit status 1 if one of them says something else

What was not run is blank.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.errors import one_sentence_errors
from benchmarks.pages import README, TRAINING_PAGE, write_pages
from benchmarks.results_file import RESULTS, read_rows
from benchmarks.training_cases import PADDED_TOKENS
from benchmarks.training_speed import SUITES, Case, describe

# Way without it -> the trick, and the test of its equality in `tests/`.
TRICK_ROWS = {
    "one_by_one": ("all windows of an update in one pass, not one by one", "test_update_division.py"),
    "ours_dense": ("attention within the window, not under a dense mask", "test_masked_attention.py"),
    "padded": (f"conditions padded to the batch's longest, not to {PADDED_TOKENS} tokens", "test_condition_mask.py"),
    "plain_optimizer": ("AdamW in one call (on CUDA one kernel), not one parameter at a time", "test_optimizers.py"),
    "waiting": ("no number asked of the device within an update", "test_training_speed.py"),
    "not_read_ahead": ("batches read ahead by a thread", "test_batching.py"),
    "compiled": ("`--torch_compile`", "test_compilation.py"),
    "half_checkpointed": ("`--gradient_checkpointing_ratio 0.5`", "test_memory.py"),
    "checkpointed": ("`--gradient_checkpointing`", "test_memory.py"),
}
# What the product page says of 100 tracks × 100 epochs on an H100.
PAGE_HOURS = 5


def main(argv: list[str] | None = None) -> None:
    """Write the pages, or compare them."""
    write_pages("benchmarks/training_table.py", __doc__, {README: tables, TRAINING_PAGE: tricks_table}, argv)


def tables(results: Path = RESULTS) -> str:
    """All of it: speed by configuration, the comparison, the targets."""
    rows = {suite: read_rows(results / f"training_speed_{suite}.json") for suite in SUITES}
    lines = speed_table(rows)
    lines += ["", *comparison_table(rows), ""]
    lines += [line for suite in SUITES for line in (f"- {target}" for target in targets(rows[suite], suite))]
    return "\n".join(lines)


def find(rows: list[dict], case: Case, way: str, stage: str) -> dict | None:
    """The row of a configuration, if it was run, and memory did not run out."""
    found = (row for row in rows if Case(**row["case"]) == case and (row["stage"], row["way"]) == (stage, way))
    return next((row for row in found if "ms_per_update" in row), None)


def speed_table(rows: dict[str, list[dict]]) -> list[str]:
    """One line for each configuration that this trainer's own way is run on, alone or beside others."""
    lines = [
        "| preset c | on | ms an update (quartiles) | tracks/s | tokens/s | TFLOP/s (MFU) | peak memory "
        "| 50, 100, 200 tracks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for suite, all_stages in SUITES.items():
        stages = {stage: runs for stage, runs in all_stages.items() if stage not in ("compiled", "tricks")}
        stage_of = {case: stage for stage, configurations in stages.items() for case, _ in configurations}
        # Alone if it is, so that the memory is its own.
        stage_of |= {case: stage for stage, runs in stages.items() for case, ways in runs if ways == ("ours",)}
        for case in sorted(stage_of, key=lambda c: (c.size, c.checkpointing, c.most_tokens != 400, c.seconds)):
            cells = speed_cells(find(rows[suite], case, "ours", stage_of[case]))
            lines.append(f"| {describe(case)} | {' | '.join(cells)} |")
    return lines


def speed_cells(row: dict | None) -> list[str]:
    """The cells after the first."""
    if row is None:
        return [""] * 7
    ms, mfu = row["ms_per_update"], row["mfu"]
    times = ", ".join(duration(row["preset_c_s"][tracks]) for tracks in ("50", "100", "200"))
    return [
        f"{row['hardware']}, {row['precision']}",
        f"{ms['median']:,.0f} ({ms['q1']:,.0f}–{ms['q3']:,.0f})",
        f"{row['tracks_per_s']:.2f}",
        f"{row['tokens_per_s']:,}",
        f"{row['tflop_per_s']:.3g}" + ("" if mfu is None else f" ({100 * mfu:.0f} %)"),
        f"{row['peak_memory_bytes'] / 1e9:.1f} GB",
        times,
    ]


def duration(seconds: float) -> str:
    """E.g. `12 min`, `3.4 h`."""
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def comparison_table(rows: dict[str, list[dict]]) -> list[str]:
    """Time of the other ways beside ours, in one run."""
    lines = [
        "| time of an update beside this trainer's, in one run | a bare loop | as other trainers do it "
        "| with dense masks | compiled |",
        "|---|---|---|---|---|",
    ]
    for suite, stages in SUITES.items():
        compared = [(case, stage) for stage in ("side_by_side", "masks", "compiled") for case, _ in stages[stage]]
        for case in dict.fromkeys(case for case, _ in compared):
            of_case = [stage for other, stage in compared if other == case]

            def row(way: str, case=case, rows=rows[suite], of_case=of_case) -> dict | None:
                return next(filter(None, (find(rows, case, way, stage) for stage in of_case)), None)

            cells = [ratio(row(way)) for way in ("bare", "peers", "ours_dense")] + [compiled_cell(row("compiled"))]
            lines.append(f"| {suite.upper()}: {describe(case)} | {' | '.join(cells)} |")
    return lines


def compiled_cell(row: dict | None) -> str:
    """The time of an update, and apart from it what had to be compiled first, and again."""
    if row is None:
        return ""
    return (
        f"{ratio(row)}; {row['shapes']} shapes compiled in {row['compile_s']:.0f} s before, "
        f"{row['recompilations']} graphs again"
    )


def tricks_table(results: Path = RESULTS) -> str:
    """What each trick gains, of time or memory, and by how much it changes the gradients."""
    rows = {suite: read_rows(results / f"training_speed_{suite}.json") for suite in SUITES}
    cases = {suite: stages["tricks"][0][0] for suite, stages in SUITES.items()}
    named = [f"time without it / with it, {suite.upper()}: {describe(case)}" for suite, case in cases.items()]
    lines = [
        f"| trick | {' | '.join(named)} | the gradients differ by | test |",
        "|---" * (len(named) + 3) + "|",
    ]
    for way, (name, test) in TRICK_ROWS.items():
        found = {suite: trick_row(rows[suite], cases[suite], way) for suite in SUITES}
        cells = [
            trick_cell(way, row, find(rows[suite], cases[suite], "ours", "tricks")) for suite, row in found.items()
        ]
        differences = [
            f"{row['difference']:.1g} ({row['precision']})" for row in found.values() if row and "difference" in row
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(differences)} | `{test}` |")
    return "\n".join(lines)


def trick_row(rows: list[dict], case: Case, way: str) -> dict | None:
    """What was measured without a trick; or with it, of those that are flags."""
    return find(rows, case, way, "compiled" if way == "compiled" else "tricks")


def trick_cell(way: str, row: dict | None, ours: dict | None) -> str:
    """The gain: time without the trick over time with it; and of checkpointing, the memory that is left."""
    if row is None:
        return ""
    taken = row["vs_ours"]["median"]
    if "checkpointed" in way and ours:
        return f"{1 / taken:.2f}, memory {row['peak_memory_bytes'] / ours['peak_memory_bytes']:.2f} of that without"
    return f"{1 / taken if way == 'compiled' else taken:.2f}"


def ratio(row: dict | None) -> str:
    """The time of a way over that of ours, with quartiles."""
    if row is None or "vs_ours" not in row:
        return ""
    return "{median:.2f} × ({q1:.2f}–{q3:.2f})".format(**row["vs_ours"])


def targets(rows: list[dict], suite: str) -> list[str]:
    """What was aimed at, and whether it was met, missed or not run."""
    judged = []

    def judge(what: str, value: float | None, holds, shown: str = "{:.2f}") -> None:
        verdict = "not run" if value is None else f"{shown.format(value)}, {'met' if holds(value) else 'missed'}"
        judged.append(f"{what}: {verdict}")

    def value(case: Case, way: str, stage: str, *names: str) -> float | None:
        row = find(rows, case, way, stage)
        for name in names:
            row = row and row.get(name)
        return row

    if suite == "cpu":
        case = SUITES["cpu"]["side_by_side"][0][0]
        peers = value(case, "peers", "side_by_side", "vs_ours", "median")
        judge("CPU, at least 1.3 times faster than other trainers do it", peers, lambda v: v >= 1.3)
        bare = value(case, "bare", "side_by_side", "vs_ours", "median")
        judge("CPU, at most 1.03 times a bare loop's time", bare and 1 / bare, lambda v: v <= 1.03, "{:.3f}")
        return judged
    rows = [row for row in rows if re.search(r"\bH[12]00\b", row["hardware"])]  # what the targets are for
    minute = Case("2b", 60)
    peers = value(minute, "peers", "side_by_side", "vs_ours", "median")
    judge("GPU, at least 3 times faster than other trainers do it", peers, lambda v: v >= 3)
    judge("GPU, MFU of at least 45 %", value(minute, "ours", "lengths", "mfu"), lambda v: v >= 0.45, "{:.0%}")
    checkpointed = value(Case("2b", 60, checkpointing=1.0), "ours", "checkpointing", "mfu")
    judge("GPU, with gradient checkpointing at least 35 %", checkpointed, lambda v: v >= 0.35, "{:.0%}")
    seconds = value(minute, "ours", "lengths", "preset_c_s", "100")
    page = (
        f"GPU, preset c on 100 one-minute tracks within 10 min (the product page says {PAGE_HOURS} h), caching aside"
    )
    judge(page, seconds and seconds / 60, lambda v: v <= 10, "{:.1f} min")
    return judged


if __name__ == "__main__":
    with one_sentence_errors():
        main()
