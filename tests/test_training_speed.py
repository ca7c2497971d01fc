"""The training benchmark: its ways do the same work, its rows are complete, and README says what it measured."""

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
import torch

from acestep_pipeline.errors import UsageError
from acestep_pipeline.training.compilation import relative_difference
from benchmarks import training_bench, training_measure, training_speed, training_table
from benchmarks.training_bench import Bench
from benchmarks.training_cases import PADDED_TOKENS, RATIOS, TRICKS, Case, Tricks
from benchmarks.training_difference import difference, first_step
from benchmarks.training_ways import attention, ours, peers

CASE = Case("small", 2)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Two stages of the GPU suite at a small size, and the rows they left."""
    output = tmp_path_factory.mktemp("bench") / "results.json"
    rehearse(output)
    return output, json.loads(output.read_text())["rows"]


def rehearse(output: Path) -> None:
    flags = ["--suite", "gpu", "--size", "small", "--max_seconds", "2", "--updates", "4", "--output", str(output)]
    training_speed.main([*flags, "--stages", "side_by_side", "checkpointing"])


def test_a_rehearsal_measures_every_way(rehearsed):
    _, rows = rehearsed
    assert [(row["stage"], row["way"]) for row in rows] == [
        ("side_by_side", "bare"), ("side_by_side", "peers"), ("side_by_side", "ours"), ("checkpointing", "ours"),
    ]  # fmt: skip
    for row in rows:
        ms, phases = row["ms_per_update"], row["phases_ms"]
        assert row["updates"] >= 4 and 0 < ms["q1"] <= ms["median"] <= ms["q3"]
        assert row["tracks_per_s"] == pytest.approx(4000 / ms["median"], rel=1e-2)
        assert row["tokens_per_s"] == pytest.approx(25 * row["tracks_per_s"], rel=1e-2)  # 2 s at 12.5 tokens
        assert row["formula_over_counted_flops"] == pytest.approx(1, abs=0.02)
        assert row["mfu"] is None and row["peak_tflop_per_s"] is None, "nobody says what this CPU can do"
        assert row["peak_memory_bytes"] > 100e6
        assert phases["forward"] > 0 and phases["backward"] > 0 and phases["optimizer"] > 0
        assert row["preset_c_s"]["100"] == pytest.approx(2.5 * ms["median"], rel=1e-2)  # 2,500 updates
        assert row["hardware"] and row["git_commit"] and row["versions"]["torch"]
    assert rows[2]["phases_ms"]["data"] > 0, "ours reads a cache"
    assert rows[3]["case"]["checkpointing"] == 1.0
    assert all(row["vs_ours"]["median"] > 0 for row in rows[:2])


def test_what_the_file_has_is_not_measured_again(rehearsed, monkeypatch):
    output, rows = rehearsed

    def measure(case, ways, *, updates):
        measured.append(case)
        found = [row for row in rows if row["way"] in ways][: len(ways)]
        return [{name: row[name] for name in row.keys() - {"stage", "case"}} for row in found]

    measured = []
    monkeypatch.setattr(training_speed, "measure", measure)
    rehearse(output)
    assert measured == [] and json.loads(output.read_text())["rows"] == rows
    # Cut off after the first stage, a run goes on with the second; what another commit measured is measured again.
    old = [row | {"git_commit": "0" * 40} for row in rows if row["stage"] == "side_by_side"]
    output.write_text(json.dumps({"rows": old}))
    rehearse(output)
    assert [case.checkpointing for case in measured] == [0.0, 1.0]
    assert all(row["git_commit"] != "0" * 40 for row in json.loads(output.read_text())["rows"])


def test_all_ways_train_on_the_same(monkeypatch):
    """Without dropout: the loss of the first update is one, however it is computed, but for padding that is seen."""
    monkeypatch.setattr(training_bench, "PRESET", training_bench.PRESET | {"lora_dropout": 0.0})
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(CASE, Path(folder))
        elements = bench.elements(4)

        def loss(micro_batch_size: int) -> float:
            update = bench.in_memory(micro_batch_size)[0]
            assert len(update) == 4 // micro_batch_size
            return sum(bench.loss(bench.bare_forward, batch).item() for batch in update) / elements

        with contextlib.closing(ours(bench, Tricks())) as steps:
            next(steps)
            (metrics,) = Path(folder).glob("*/metrics.jsonl")
            of_ours = json.loads(metrics.read_text())["loss"]
        assert loss(4) == pytest.approx(of_ours, rel=1e-5)
        assert loss(1) == pytest.approx(of_ours, rel=1e-5)
        with attention(bench, "peers"):
            assert loss(1) == pytest.approx(of_ours, rel=1e-5), "zeros as a mask hide nothing"
        seen = []
        forward = bench.bare_forward

        def watch(**inputs):
            seen.append(inputs["encoder_hidden_states"].shape[:2])
            return forward(**inputs)

        bench.bare_forward = watch
        before = bench.parameters[0].clone()
        next(peers(bench))
        assert seen == [(1, PADDED_TOKENS)] * 4
        assert not before.equal(bench.parameters[0])


def test_every_trick_trains_on_the_same():
    """Beside the tests of each part: the gradients of a whole update, or its step, without each trick."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(CASE, Path(folder))
        before = [parameter.clone() for parameter in bench.parameters]
        for way in (*TRICKS.keys() - {"compiled"}, *RATIOS, "ours_dense"):
            assert difference(bench, way) <= 1e-5, way
        assert all(map(torch.equal, before, bench.parameters))
        assert bench.transformer.layers[0].self_attn.to_q.lora_dropout["default"].p == 0.05
        gradients, _ = first_step(bench, "ours")
        bench.parameters[0].data.mul_(1.1)
        changed, _ = first_step(bench, "ours")
        assert relative_difference(changed, gradients) > 1e-3, "or it could not tell"


