#!/usr/bin/env python
"""How fast preset c trains: full-size DiTs on a GPU, a small one on a CPU, with random weights and real shapes.

    make bench                                                   on a CPU, some minutes
    make bench-gpu                                               on a GPU; each stage under 10 minutes
    python benchmarks/training_speed.py --stages side_by_side    one stage
    python benchmarks/training_speed.py --suite gpu --size small --max_seconds 4 --updates 4     a rehearsal on a CPU

What is measured is in `training_measure.py`, what is compared in `training_ways.py`. Results are written after every
configuration, and what the file has of this commit and hardware is not measured again, so that a run that was cut goes
on where it was.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.errors import UsageError, one_sentence_errors
from benchmarks.random_models import SIZES
from benchmarks.results_file import RESULTS, Results, measure_or_not
from benchmarks.suites import check_stages, choose_suite, suite_parser
from benchmarks.training_cases import Case
from benchmarks.training_measure import measure

SIDE_BY_SIDE, MASKS = ("bare", "peers", "ours"), ("ours_dense", "ours")
COMPILED = ("ours", "compiled")
# Ours, and without one trick each.
TRICKED = (
    "ours", "one_by_one", "ours_dense", "padded", "plain_optimizer", "waiting", "not_read_ahead", "half_checkpointed",
    "checkpointed",
)  # fmt: skip
# Stage -> configurations, each with the ways that take turns.
CPU_STAGES: dict[str, list[tuple[Case, tuple[str, ...]]]] = {
    "side_by_side": [(Case("small", 30), SIDE_BY_SIDE)],
    "masks": [(Case("small", 60), MASKS), (Case("small", 240, windows=1), MASKS)],
    "lengths": [(Case("small", 120), ("ours",))],
    "compiled": [(Case("small", 30), COMPILED)],
    "tricks": [(Case("small", 30), TRICKED)],
}
GPU_STAGES: dict[str, list[tuple[Case, tuple[str, ...]]]] = {
    "side_by_side": [(Case("2b", seconds), SIDE_BY_SIDE) for seconds in (60, 30)],
    "lengths": [(Case("2b", seconds), ("ours",)) for seconds in (30, 60, 120, 240)],
    "checkpointing": [(Case("2b", seconds, checkpointing=1.0), ("ours",)) for seconds in (60, 120, 240)],
    "conditions": [(Case("2b", 60, tokens, tokens), ("ours",)) for tokens in (30, 100, 400)],
    "masks": [(Case("2b", seconds, checkpointing=1.0), MASKS) for seconds in (60, 240)],
    "compiled": [(Case("2b", 60, checkpointing=ratio), COMPILED) for ratio in (0.0, 1.0)],
    "tricks": [(Case("2b", 60), TRICKED)],
    "xl": [(Case("xl", seconds), ("ours",)) for seconds in (30, 60)]
    + [(Case("xl", seconds, checkpointing=1.0), ("ours",)) for seconds in (60, 120, 240)],
}
SUITES = {"cpu": CPU_STAGES, "gpu": GPU_STAGES}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = suite_parser(__doc__, "training_speed", SUITES)
    p.add_argument("--size", choices=SIZES, help="this model instead of those of the suite")
    p.add_argument("--max_seconds", type=int, help="windows of at most this, instead of those of the suite")
    p.add_argument("--updates", type=int, default=24, help="timed updates of each way (default: %(default)s)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the stages, and print what they come to."""
    args = parse_args(argv)
    suite = choose_suite(args.suite, rehearsed=args.size is not None, rehearsal="--size small")
    stages = SUITES[suite]
    check_stages(args.stages, stages, suite)
    if args.updates < 2:
        raise UsageError(f"--updates must be at least 2, not {args.updates}.")
    output = args.output or RESULTS / f"training_speed_{suite}.json"
    results = Results(output, overwrite=args.overwrite, describe=describe_row)
    for stage in args.stages or stages:
        for case, ways in stages[stage]:
            seconds = min(case.seconds, args.max_seconds or case.seconds)
            case = dataclasses.replace(case, size=args.size or case.size, seconds=seconds)
            if not results.has(stage, case):
                print(f"{stage}: {describe(case)} …", flush=True)
                measured = functools.partial(measure, case, ways, updates=args.updates)
                results.add(stage, case, measure_or_not(measured, ways))
    from benchmarks.training_table import targets

    for line in targets(results.rows, suite):
        print(line)
    print(f"Wrote {output}; benchmarks/training_table.py puts it into README.md.")


def describe(case: Case) -> str:
    """E.g. `2b, 60 s, 30-400 condition tokens, checkpointing`."""
    tokens = f"{case.least_tokens}-{case.most_tokens}" if case.least_tokens < case.most_tokens else case.most_tokens
    extra = ", checkpointing" if case.checkpointing else ""
    windows = "" if case.windows == Case.windows else f"{case.windows} × "
    return f"{case.size}, {windows}{case.seconds} s, {tokens} condition tokens{extra}"


def describe_row(row: dict) -> str:
    """One line for a person."""
    if "ms_per_update" not in row:
        return f"{row['way']:14} out of memory"
    ms, mfu = row["ms_per_update"], row["mfu"]
    line = f"{row['way']:14}{ms['median']:9.1f} ms ({ms['q1']:.1f}-{ms['q3']:.1f}){row['tracks_per_s']:9.2f} tracks/s"
    line += f"{row['tflop_per_s']:9.3f} TFLOP/s" + ("" if mfu is None else f"{100 * mfu:6.1f} % MFU")
    if "compile_s" in row:
        line += f", {row['compile_s']} s to compile, {row['recompilations']} recompilations"
    if "difference" in row:
        line += f", differs by {row['difference']:.1g}"
    return line + "".join(
        f", {value['median']:.3f} × {name.removeprefix('vs_')}" for name, value in row.items() if name[:3] == "vs_"
    )


if __name__ == "__main__":
    with one_sentence_errors(debug=False):
        main()
