"""Previews, heard before the first update and after every one, change nothing of the training."""

import random

import numpy as np
import pytest
import soundfile
import torch

from acestep_pipeline.training.previews import randomness_kept
from tests.training_runs import metrics, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
RUN = {"max_train_steps": 3, "lora_dropout": 0.2, "max_duration_s": 2, "ema_decay": 0.9, "learning_rate": 1e-2}


def test_a_run_with_previews_ends_in_the_same_adapter_bit_for_bit(demo_dir, tmp_path):
    preview = {"preview_steps": 1, "validation_duration_s": 1, "validation_inference_steps": 2}
    train_here(demo_dir, tmp_path / "without", **RUN)
    train_here(demo_dir, tmp_path / "with", **RUN, **preview)
    assert (tmp_path / "with" / WEIGHTS).read_bytes() == (tmp_path / "without" / WEIGHTS).read_bytes()
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    samples = tmp_path / "with" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == [f"preview-{update}" for update in range(4)]
    heard = [soundfile.read(samples / f"preview-{update}" / "sample-0.wav")[0] for update in range(4)]
    assert all(waveform.shape == (48000, 2) and abs(waveform).max() > 0.01 for waveform in heard)
    assert abs(heard[3] - heard[0]).max() > 1e-3, "the adapter of that update is what is heard"
    assert [path.name for path in (samples / "preview-0").iterdir()] == ["sample-0.wav"]


@pytest.mark.parametrize("failing", [False, True])
def test_every_global_generator_is_left_as_it_was(failing):
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    try:
        with randomness_kept(torch.device("cpu")):
            draws()
            torch.manual_seed(9)
            if failing:
                raise KeyError
    except KeyError:
        pass
    assert draws() == expected
