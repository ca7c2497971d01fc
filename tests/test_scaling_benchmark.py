"""What the scaling benchmark says, at a small size."""

import json

import pytest

from acestep_pipeline.errors import RunError
from benchmarks import scaling, scaling_page


def test_reading_takes_no_memory_that_grows_and_records_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "REAL_FILES", 2)
    for name, value in {"BATCHES": 10, "ROUNDS": 3, "EPOCHS": 3}.items():
        monkeypatch.setattr(scaling, name, value)
    scaling.write_files(tmp_path)
    few, many = (scaling.measure_tracks(number, tmp_path) for number in (20, 3000))
    for row in (few, many):  # an epoch of the first is 5 updates, and 10 are read in each round
        assert abs(row["growth_over_100_batches_mb"]["median"]) < 0.77, "less than one track of the 40 that were read"
        assert row["batch_ms"]["median"] > 0 and row["plan_of_next_epochs_s"]["median"] > 0
    assert many["records_mb"] + many["plan_mb"] < 3000 * 0.005


def test_operations_grow_with_length_and_rank():
    short, long = (scaling.account(seconds=seconds, rank=8) for seconds in (10, 20))
    wide = scaling.account(seconds=10, rank=64)
    assert short["tflop"] * 1.8 < long["tflop"] and short["gb"] < long["gb"]
    assert wide["adapter_parameters"] == 8 * short["adapter_parameters"] and wide["tflop"] > short["tflop"]


def test_the_page_says_what_the_results_say(tmp_path, monkeypatch):
    scaling_page.main(["--check"])
    changed = json.loads(scaling.FILE.read_text()) | {"checking_a_cached_track_ms": 77.0}
    (tmp_path / "scaling.json").write_text(json.dumps(changed))
    monkeypatch.setattr(scaling_page, "FILE", tmp_path / "scaling.json")
    with pytest.raises(RunError, match="scaling.md is not what benchmarks/results says"):
        scaling_page.main(["--check"])
    assert "compared: 77.0 ms a track" in scaling_page.text(changed)
    assert "| check of every file at the start | 21.4 h in one process |" in scaling_page.text(changed)


def test_the_picture_is_drawn_from_these_results(tmp_path, monkeypatch):
    picture = tmp_path / "scaling.png"
    scaling_page.draw(json.loads(scaling.FILE.read_text()), picture, drawn_from="others")
    monkeypatch.setattr(scaling_page, "PICTURE", picture)
    with pytest.raises(RunError, match="scaling.png is not drawn from benchmarks/results"):
        scaling_page.main(["--check"])
