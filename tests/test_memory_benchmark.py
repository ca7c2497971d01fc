"""The estimate's bytes against real code on fake tensors: full width, every allocation counted, nothing computed."""

import pytest
import torch

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.estimation.memory_use import Batch
from acestep_pipeline.estimation.model_shapes import SHAPES
from acestep_pipeline.estimation.other_phases import decoding_tile_bytes, encoding_tile_bytes
from benchmarks.memory import TARGETS, LiveBytes, account_tiles, account_update, measure_target, predict_on_cpu

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
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.model} {target.flags[1]}")
def test_every_target_is_met_at_full_size(target):
    row = measure_target(target)
    assert 0.98 < row["unquantised_adamw"]["ratio"] < 1.08
    assert all(song["fits"] for song in row["songs"].values()), row
