"""Random encoders behave like real ones: finite outputs, and frequencies that are no weights."""

import dataclasses

import torch

from acestep_pipeline.estimation.model_shapes import SHAPES
from benchmarks.random_models import random_module

NARROW = {
    "text_encoder": {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
    "vae": {"encoder_hidden_size": 16, "decoder_channels": 16},
}


def test_random_encoders_compute_something():
    changes = {name: getattr(SHAPES["2b"], name) | narrow for name, narrow in NARROW.items()}
    shape, how = dataclasses.replace(SHAPES["2b"], **changes), {"device": torch.device("cpu"), "dtype": torch.float32}
    text_encoder, vae = (random_module(shape.build(name), **how) for name in NARROW)
    real = type(text_encoder)(text_encoder.config)
    assert text_encoder.rotary_emb.inv_freq.equal(real.rotary_emb.inv_freq)
    with torch.no_grad():
        states = text_encoder(torch.arange(12)[None]).last_hidden_state
        latents = vae.encode(torch.randn(1, 2, 1920 * 4)).latent_dist.mean
    assert states.isfinite().all() and states.std() > 0.1
    assert latents.shape == (1, 8, 4) and latents.isfinite().all() and latents.std() > 0
