"""Which configurations a benchmark with a suite for CPUs and one for GPUs runs."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from acestep_pipeline.errors import UsageError
from acestep_pipeline.hardware import default_device


def suite_parser(about: str, results: str, suites: Mapping, *, unset: str = "all") -> argparse.ArgumentParser:
    """The command line of a benchmark whose help is `about`, but for flags of its own.

    Args:
        results: the results file's name, without `_cpu.json`.
        suites: by their names; of those that have stages, a mapping of these.
        unset: which stages run where none are named.
    """
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suite", choices=tuple(suites), help="what is measured (unset: by whether there is a GPU)")
    if all(isinstance(stages, Mapping) for stages in suites.values()):
        names = "; ".join(f"{suite}: {', '.join(stages)}" for suite, stages in suites.items())
        p.add_argument("--stages", nargs="+", metavar="STAGE", help=f"{names} (unset: {unset})")
    p.add_argument("--output", type=Path, help=f"results file (unset: benchmarks/results/{results}_SUITE.json)")
    p.add_argument("--overwrite", action="store_true", help="measure again what the file has")
    return p


def choose_suite(asked: str | None, *, rehearsed: bool, rehearsal: str) -> str:
    """The suite that was asked for, "cpu" or "gpu", or else that of this machine.

    Raises:
        UsageError: there is no GPU for that of GPUs, and it is not `rehearsed`, which the flag `rehearsal` does.
    """
    has_gpu = default_device().type == "cuda"
    suite = asked or ("gpu" if has_gpu else "cpu")
    if suite == "gpu" and not has_gpu and not rehearsed:
        raise UsageError(f"the GPU suite needs a CUDA device; {rehearsal} rehearses it on a CPU.")
    return suite


def check_stages(asked: Sequence[str] | None, stages: Collection[str], suite: str) -> None:
    """Raise `UsageError` if a stage was asked for that the suite does not have."""
    if unknown := set(asked or ()) - set(stages):
        raise UsageError(f"--stages {', '.join(sorted(unknown))}: the {suite} suite has {', '.join(stages)}.")
