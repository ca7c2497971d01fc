"""The benchmark of `acestep-lora estimate`: real updates beside predictions; the page says what they came to."""

import dataclasses
import json

import pytest
import torch

from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.estimation.gpus import find_gpu
from benchmarks import estimate, estimate_table, pages
from benchmarks.estimate import Case


def test_a_real_update_takes_the_bytes_that_are_predicted():
    rates = {"published": find_gpu("h100")}
    case = Case("small", seconds=4, checkpointing=0.5)
    row = estimate.run_case(case, torch.device("cpu"), rates, updates=2)
    assert 0.95 < row["bytes_ratio"] < 1.1
    assert row["time_ratio"]["published"] == pytest.approx(
        row["predicted_s"]["published"] / row["measured_s"], rel=0.1
    )
    assert f"= {row['bytes_ratio']:.3f}, " in estimate.describe_row(row)


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_where_it_was(tmp_path, capsys):
    """The GPU suite's small cases, rehearsed; what it is predicted from is this machine."""
    output = tmp_path / "results.json"
    flags = ["--suite", "gpu", "--stages", "small", "--model", "small", "--max_seconds", "1", "--updates", "1"]
    flags += ["--output", str(output)]
    estimate.main(flags)
    whole = json.loads(output.read_text())["rows"]
    cases = {json.dumps(row["case"]) for row in whole}
    assert len(whole) == len(cases) == 9, "those of mid-xl are then two of mid"
    for row in whole:
        assert row["measured_bytes"] > 0 and row["time_ratio"].keys() == row["rates"].keys() == {"this"}
        assert row["hardware"] and row["git_commit"] and row["updates_timed"] == 1
    output.write_text(json.dumps({"rows": whole[:-1]}))
    capsys.readouterr()
    estimate.main(flags)
    assert json.loads(output.read_text())["rows"][:-1] == whole[:-1]
    assert capsys.readouterr().out.count(" MB = ") == 1, "of the last case alone"


def test_the_table_says_what_was_run_and_leaves_the_rest_blank(tmp_path):
    minute, checkpointed = estimate.GPU_CASES[:2]
    row = {"stage": "full_size", "case": dataclasses.asdict(minute), "hardware": "an H100", "measured_s": 0.7,
           "predicted_bytes": {"base weights": 3e9, "activations": 1e9}, "measured_bytes": 3.9e9,
           "predicted_s": {"this": 0.61, "published": 0.4}}  # fmt: skip
    small = [
        {"stage": "small", "case": dataclasses.asdict(case), "measured_bytes": 1, "bytes_ratio": ratio,
         "time_ratio": {"this": ratio / 2, "published": 9.0}}
        for case, ratio in zip(estimate.SMALL_CASES[:2], (0.98, 1.04), strict=True)
    ]  # fmt: skip
    failed = {"stage": "full_size", "case": dataclasses.asdict(checkpointed), "hardware": "an H100",
              "out_of_memory": True}  # fmt: skip
    (tmp_path / "estimate_gpu.json").write_text(json.dumps({"rows": [row, failed, *small]}))
    text = estimate_table.tables(tmp_path)
    name = "2 B, bf16, rank 64, 60 s, 2 passes"
    assert f"| {name} | an H100 | 4,000 MB | 3,900 MB | 0.61 s | 0.4 s | 0.7 s |\n" in text
    assert f"| {name}, checkpointing |  |  |  |  |  |  |\n" in text
    assert "- CPU, smaller models, predicted over measured: not run\n" in text
    assert text.endswith(
        "GPU, smaller models, predicted over measured: memory 0.98 to 1.04, time 0.49 to 0.52 (2 cases)"
    )


def test_the_page_says_what_the_results_say(tmp_path, monkeypatch):
    estimate_table.main(["--check"])
    changed = tmp_path / "training.md"
    changed.write_text(pages.TRAINING_PAGE.read_text().replace("7,222 MB", "7,111 MB"))
    monkeypatch.setattr(estimate_table, "TRAINING_PAGE", changed)
    with pytest.raises(RunError, match="training.md is not what .* run python benchmarks/estimate_table.py"):
        estimate_table.main(["--check"])
    estimate_table.main([])
    assert changed.read_text() == pages.TRAINING_PAGE.read_text()


def test_wrong_flags_are_one_sentence():
    with pytest.raises(UsageError, match="--stages warp: the cpu suite has small, full_size"):
        estimate.main(["--suite", "cpu", "--stages", "warp"])
    with pytest.raises(UsageError, match="needs a CUDA device; --model small rehearses it"):
        estimate.main(["--suite", "gpu"])
