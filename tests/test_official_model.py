"""What training computes against what the official code computed: conversion, conditions, velocity, loss, gradient.

The vectors, and how they were made, are in `tests/golden/README.md`.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from acestep_pipeline import ACEStepPipeline, conditioning
from acestep_pipeline.checkpoint_conversion import load_dit_components
from acestep_pipeline.condition_mask import ConditionMask, pad_conditions
from acestep_pipeline.conditioning import context_latents, encode_condition
from acestep_pipeline.flow_matching import interpolate, squared_error_sum, velocity_target
from acestep_pipeline.prompt_fields import PromptFields
from train_ace_step_lora import squared_error

GOLDEN = Path(__file__).parent / "golden"
# The names of two weights whose gradients the official code gave.
GRADIENTS = {
    "self_attn_q_grad": "layers.0.self_attn.to_q.weight",  # a sliding-window layer
    "cross_attn_v_grad": "layers.1.cross_attn.to_v.weight",
}


@pytest.fixture(scope="module", params=["base", "sft", "turbo", "xl"])
def official(request, tmp_path_factory) -> SimpleNamespace:
    """A variant's pipeline, without VAE and text encoder, and the official code's vectors for it."""
    folder = GOLDEN / ("base" if request.param == "sft" else request.param)
    if request.param == "sft":  # base under another name, see README.md there
        folder = shutil.copytree(folder, tmp_path_factory.mktemp("golden") / "sft")
        config = json.loads((folder / "config.json").read_text()) | {"model_version": "sft"}
        (folder / "config.json").write_text(json.dumps(config))
    pipeline = ACEStepPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        **load_dit_components(folder),
    )
    return SimpleNamespace(
        variant=request.param,
        pipeline=pipeline,
        condition_mask=ConditionMask(pipeline.transformer),
        vectors=load_file(folder / "golden.safetensors"),
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_variants_are_recognised(official):
    config, encoder = official.pipeline.transformer.config, official.pipeline.condition_encoder.config
    assert official.pipeline.is_turbo == (official.variant == "turbo")
    assert (encoder.hidden_size < config.hidden_size) == (official.variant == "xl")
    assert (config.timestep_mu, config.timestep_sigma) == (-0.4, 1.0)


@torch.no_grad()
def test_a_padded_batch_of_conditions(official):
    encoder, vectors = official.pipeline.condition_encoder, official.vectors
    hidden_states, mask = encoder(
        text_hidden_states=vectors["text"],
        text_attention_mask=vectors["text_mask"],
        lyric_hidden_states=vectors["lyric"],
        lyric_attention_mask=vectors["lyric_mask"],
        refer_audio_acoustic_hidden_states_packed=encoder.silence_latent[:, :750].expand(2, -1, -1).contiguous(),
        refer_audio_order_mask=torch.arange(2),
    )
    assert_close(hidden_states, vectors["encoder_hidden_states"])
    assert torch.equal(mask.bool(), vectors["encoder_mask"].bool())
    assert not mask.all(), "the second item is padded, or this test shows less than it says"


def training_conditions(official, monkeypatch) -> list[torch.Tensor]:
    """The conditions of both items as training caches them, from the text encoder's output on."""
    vectors, conditions = official.vectors, []
    monkeypatch.setattr(conditioning, "count_lost_tokens", lambda pipeline, fields: (0, 0))
    for item in range(2):
        text, lyric = (
            vectors[name][item : item + 1, : int(vectors[f"{name}_mask"][item].sum())] for name in ("text", "lyric")
        )
        encoded = (text, torch.ones(text.shape[:2]), lyric, torch.ones(lyric.shape[:2]))
        monkeypatch.setattr(official.pipeline, "encode_prompt", lambda encoded=encoded, **kwargs: encoded)
        conditions.append(encode_condition(official.pipeline, PromptFields("x")).encoder_hidden_states)
    return conditions


def test_the_condition_that_training_caches_is_the_officials_without_its_padding(official, monkeypatch):
    vectors = official.vectors
    for item, condition in enumerate(training_conditions(official, monkeypatch)):
        assert_close(condition, vectors["encoder_hidden_states"][item, vectors["encoder_mask"][item].bool()])


@torch.no_grad()
def test_velocity_and_loss(official):
    vectors, transformer = official.vectors, official.pipeline.transformer
    noisy = interpolate(vectors["x0"], vectors["noise"], vectors["t"])
    assert_close(noisy, vectors["xt"])
    context = context_latents(official.pipeline.condition_encoder.silence_latent, 75).expand(2, -1, -1)
    assert torch.equal(context, vectors["context_latents"])
    official.condition_mask.set(None)  # the official code attends to the padding
    velocity = transformer(
        hidden_states=noisy,
        timestep=vectors["t"],
        timestep_r=vectors["t"],
        encoder_hidden_states=vectors["encoder_hidden_states"],
        context_latents=context,
        return_dict=False,
    )[0]
    assert_close(velocity, vectors["velocity"])
    loss = squared_error_sum(velocity, velocity_target(vectors["x0"], vectors["noise"])) / velocity.numel()
    assert_close(loss, vectors["loss"][0])


@pytest.mark.parametrize("dropped", [False, True])
def test_the_scripts_loss_and_gradient_of_a_batch_are_the_officials_of_its_items_alone(official, monkeypatch, dropped):
    """Conditions of 27 and 18 tokens in one forward pass, against the official `forward` at batch size 1."""
    vectors, pipeline = official.vectors, official.pipeline
    conditions, mask = pad_conditions(training_conditions(official, monkeypatch))
    weights = dict(pipeline.transformer.named_parameters())
    for name in GRADIENTS.values():
        weights[name].requires_grad_(True).grad = None
    batch = {"latents": vectors["x0"], "noise": vectors["noise"], "sigmas": vectors["t"]}
    batch |= {"encoder_hidden_states": conditions, "condition_mask": mask, "dropped": torch.full((2,), dropped)}
    encoder = pipeline.condition_encoder
    error = squared_error(
        pipeline.transformer, batch, official.condition_mask, encoder.silence_latent, encoder.null_condition_emb
    )
    loss = error / vectors["x0"].numel()
    assert_close(loss.detach(), vectors["item_losses_dropped" if dropped else "item_losses"].mean())
    if not dropped:
        loss.backward()
        for golden, name in GRADIENTS.items():
            assert_close(weights[name].grad, vectors[golden])
