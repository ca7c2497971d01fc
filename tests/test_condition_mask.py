"""Conditions of unequal length in one forward pass give what each gives alone, to rounding."""

import inspect

import pytest
import torch
from diffusers import AceStepTransformer1DModel

from acestep_pipeline.condition_mask import ConditionMask, pad_conditions

TOKENS = (3, 17, 9)


@pytest.fixture
def transformer(tiny_pipeline) -> AceStepTransformer1DModel:
    # 50 frames are 25 tokens: the window of half the layers has to be narrower to be seen at all.
    model = AceStepTransformer1DModel.from_config({**tiny_pipeline.transformer.config, "sliding_window": 4})
    assert "sliding_attention" in model.layer_types and "full_attention" in model.layer_types
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def inputs(transformer, batch: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    channels = transformer.config.audio_acoustic_hidden_dim
    sigmas = torch.rand(batch, generator=generator)
    return {
        "hidden_states": torch.randn(batch, 50, channels, generator=generator),
        "context_latents": torch.randn(batch, 50, transformer.config.in_channels - channels, generator=generator),
        "timestep": sigmas,
        "timestep_r": sigmas,
    }


def conditions(transformer) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    dim = transformer.condition_embedder.in_features
    return [torch.randn(tokens, dim, generator=generator) for tokens in TOKENS]


def gradients(transformer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    transformer.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_tokens", [None, 64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_padded_batch_is_its_items_one_by_one(transformer, checkpointing, num_tokens):
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    mask = ConditionMask(transformer)
    batch = inputs(transformer, len(TOKENS))
    alone = []
    for index, condition in enumerate(conditions(transformer)):
        one = {name: tensor[index : index + 1] for name, tensor in batch.items()}
        mask.set(None)
        alone.append(transformer(**one, encoder_hidden_states=condition[None], return_dict=False)[0])
    alone = torch.cat(alone)
    expected = gradients(transformer, alone.square().sum())

    padded, real = pad_conditions(conditions(transformer), num_tokens)
    mask.set(real)
    together = transformer(**batch, encoder_hidden_states=padded, return_dict=False)[0]
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)
    found = gradients(transformer, together.square().sum())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name

    mask.set(None)
    leaking = transformer(**batch, encoder_hidden_states=padded, return_dict=False)[0]
    assert not torch.allclose(leaking, alone, rtol=1e-2, atol=1e-2), "without a mask the padding is attended to"


def test_equal_lengths_need_no_mask():
    padded, mask = pad_conditions([torch.ones(4, 2), torch.zeros(4, 2)])
    assert padded.shape == (2, 4, 2) and mask is None
    padded, mask = pad_conditions([torch.ones(1, 2), torch.ones(3, 2)])
    assert mask.tolist() == [[True, False, False], [True, True, True]] and padded[0, 1:].abs().sum() == 0
    padded, mask = pad_conditions([torch.ones(2, 2)], 4)
    assert mask.tolist() == [[True, True, False, False]] and padded[0].sum(1).tolist() == [2, 2, 0, 0]
    assert pad_conditions([torch.ones(2, 2)], 2)[1].all(), "a mask even so: one shape, one graph"


def test_diffusers_still_passes_no_mask_itself():
    assert "encoder_attention_mask" not in inspect.signature(AceStepTransformer1DModel.forward).parameters, (
        "diffusers takes a condition mask now: hand it over there and drop the hooks"
    )
