"""Results files: what each row was measured on, and runs that go on where they were cut."""

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch

from acestep_pipeline.files import write_text
from acestep_pipeline.hardware import default_device, describe_device
from acestep_pipeline.training.tracking import environment_facts

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def origin() -> dict:
    """What figures of this process are measured on: hardware, threads, git commit, versions."""
    facts = environment_facts()
    found = {"hardware": describe_device(default_device()), "threads": torch.get_num_threads()}
    return found | {name: facts[name] for name in ("git_commit", "versions")}


def same_origin(facts: dict, others: dict) -> bool:
    """Whether both are of one commit and hardware."""

    def of(facts: dict) -> tuple:  # writing the file makes a clean checkout dirty
        return facts.get("hardware"), (facts.get("git_commit") or "").removesuffix("-dirty")

    return of(facts) == of(others)


class Results:
    """The rows of a results file, one for each way of each configuration (a dataclass), written as they come."""

    def __init__(self, path: Path, *, overwrite: bool, describe: Callable[[dict], str]) -> None:
        """Read what is there. `describe` makes a line for a person of a row."""
        self.path, self.overwrite, self.describe = path, overwrite, describe
        self.rows, self.facts = read_rows(path), origin()

    def has(self, stage: str, case) -> bool:
        """Whether the file has this configuration, of this commit and hardware."""
        found = [row for row in self.rows if (row["stage"], row["case"]) == (stage, dataclasses.asdict(case))]
        return not self.overwrite and bool(found) and all(same_origin(row, self.facts) for row in found)

    def add(self, stage: str, case, rows: list[dict]) -> None:
        """Put rows in the place of those of the same configuration, and write the file."""
        key = {"stage": stage, "case": dataclasses.asdict(case)}
        self.rows = [row for row in self.rows if {name: row[name] for name in key} != key]
        self.rows += [key | row | self.facts for row in rows]
        for row in rows:
            print(f"  {self.describe(row)}", flush=True)
        write_text(self.path, json.dumps({"rows": self.rows}, indent=1) + "\n")


def read_rows(path: Path) -> list[dict]:
    """The rows of a results file; none if it is not there."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def find(rows: list[dict], stage: str, case) -> dict | None:
    """The row of a configuration that is measured in one way, if it was run."""
    key = (stage, dataclasses.asdict(case))
    return next((row for row in rows if (row["stage"], row["case"]) == key), None)


def measure_or_not(measure: Callable[[], list[dict]], ways: tuple[str, ...]) -> list[dict]:
    """What `measure` returns, or rows that say that memory ran out."""
    try:
        rows = measure()
    except torch.OutOfMemoryError:
        rows = [{"way": way, "out_of_memory": True} for way in ways]
    gc.collect()
    if default_device().type == "cuda":
        torch.cuda.empty_cache()
    return rows
