#!/usr/bin/env python
"""How long generating takes, with adapters and without, compiled and not, beside plain diffusers on the same weights.

    python benchmarks/generate.py                          every stage that this machine is for
    python benchmarks/generate.py --stages turbo           one of them
    python benchmarks/generate.py --suite gpu --size small --max_seconds 4 --max_steps 2 --generations 2   a rehearsal

On a GPU: full-size models with random weights, from the prompt to audio. On a CPU: a small DiT, to latents (decoding
would take most of the time, and the same with adapters as without), and two blocks of the 2 B model's width. Ways take
turns, a generation each, after a warm-up that compiles; milliseconds of a track are the median and the quartiles of
these generations, ratios those of the pairs with plain diffusers of the same turn. The shares of text, steps and
decoding come from further generations, in which the device finishes each before the next begins. `difference` is how
far latents are from those of the way that they ought to equal, relative to them. What is compared is in
`generation_ways.py`; `generation_table.py` writes README's table. Results are written after every configuration, and
what the file has of this commit and hardware is not measured again.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.errors import UsageError, one_sentence_errors
from acestep_pipeline.training.compilation import compiled_graphs
from benchmarks.device_time import synchronize
from benchmarks.generation_ways import WAYS, Bench, Case
from benchmarks.random_models import SIZES
from benchmarks.results_file import RESULTS, Results, measure_or_not
from benchmarks.suites import check_stages, choose_suite, suite_parser
from benchmarks.training_measure import spread

ALL = tuple(way for way in WAYS if not way.startswith("adapters_"))
FEW = ("diffusers", "diffusers_compiled", "adapter", "adapter_compiled")
EIGHT = ("adapter", "adapters_in_pairs", "adapters_in_turn")
SMALL = {"decoded": False, "rank": 8}  # an eighth of the width, and of the rank
# Stage -> configurations, each with the ways that take turns.
CPU_STAGES: dict[str, list[tuple[Case, tuple[str, ...]]]] = {
    "turbo": [(Case("small", "turbo", 60, 8, 1.0, **SMALL), ALL)],
    "base": [(Case("small", "base", 6, 27, guidance, **SMALL), FEW) for guidance in (1.0, 7.0)],
    "width": [(Case("wide", "base", 10, 1, 7.0, decoded=False), ("diffusers", "adapter", "fused"))],
    "adapters": [(Case("wide", "base", 4, 1, 1.0, prompts=8, decoded=False), EIGHT)],
}
GPU_STAGES: dict[str, list[tuple[Case, tuple[str, ...]]]] = {
    "turbo": [(Case("2b", "turbo", 60, 8, 1.0), ALL)],
    "base_27": [(Case("2b", "base", 60, 27, guidance), FEW) for guidance in (1.0, 7.0)],
    "base_50": [(Case("2b", "base", 60, 50, guidance), FEW) for guidance in (1.0, 7.0)],
    "fused": [(Case("2b", "base", 60, 27, 7.0), ("diffusers", "diffusers_adapter", "fused", "fused_compiled"))],
    "xl_turbo": [(Case("xl", "turbo", 60, 8, 1.0), FEW)],
    "xl_base": [(Case("xl", "base", 60, 27, 7.0), FEW)],
    "adapters": [(Case("2b", "turbo", 20, 8, 1.0, prompts=8), EIGHT)],
}
SUITES = {"cpu": CPU_STAGES, "gpu": GPU_STAGES}
WARM_UP, SPLIT_GENERATIONS = 2, 3


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = suite_parser(__doc__, "generate", SUITES)
    p.add_argument("--size", choices=SIZES, help="this model instead of those of the suite")
    p.add_argument("--max_seconds", type=int, help="tracks of at most this, instead of those of the suite")
    p.add_argument("--max_steps", type=int, help="at most so many steps, instead of those of the suite")
    p.add_argument("--generations", type=int, default=20, help="timed, of each way (default: %(default)s)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the stages."""
    args = parse_args(argv)
    suite = choose_suite(args.suite, rehearsed=args.size is not None, rehearsal="--size small")
    stages = SUITES[suite]
    check_stages(args.stages, stages, suite)
    if args.generations < 2:
        raise UsageError(f"--generations must be at least 2, not {args.generations}.")
    output = args.output or RESULTS / f"generate_{suite}.json"
    results = Results(output, overwrite=args.overwrite, describe=describe_row)
    for stage in args.stages or stages:
        for case, ways in stages[stage]:
            seconds, steps = min(case.seconds, args.max_seconds or 600), min(case.steps, args.max_steps or 1000)
            case = dataclasses.replace(case, size=args.size or case.size, seconds=seconds, steps=steps)
            if not results.has(stage, case):
                print(f"{stage}: {describe(case)} …", flush=True)
                measured = functools.partial(measure, case, ways, generations=args.generations)
                results.add(stage, case, measure_or_not(measured, ways))
    print(f"Wrote {output}; benchmarks/generation_table.py puts it into README.md.")


