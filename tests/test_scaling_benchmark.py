"""What the scaling benchmark says, at a small size."""

from benchmarks import scaling


def test_reading_takes_no_memory_that_grows_and_records_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "REAL_FILES", 2)
    monkeypatch.setattr(scaling, "BATCHES", 20)
    scaling.write_files(tmp_path)
    row = scaling.measure_tracks(3000, tmp_path)
    assert row["growth_over_batches_mb"] < 4 * 4 * 0.77, "less than four updates' latents, of twenty that were read"
    assert row["records_mb"] + row["plan_mb"] < 3000 * 0.005


def test_operations_grow_with_length_and_rank():
    short, long = (scaling.account(seconds=seconds, rank=8) for seconds in (10, 20))
    wide = scaling.account(seconds=10, rank=64)
    assert short["tflop"] * 1.8 < long["tflop"] and short["gb"] < long["gb"]
    assert wide["adapter_parameters"] == 8 * short["adapter_parameters"] and wide["tflop"] > short["tflop"]
