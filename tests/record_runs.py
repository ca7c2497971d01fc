"""Record `recorded_runs.json`, what the verdicts of `test_effect.py` are tested on: `python -m tests.record_runs`."""

import json
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

from acestep_pipeline.data.demo_music import render_demo_dataset
from acestep_pipeline.training import final_report
from tests.test_effect import REAL_RUNS, RECORDED, one_track
from tests.training_runs import train_here

DIGITS = 5


def rounded(value):
    """Floats to so many digits, wherever they are."""
    if isinstance(value, np.ndarray | list | tuple):
        return [rounded(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def record(data: Path, output: Path, flags: dict) -> dict:
    """What the verdict at the end of a run is judged by."""
    with mock.patch.object(final_report, "judge", wraps=final_report.judge) as judge:
        train_here(data, output, **flags)
    held_out, trained_on, validations = judge.call_args.args
    names = ("update", "loss", "tracks")
    return rounded(
        {
            "validations": [{name: line[name] for name in names} for line in validations],
            "held_out": vars(held_out),
            "trained_on": vars(trained_on),
        }
    )


def main() -> None:
    recorded = {}
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        render_demo_dataset(demo, duration_s=4.0)
        single = one_track(demo, Path(folder) / "one")
        for name, flags in REAL_RUNS.items():
            data, others = (demo, {}) if "validation_fraction" in flags else (single, {"validation_data_dir": demo})
            recorded[name] = record(data, Path(folder) / name, flags | others)
    runs = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in recorded.items())
    RECORDED.write_text(f"{{\n{runs}\n}}\n")


if __name__ == "__main__":
    main()