def describe(case: Case) -> str:
    """E.g. `2b turbo, 60 s, 8 steps, no guidance`."""
    guidance = "no guidance" if case.guidance <= 1 else f"guidance {case.guidance:g}"
    prompts = "" if case.prompts == 1 else f"{case.prompts} × "
    steps = "1 step" if case.steps == 1 else f"{case.steps} steps"
    return f"{case.size} {case.variant}, {prompts}{case.seconds} s, {steps}, {guidance}"


def describe_row(row: dict) -> str:
    """One line for a person."""
    if "ms" not in row:
        return f"{row['way']:20} out of memory"
    line = f"{row['way']:20}" + "{median:10.1f} ms ({q1:.1f}-{q3:.1f})".format(**row["ms"])
    line += "" if row["vs_first"] is None else f"{row['vs_first']['median']:8.3f} ×"
    line += "" if row["difference"] is None else f"  latents differ by {row['difference']:.1e}"
    recompiled = row["graphs_compiled_by_swaps"]
    return line + ("" if recompiled is None else f"  {recompiled} graphs compiled by swaps")


@torch.no_grad()
def measure(case: Case, ways: tuple[str, ...], *, generations: int) -> list[dict]:
    """One row for each way, all on the same weights, in turns."""
    torch.compiler.reset()
    with (
        tempfile.TemporaryDirectory() as folder,
        # One entry for each kind of block, adapter layers and pipeline: together more than the eight that are usual.
        torch._dynamo.config.patch(recompile_limit=64),
    ):
        bench = Bench(case, Path(folder))
        rows = {way: warm_up(bench, way) for way in ways}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(generations):
            # In turn from the front and from the back, so that a drift of the machine's speed cancels.
            for way in ways[:: -1 if number % 2 else 1]:
                seconds[way].append(timed(bench, way))
        latents = {way: bench.generate(way, decoded=False).float() for way in ways}
        for way, row in rows.items():
            pairs = zip(seconds[way], seconds[ways[0]], strict=True)
            equal = latents.get(WAYS[way].equals)
            row |= {
                "ms": spread([1000 * value for value in seconds[way]]),
                "vs_first": None if way == ways[0] else spread([mine / first for mine, first in pairs], digits=4),
                "difference": None if equal is None else float((latents[way] - equal).norm() / equal.norm()),
                "phases_ms": split(bench, way),
            }
        for way in ways:
            swappable = WAYS[way].compiled and WAYS[way].adapters and not WAYS[way].fused
            rows[way]["graphs_compiled_by_swaps"] = bench.swap_adapter(way) if swappable else None
        return list(rows.values())


def warm_up(bench: Bench, way: str) -> dict:
    """Generations that are not timed, with what the first of them compiles: the beginning of a row."""
    bench.pipeline(way)
    before, started = compiled_graphs(), now(bench.device)
    for _ in range(WARM_UP):
        bench.generate(way)
    return {
        "way": way,
        "precision": str(bench.dtype).removeprefix("torch."),
        "warm_up_generations": WARM_UP,
        "warm_up_s": round(now(bench.device) - started, 2),
        # What an earlier way compiled is not compiled again.
        "graphs_compiled": compiled_graphs() - before,
    }


def timed(bench: Bench, way: str) -> float:
    """Seconds of a generation."""
    started = now(bench.device)
    bench.generate(way)
    return now(bench.device) - started


def split(bench: Bench, way: str) -> dict[str, float]:
    """Milliseconds of text, steps and decoding: medians of further generations."""
    taken: dict[str, list[float]] = {"text": [], "steps": [], "decoding": []}
    for _ in range(SPLIT_GENERATIONS):
        ends = [now(bench.device)]

        def began(*_, ends=ends) -> None:  # of each step
            if len(ends) == 1:
                ends.append(now(bench.device))

        def ended(*_, ends=ends) -> dict:
            ends[2:] = [now(bench.device)]
            return {}

        hook = bench.pipeline(way).transformer.register_forward_pre_hook(began)
        bench.generate(way, callback_on_step_end=ended)
        hook.remove()
        ends.append(now(bench.device))
        for phase, before, after in zip(taken, ends, ends[1:], strict=False):
            taken[phase].append(1000 * (after - before))
    return {phase: round(statistics.median(values), 2) for phase, values in taken.items()}


def now(device: torch.device) -> float:
    """When the device has done what it was told."""
    synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    with one_sentence_errors(debug=False):
        main()
