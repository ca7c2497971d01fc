"""A VAE's posterior of a waveform that comes in blocks, so that memory doesn't grow with the song."""

from collections.abc import Iterable

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution

from .audio import AudioError


def encode_in_tiles(vae, blocks: Iterable[np.ndarray]) -> OobleckDiagonalGaussianDistribution:
    """Encode blocks `[2, samples]` of one waveform, cut to whole latent frames: the posterior `[1, channels, frames]`.

    The tiles, and with them the bits, are those of `AutoencoderOobleck.encode` with tiling (diffusers 0.42.1) of the
    whole waveform; but no more of it than a tile and a block is held, and a tile on the VAE's device.

    Raises:
        AudioError: there is less than one latent frame.
    """
    hop, longest, overlap = vae.hop_length, vae.tile_sample_min_length, vae.tile_sample_overlap
    stride = longest - 2 * overlap
    held, first = np.empty((2, 0), np.float32), 0  # what is held of the waveform, which begins at this sample of it
    tiles: list[torch.Tensor] = []

    def encode(core: int, core_end: int, end: int) -> None:
        """Add the tile of these samples; the VAE sees those around them, to `end`."""
        nonlocal held, first
        start = max(0, core - overlap)
        window = torch.from_numpy(held[:, start - first : end - first])[None].to(vae.device, vae.dtype)
        tiles.append(vae.encoder(window)[:, :, (core - start) // hop : (core_end - start) // hop])
        held, first = held[:, core_end - overlap - first :], core_end - overlap

    for block in blocks:
        held = np.concatenate([held, block], axis=1) if held.size else block
        whole = (first + held.shape[1]) // hop * hop
        # What `longest` holds is one tile.
        while whole > longest and whole >= (core_end := (len(tiles) + 1) * stride) + overlap:
            encode(core_end - stride, core_end, core_end + overlap)
    whole = (first + held.shape[1]) // hop * hop
    if not whole:
        raise AudioError("it holds less than one latent frame of audio")
    if whole <= longest:
        stride = whole
    for core in range(len(tiles) * stride, whole, stride):
        encode(core, min(core + stride, whole), min(core + stride + overlap, whole))
    return OobleckDiagonalGaussianDistribution(torch.cat(tiles, dim=-1))
