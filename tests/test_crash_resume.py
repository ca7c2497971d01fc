"""`benchmarks/crash_resume.py` kills real runs, and sees what they lose."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.crash_resume import result

ROOT = Path(__file__).resolve().parents[1]


def test_killed_runs_end_like_one_left_alone(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "benchmarks/crash_resume.py", "--kills", "2", "--output", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert (found["kills"], found["losses"]) == (2, [])
    assert found["files_compared"] > 15


def test_what_differs_from_the_reference_is_seen(tmp_path):
    samples = ("samples/a.wav", "checkpoint-2/adapter.safetensors", "best/x.safetensors")
    for name in (*samples, "validation.jsonl", "effect.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"same")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"same")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"update": 1, "loss": 0.5, "seconds": 1}\n')
    expected = result(tmp_path)
    metrics.write_text('{"update": 1, "loss": 0.5, "seconds": 2}\n')
    assert result(tmp_path) == expected  # times may differ

    def lost(change) -> set[str]:
        change()
        found = result(tmp_path)
        return {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}

    assert lost(lambda: metrics.write_text('{"update": 1, "loss": 0.25, "seconds": 1}\n')) == {"metrics.jsonl"}
    metrics.write_text('{"update": 1, "loss": 0.5, "seconds": 1}\n')
    for name in expected.keys() - {"metrics.jsonl"}:
        assert lost(lambda name=name: (tmp_path / name).write_bytes(b"other")) == {name}
        (tmp_path / name).write_bytes(b"same")
    assert lost((tmp_path / "samples/a.wav").unlink) == {"samples/a.wav"}
    (tmp_path / "samples/a.wav").write_bytes(b"same")
    (tmp_path / ".partial-checkpoint-4").mkdir()
    assert lost(lambda: None) == {".partial-checkpoint-4"}
