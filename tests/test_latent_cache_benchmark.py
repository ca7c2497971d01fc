"""The caching benchmark: both ways make the same latents, rows are complete, and README says what was measured."""

import json

import pytest

from acestep_pipeline.errors import UsageError
from benchmarks import latent_cache, latent_cache_table


def test_a_rehearsal_measures_both_ways(tmp_path):
    output = tmp_path / "results.json"
    flags = ["--suite", "gpu", "--model", "tiny", "--tracks", "2", "--seconds", "4", "--rounds", "1"]
    latent_cache.main([*flags, "--output", str(output)])
    naive, ours = json.loads(output.read_text())["rows"]
    for row in (naive, ours):
        factor, taken = row["times_real_time"], row["s_per_track"]
        assert row["tracks_timed"] == 2 and 0 < factor["q1"] <= factor["median"] <= factor["q3"]
        assert 4 / taken["q3"] <= row["times_real_time_in_all"] <= 4 / taken["q1"]
        assert row["hardware"] and row["git_commit"] and row["versions"]["torch"]
    assert (naive["way"], ours["way"]) == ("naive", "ours")
    assert ours["largest_difference_of_latents"] < 1e-4
    assert 0 < ours["text_share"] < 1 and ours["parts_s_per_track"].keys() == {"decode", "vae", "text"}
    assert ours["times_as_fast"]["median"] > 0 and ours["hashing_models_s"] > 0


def test_music_is_longer_than_one_call_of_the_encoder_can_be(tmp_path):
    (track,) = latent_cache.write_music(tmp_path / "music", tracks=1, seconds=60)
    assert track.duration_s == pytest.approx(60)


def test_the_table_says_what_was_run_and_leaves_the_rest_blank(tmp_path):
    case = latent_cache.SUITES["cpu"]
    row = {"stage": "caching", "case": case.__dict__, "hardware": "a CPU", "vae_precision": "float32",
           "text_precision": "float32", "times_real_time": {"median": 4.51, "q1": 4.0, "q3": 5.0}}  # fmt: skip
    ours = row | {
        "way": "ours",
        "times_as_fast": {"median": 1.96, "q1": 1.8, "q3": 2.29},
        "parts_s_per_track": {"decode": 0.096, "vae": 6.286, "text": 0.058},
    }
    (tmp_path / "latent_cache_cpu.json").write_text(json.dumps({"rows": [row | {"way": "naive"}, ours]}))
    text = latent_cache_table.tables(tmp_path)
    cells = "a CPU, float32 | 4.5 (4.0–5.0) | 4.5 (4.0–5.0) | 1.96 (1.80–2.29) | 96, 6,286, 58 ms |"
    assert f"| tiny, 24 tracks of 20 s | {cells}\n" in text
    assert "| 2b, 100 tracks of 60 s |  |  |  |  |  |\n" in text
    assert "CPU, at least 1.5 times as fast as a naive loop: 1.96, met" in text
    assert "GPU, at least 200 times real time: not run" in text


@pytest.mark.parametrize(
    ("hardware", "factor", "verdict"),
    (
        ("NVIDIA H100 80GB HBM3, 79.1 GiB", 250.0, "250.00, met"),
        ("NVIDIA H100 80GB HBM3, 79.1 GiB", 150.0, "150.00, missed"),
        ("NVIDIA GeForce RTX 3090, 23.7 GiB", 250.0, "not run"),
    ),
)
def test_the_target_of_the_gpu_is_an_h100s(hardware, factor, verdict):
    case = latent_cache.SUITES["gpu"].__dict__
    row = {"way": "ours", "case": case, "hardware": hardware, "times_real_time": {"median": factor}}
    assert latent_cache_table.target([row], "gpu").endswith(f": {verdict}")


def test_readme_says_what_the_results_say():
    latent_cache_table.main(["--check"])


def test_wrong_flags_are_one_sentence():
    with pytest.raises(UsageError, match="--seconds an even number"):
        latent_cache.main(["--suite", "cpu", "--seconds", "5"])
    with pytest.raises(UsageError, match="needs a CUDA device"):
        latent_cache.main(["--suite", "gpu"])
