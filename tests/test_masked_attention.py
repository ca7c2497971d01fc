"""Attention without what a mask hides, against diffusers' own: values and gradients."""

import pytest
import torch
from diffusers import AceStepTransformer1DModel

from acestep_pipeline import masked_attention
from acestep_pipeline.condition_mask import ConditionMask
from acestep_pipeline.masked_attention import MaskedAttnProcessor, use_masked_attention

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def build(**changes) -> AceStepTransformer1DModel:
    torch.manual_seed(0)
    return AceStepTransformer1DModel(**SHAPE | changes)


def velocity_and_gradients(model, frames: int, *, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        velocity = model(
            hidden_states=draw(2, frames, 64), timestep=torch.tensor([0.3, 0.8]),
            timestep_r=torch.tensor([0.3, 0.8]), encoder_hidden_states=draw(2, 7, 64),
            context_latents=draw(2, frames, 128),
        ).sample  # fmt: skip
    velocity.float().square().sum().backward()
    return [velocity.float().detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1.0, one.abs().max().item())


# Tokens are half the frames: within one window, one more than that, within a block, on its edge, and in several.
@pytest.mark.parametrize("frames", (20, 256, 258, 260, 512, 514, 1500))
@pytest.mark.parametrize("devices", (("cuda",), ("cuda", "cpu")))
@pytest.mark.parametrize("padded", (False, True))
def test_it_equals_the_dense_mask(frames, devices, padded, monkeypatch):
    monkeypatch.setattr(masked_attention, "UNSHARED_KEYS_ON", devices)  # as on CUDA
    model = build()
    ConditionMask(model).set(torch.tensor([[True] * 7, [True] * 4 + [False] * 3]) if padded else None)
    dense = velocity_and_gradients(model, frames)
    use_masked_attention(model)
    kinds = [isinstance(layer.self_attn.processor, MaskedAttnProcessor) for layer in model.layers]
    assert kinds == [kind == "sliding_attention" for kind in model.layer_types] and any(kinds) and not all(kinds)
    assert_equal(dense, velocity_and_gradients(model, frames))


def test_a_narrow_window_over_many_blocks():
    model = build(sliding_window=3)
    dense = velocity_and_gradients(model, 1100)
    use_masked_attention(model)
    assert_equal(dense, velocity_and_gradients(model, 1100))


def test_it_is_no_further_from_float32_in_bfloat16():
    model = build()
    exact = velocity_and_gradients(model, 600)[0]
    dense = velocity_and_gradients(model, 600, dtype=torch.bfloat16)[0]
    use_masked_attention(model)
    windowed = velocity_and_gradients(model, 600, dtype=torch.bfloat16)[0]
    assert (windowed - exact).norm() <= 1.2 * (dense - exact).norm()


def test_no_product_is_computed_far_from_the_window(monkeypatch):
    shapes = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, **options):
        shapes.append((query.shape[2], key.shape[2]))
        return real(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    query, keys = torch.randn(1, 4, 3000, 16), torch.randn(1, 2, 3000, 16)
    masked_attention.windowed_attention(query, keys, keys, window=128, scale=0.25)
    assert sum(queries for queries, _ in shapes) == 3000
    assert sum(queries * keys for queries, keys in shapes) <= 3000 * 512
