#!/usr/bin/env python
"""Runs parts of the benchmark suite, one after another, and writes what they measured into README.md and docs/.

    make bench                         all of them on a CPU
    make bench-gpu BENCH=caching       one of them on a GPU

A part goes on where it was cut: what results say of this commit and hardware is not measured again.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.errors import RunError, UsageError, one_sentence_errors

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """The script that measures, the one that writes its tables, and where both make sense."""

    script: str
    table: str
    suites: tuple[str, ...] = ("cpu", "gpu")


PARTS = {
    "training": Part("training_speed.py", "training_table.py"),
    "generation": Part("generate.py", "generation_table.py"),
    "caching": Part("latent_cache.py", "latent_cache_table.py"),
    "memory": Part("memory.py", "memory_table.py"),
    "estimate": Part("estimate.py", "estimate_table.py"),
    "scaling": Part("scaling.py", "scaling_page.py", suites=("cpu",)),
}


def commands(suite: str, names: list[str] | None, stages: list[str] | None) -> dict[str, list[list[str]]]:
    """For each part, what is run. Without names: all of the suite, or the training, if stages are given.

    Raises:
        UsageError: there is no such part, or stages are given for several.
    """
    known = [name for name, part in PARTS.items() if suite in part.suites]
    names = names or (["training"] if stages else known)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"BENCH is any of {', '.join(known)} on a {suite.upper()}, not {', '.join(unknown)}.")
    if stages and len(names) > 1:
        raise UsageError("STAGES are those of one part; name it with BENCH.")
    found = {}
    for name in names:
        part = PARTS[name]
        options = ["--suite", suite] if len(part.suites) > 1 else []
        found[name] = [[part.script, *options, *(["--stages", *stages] if stages else [])], [part.table]]
    return found


def main(argv: list[str] | None = None) -> None:
    """Run them."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suite", choices=("cpu", "gpu"), required=True)
    p.add_argument("--parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (unset: all)")
    p.add_argument("--stages", nargs="*", metavar="STAGE", help="of one part, some of its stages (unset: all)")
    args = p.parse_args(argv)
    for name, scripts in commands(args.suite, args.parts, args.stages).items():
        started = time.monotonic()
        for script, *options in scripts:
            if status := subprocess.run([sys.executable, FOLDER / script, *options]).returncode:
                raise RunError(f"{name}: {script} ended with status {status}.")
        print(f"{name}: {(time.monotonic() - started) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    with one_sentence_errors():
        main()
