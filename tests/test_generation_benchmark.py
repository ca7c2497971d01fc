"""The generation benchmark: its ways make the same sound, its rows are complete, and README says what it measured."""

import json

import pytest

from acestep_pipeline.errors import UsageError
from benchmarks import generate, generation_table
from benchmarks.generation_ways import Case

TINY = Case("small", "base", 1, 1, 7.0, rank=8)


def assert_complete(rows: list[dict], ways: tuple[str, ...]) -> None:
    assert [row["way"] for row in rows] == list(ways)
    for row in rows:
        ms, phases = row["ms"], row["phases_ms"]
        assert 0 < ms["q1"] <= ms["median"] <= ms["q3"]
        assert all(phases[name] > 0 for name in ("text", "steps", "decoding"))
        assert row["difference"] is None or row["difference"] < 1e-4
        assert (row["vs_first"] is None) == (row["way"] == ways[0])


@pytest.mark.slow
def test_all_ways_without_compilation_sound_alike():
    ways = ("diffusers", "diffusers_adapter", "adapter", "fused")
    rows = generate.measure(TINY, ways, generations=2)
    assert_complete(rows, ways)
    assert sum(row["difference"] is not None for row in rows) == 2
    assert all(row["graphs_compiled"] == 0 and row["graphs_compiled_by_swaps"] is None for row in rows)


@pytest.mark.slow
def test_compiled_ways_sound_alike_and_swaps_compile_nothing(tmp_path):
    """The GPU suite's own stage, at a small size, with the compiler that it uses."""
    output = tmp_path / "results.json"
    flags = ["--suite", "gpu", "--size", "small", "--max_seconds", "1", "--max_steps", "2", "--generations", "2"]
    generate.main([*flags, "--stages", "turbo", "adapters", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert_complete(rows[: len(generate.ALL)], generate.ALL)
    assert_complete(rows[len(generate.ALL) :], generate.EIGHT)
    by_way = {row["way"]: row for row in rows if row["stage"] == "turbo"}
    assert by_way["diffusers_compiled"]["graphs_compiled"] >= 1
    assert by_way["adapter_compiled"]["graphs_compiled_by_swaps"] == 0
    assert rows[0]["hardware"] and rows[0]["git_commit"] and rows[0]["versions"]["torch"]


def test_the_tables_say_what_was_run_and_leave_the_rest_blank(tmp_path):
    case = generate.CPU_STAGES["turbo"][0][0]
    row = {"stage": "turbo", "case": case.__dict__, "hardware": "a CPU", "precision": "float32",
           "ms": {"median": 1234.4, "q1": 1200.0, "q3": 1300.0}, "vs_first": None, "difference": None,
           "graphs_compiled_by_swaps": None}  # fmt: skip
    other = row | {
        "vs_first": {"median": 1.04, "q1": 1.0, "q3": 1.1},
        "difference": 2e-7,
        "graphs_compiled_by_swaps": 0,
    }
    rows = [row | {"way": "diffusers"}, other | {"way": "adapter_compiled"}]
    (tmp_path / "generate_cpu.json").write_text(json.dumps({"rows": rows}))
    text = generation_table.tables(tmp_path)
    first = "| small turbo, 60 s, 8 steps, no guidance, to latents | a CPU, float32 | 1,234 ms (1,200–1,300) "
    assert f"{first}|  |  |  |  |  | 1.04 × (1.00–1.10) |  |  |\n" in text
    assert "| 2b turbo, 60 s, 8 steps, no guidance |  |  |  |  |  |  |  |  |  |  |\n" in text
    assert (
        "CPU, how far latents are from plain diffusers' with the same adapter: 2e-07 of them at most, float32" in text
    )
    assert "GPU, graphs compiled anew when another adapter and another weight came: not run" in text


def test_readme_says_what_the_results_say():
    generation_table.main(["--check"])


def test_wrong_flags_are_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="--stages warp: the cpu suite has turbo"):
        generate.main(["--suite", "cpu", "--stages", "warp"])
    with pytest.raises(UsageError, match="--generations must be at least 2"):
        generate.main(["--suite", "cpu", "--generations", "1", "--output", str(tmp_path / "x.json")])