@pytest.mark.slow
def test_compiled_blocks_are_timed_apart_and_compiled_once(tmp_path):
    flags = ["--suite", "cpu", "--max_seconds", "2", "--updates", "4", "--output", str(tmp_path / "results.json")]
    training_speed.main([*flags, "--stages", "compiled"])
    ours, compiled = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (ours["way"], compiled["way"]) == ("ours", "compiled") and "compile_s" not in ours
    assert compiled["recompilations"] == 0 and compiled["shapes"] >= 1 and compiled["compile_s"] > 1
    assert compiled["difference"] <= 1e-5
    assert compiled["ms_per_update"]["q3"] < 1000 * compiled["compile_s"] / 2


def test_targets_are_met_missed_or_not_run(rehearsed):
    _, rows = rehearsed
    assert all(line.endswith("not run") for line in training_table.targets(rows, "gpu"))
    minute = {**Case("2b", 60).__dict__}
    ours = rows[2] | {"stage": "lengths", "case": minute, "hardware": "NVIDIA H100 80GB HBM3, 79.1 GiB"}
    lines = training_table.targets([ours | {"mfu": 0.5, "preset_c_s": {"100": 1200.0}}], "gpu")
    assert lines[1].endswith("50%, met") and lines[3].endswith("20.0 min, missed")
    assert lines[0].endswith("not run")
    other = ours | {"mfu": 0.5, "hardware": "NVIDIA GeForce RTX 3090, 23.7 GiB"}
    assert training_table.targets([other], "gpu")[1].endswith("not run"), "the targets are an H100's"


def test_readme_says_what_the_results_say():
    training_table.main(["--check"])


@pytest.mark.parametrize(
    ("driver", "known"),
    (
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("NVIDIA H200", "H200 141GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090 24GB"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 3080 Ti", None),
    ),
)
def test_gpus_are_known_by_their_drivers_names(driver, known):
    gpu = training_measure.known_gpu(driver)
    assert (gpu and gpu.name) == known


def test_wrong_flags_are_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="--stages warp: the cpu suite has side_by_side"):
        training_speed.main(["--suite", "cpu", "--stages", "warp"])
    with pytest.raises(UsageError, match="--updates must be at least 2"):
        training_speed.main(["--suite", "cpu", "--updates", "1", "--output", str(tmp_path / "x.json")])
