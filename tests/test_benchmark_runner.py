"""What `make bench` and `make bench-gpu` run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from acestep_pipeline.errors import UsageError
from benchmarks import run

ROOT = Path(__file__).resolve().parents[1]


def make(*words: str) -> list[str]:
    """The last command that make would run."""
    command = ["make", "--dry-run", "--no-print-directory", *words]
    # Within `make test`, make would tell this one its own options.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


def test_make_hands_over_what_it_is_given():
    assert make("bench") == ["benchmarks/run.py", "--suite", "cpu"]
    assert make("bench-gpu", "BENCH=caching generation") == [
        "benchmarks/run.py", "--suite", "gpu", "--parts", "caching", "generation",
    ]  # fmt: skip
    assert make("bench-gpu", "STAGES=side_by_side xl")[-3:] == ["--stages", "side_by_side", "xl"]


@pytest.mark.parametrize("suite", ("cpu", "gpu"))
def test_every_part_has_its_scripts_and_writes_its_tables_after_measuring(suite):
    for name, ((script, *options), (table,)) in run.commands(suite, None, None).items():
        assert (ROOT / "benchmarks" / script).is_file() and (ROOT / "benchmarks" / table).is_file(), name
        assert options == ([] if name == "scaling" else ["--suite", suite])


def test_all_parts_but_scaling_are_for_gpus_too():
    parts = {suite: set(run.commands(suite, None, None)) for suite in ("cpu", "gpu")}
    assert parts["gpu"] == {"training", "generation", "caching", "memory", "estimate"}
    assert parts["cpu"] - parts["gpu"] == {"scaling"}


def test_stages_are_the_trainings_unless_another_part_is_named():
    assert run.commands("gpu", None, ["xl"]) == {
        "training": [["training_speed.py", "--suite", "gpu", "--stages", "xl"], ["training_table.py"]]
    }
    assert list(run.commands("gpu", ["generation"], ["turbo"])) == ["generation"]
    with pytest.raises(UsageError, match="STAGES are those of one part"):
        run.commands("gpu", ["generation", "training"], ["turbo"])


def test_a_part_that_is_not_known_is_one_sentence():
    with pytest.raises(UsageError, match="BENCH is any of training, .* on a CPU, not dancing"):
        run.commands("cpu", ["dancing"], None)


@pytest.mark.parametrize("script", ("storage.py", "uploading.py"))
def test_the_page_says_what_was_measured(script):
    subprocess.run([sys.executable, ROOT / "benchmarks" / script, "--check"], check=True)
