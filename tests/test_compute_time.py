"""Operations by formula against those that PyTorch counts."""

import pytest
import torch
from diffusers import AceStepTransformer1DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.estimation.compute_time import mean_window_keys, pass_seconds, pass_work
from acestep_pipeline.estimation.gpus import find_gpu
from acestep_pipeline.estimation.memory_use import Batch, Precision, inspect_adapter
from acestep_pipeline.training.memory import enable_gradient_checkpointing

SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip


@pytest.mark.parametrize("checkpointing", (0.0, 0.5, 1.0))
@pytest.mark.parametrize(("items", "frames", "conditions"), ((1, 400, 60), (2, 600, 20)))
def test_operations_are_those_that_are_counted(checkpointing, items, frames, conditions):
    """Under the plain attention algorithm, whose products are counted: its backward pass is twice its forward."""
    model = AceStepTransformer1DModel(**SHAPE)
    add_lora(model, LoraSettings(r=8, lora_dropout=0.05), seed=0)
    if checkpointing:
        enable_gradient_checkpointing(model.train(), checkpointing)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(
            hidden_states=torch.randn(items, frames, 64), timestep=torch.full((items,), 0.5),
            timestep_r=torch.full((items,), 0.5), encoder_hidden_states=torch.randn(items, conditions, 256),
            context_latents=torch.randn(items, frames, 128),
        ).sample.square().sum().backward()  # fmt: skip
    work = pass_work(
        model.config, inspect_adapter(model, dropout=0.05), Batch(items, frames, conditions), Precision(4, 4),
        base_quantization="none", gradient_checkpointing=checkpointing, attention_backward=2.0,
        windowed=False,
    )  # fmt: skip
    assert work.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("frames", (2, 300, 512, 514, 2000))
def test_the_keys_within_sliding_windows_are_counted(frames):
    model, tokens = AceStepTransformer1DModel(**SHAPE), frames // 2
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (distance.abs() <= model.config.sliding_window).sum().item() / tokens
    assert mean_window_keys(model.config, Batch(3, frames, 9)) == pytest.approx((seen + tokens) / 2)


def test_a_faster_gpu_takes_less_time_and_quantising_more():
    model = AceStepTransformer1DModel(**SHAPE)
    add_lora(model, LoraSettings(r=8), seed=0)
    adapter, batch = inspect_adapter(model, dropout=0.0), Batch(8, 6000, 100)

    def seconds(gpu, method="none"):
        work = pass_work(
            model.config, adapter, batch, Precision(2), base_quantization=method, gradient_checkpointing=0
        )
        return pass_seconds(work, find_gpu(gpu), Precision(2))

    assert seconds("h100") < seconds("a100 40gb") < seconds("rtx 3060")
    assert seconds("h100", "nf4") > seconds("h100")
