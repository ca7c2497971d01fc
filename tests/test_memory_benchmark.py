"""The memory benchmark: the estimate's bytes against real code on fake tensors (full width, every allocation counted,
nothing computed), whole trainings at a small size, and the table in docs/training.md."""

import dataclasses
import json

import pytest
import torch

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.estimation.memory_use import Batch
from acestep_pipeline.estimation.model_shapes import SHAPES
from acestep_pipeline.estimation.other_phases import decoding_tile_bytes, encoding_tile_bytes
from acestep_pipeline.pipeline import ACEStepPipeline
from benchmarks import memory, memory_peaks, memory_table
from benchmarks.memory_accounting import LiveBytes, account_tiles, account_update, predict_on_cpu

LORA = LoraSettings(r=64, lora_alpha=192, lora_dropout=0.05)


def test_bytes_are_counted_while_their_tensors_live():
    live = LiveBytes()
    with live:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(500).view(10, 50).add_(1)
    assert (live.live, live.peak) == (4000, 6000)
    del kept
    assert live.live == 0


@pytest.mark.parametrize(("model", "blocks", "checkpointing"), (("2b", 3, 0.0), ("xl", 3, 1.0)))
def test_an_update_at_full_width_takes_what_is_predicted(model, blocks, checkpointing):
    config = SHAPES[model].transformer | {"num_hidden_layers": blocks}
    batch = Batch(items=1, frames=1500, condition_tokens=400)
    predicted, _ = predict_on_cpu(config, LORA, batch, checkpointing=checkpointing)
    assert predicted == pytest.approx(account_update(config, LORA, batch, checkpointing=checkpointing), rel=0.05)


@pytest.mark.parametrize(("encode", "dtype"), ((True, torch.float32), (False, torch.bfloat16)))
def test_a_song_of_any_length_is_coded_in_the_memory_of_one_tile(encode, dtype):
    short, long = (
        account_tiles(seconds, encode=encode, dtype=dtype) for seconds in ((15, 35) if encode else (30, 50))
    )
    result = 20 * (2 * 64 * 25 if encode else 2 * 2 * 48_000) * dtype.itemsize  # tiles, then one tensor of them
    assert short <= long <= short + 2 * result
    predict = encoding_tile_bytes if encode else decoding_tile_bytes
    assert predict(SHAPES["2b"], dtype.itemsize) == pytest.approx(short, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", memory.TARGETS)
def test_every_target_is_met_at_full_size(name):
    row = memory.measure_target(memory.TARGETS[name])
    assert 0.98 < row["unquantised_adamw"]["ratio"] < 1.08
    assert all(song["fits"] for song in row["predicted_for"].values()), row


def test_a_random_checkpoint_is_one_that_training_loads(tmp_path):
    width = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
             "head_dim": 16}  # fmt: skip
    text = width | {"vocab_size": 300, "num_hidden_layers": 1}
    layers = {"num_lyric_encoder_hidden_layers": 1, "num_timbre_encoder_hidden_layers": 1}
    shape = dataclasses.replace(
        SHAPES["2b"],
        transformer=width | {"num_hidden_layers": 2},
        condition_encoder=width | layers | {"text_hidden_dim": 32},
        text_encoder=SHAPES["2b"].text_encoder | text,
        vae=SHAPES["2b"].vae | {"encoder_hidden_size": 16, "decoder_channels": 4},
    )
    folder = memory_peaks.write_checkpoint(shape, tmp_path / "model")
    pipeline = ACEStepPipeline.from_pretrained(folder)
    for name in memory_peaks.COMPONENTS:
        weights = getattr(pipeline, name).state_dict().values()
        assert all(weight.isfinite().all() and weight.any() for weight in weights if weight.is_floating_point()), name


@pytest.mark.slow
def test_a_rehearsal_trains_within_a_process_of_its_own(tmp_path):
    output = tmp_path / "results.json"
    flags = ["--suite", "gpu", "--model", "tiny", "--max_seconds", "12", "--stages", "vram_8gb"]
    memory.main([*flags, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [(row["stage"], row["case"]["songs"]) for row in rows] == [("vram_8gb", 8), ("vram_8gb", 1)]
    for row in rows:
        assert 300e6 < row["resident_bytes"] < 8e9
        assert row["hardware"] and row["git_commit"] and row["versions"]["torch"]
    with pytest.raises(RunError, match="--rank"):
        memory_peaks.measure_training(memory_peaks.Training("tiny", 1, 4, "--preset c --rank 0"), "tiny")


def test_the_table_says_what_was_run_and_leaves_the_rest_blank(tmp_path):
    target, gib = memory.TARGETS["vram_8gb"], 1e9
    song = {
        "windows_in_a_pass": 1,
        "update_bytes": 2.41 * gib,
        "encoding_bytes": 4.7 * gib,
        "samples_bytes": 4.5 * gib,
    }
    predicted = {
        "stage": "targets", "case": dataclasses.asdict(target), "predicted_for": {"60 s": song, "600 s": song},
        "unquantised_adamw": {"ratio": 1.02},
    }  # fmt: skip
    (tmp_path / "memory_cpu.json").write_text(json.dumps({"rows": [predicted]}))
    short, long = memory.GPU_STAGES["vram_8gb"]
    facts = {"stage": "vram_8gb", "hardware": "an H100"}
    rows = [
        facts | {"case": dataclasses.asdict(short), "allocated_bytes": 6.9 * gib, "outside_bytes": 0.5 * gib},
        facts | {"case": dataclasses.asdict(long), "out_of_memory": True},
    ]
    (tmp_path / "memory_gpu.json").write_text(json.dumps({"rows": rows}))
    text = memory_table.tables(tmp_path)
    cells = "2.4 (1 in a pass) | 4.7 | 4.5 | 7.4, met (an H100) | does not fit (an H100) |"
    assert f"| 2 B, 60 s, base in 4 bits | `--preset vram_8gb` | 8 | {cells}\n" in text
    assert "| XL, 60 s, base in 4 bits | `--preset xl_vram_16gb` | 16 |  |  |  |  |  |\n" in text
    assert "1.02 to 1.02 of what real code takes" in text and "on a song: not run" in text


def test_the_page_says_what_the_results_say():
    memory_table.main(["--check"])


def test_wrong_flags_are_one_sentence():
    with pytest.raises(UsageError, match="--stages warp: the cpu suite has targets"):
        memory.main(["--suite", "cpu", "--stages", "warp"])
    with pytest.raises(UsageError, match="needs a CUDA device"):
        memory.main(["--suite", "gpu"])
