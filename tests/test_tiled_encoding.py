"""A waveform in blocks is encoded to the bits of the whole one, in memory that doesn't grow with it."""

import tracemalloc

import numpy as np
import pytest
import torch
from diffusers import AutoencoderOobleck

from acestep_pipeline.data.audio import AudioError
from acestep_pipeline.data.tiled_encoding import encode_in_tiles
from acestep_pipeline.pipeline import ENCODE_TILE_FRAMES, tile_audio_coding


@pytest.fixture(scope="module")
def vae() -> AutoencoderOobleck:
    torch.manual_seed(0)
    vae = AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[2, 4, 4, 6, 10], channel_multiples=[1] * 5, decoder_channels=1,
        decoder_input_channels=2, sampling_rate=48_000,
    )  # fmt: skip
    tile_audio_coding(vae)
    return vae.eval().requires_grad_(False)


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (2, samples)).astype(np.float32)


@pytest.mark.parametrize("frames", (1, ENCODE_TILE_FRAMES, ENCODE_TILE_FRAMES + 1, 227, 330))
@pytest.mark.parametrize("rest", (0, 1919))
def test_blocks_make_the_bits_of_the_whole(vae, frames, rest):
    waveform = noise(frames * 1920 + rest)
    whole = vae.encode(torch.from_numpy(waveform)[None, :, : frames * 1920]).latent_dist
    for size in (100_000, waveform.shape[1]):
        blocks = [waveform[:, start : start + size] for start in range(0, waveform.shape[1] + 1, size)]
        posterior = encode_in_tiles(vae, blocks)
        assert posterior.mean.equal(whole.mean) and posterior.std.equal(whole.std)
        assert posterior.mean.shape == (1, 2, frames)


def test_memory_does_not_grow_with_the_song(vae):
    def peak(blocks: int) -> int:
        tracemalloc.start()
        encode_in_tiles(vae, (noise(1 << 18) for _ in range(blocks)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(2)
    assert peak(12) == pytest.approx(peak(4), rel=0.2)


def test_less_than_a_frame_is_refused(vae):
    with pytest.raises(AudioError, match="less than one latent frame"):
        encode_in_tiles(vae, [noise(1919)])
