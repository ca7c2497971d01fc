"""From a track's text to the tensors the DiT is conditioned on: the same code path as inference, run once."""

import math
from dataclasses import asdict, dataclass

import torch
from diffusers import AceStepPipeline

from .prompt_fields import PromptFields

# Limits of the official code and of `AceStepPipeline.encode_prompt`.
MAX_TEXT_TOKENS = 256
MAX_LYRIC_TOKENS = 2048
# Timbre reference where there is no reference audio: 30 s of the silence latent.
TIMBRE_DURATION_S = 30


@dataclass(frozen=True)
class EncodedCondition:
    """`encoder_hidden_states` is `[tokens, dim]` without any padding; `lost_*` count tokens cut by the limits."""

    encoder_hidden_states: torch.Tensor
    lost_text_tokens: int
    lost_lyric_tokens: int


@torch.no_grad()
def encode_condition(pipeline: AceStepPipeline, fields: PromptFields) -> EncodedCondition:
    """Encode one clip's text exactly as `AceStepPipeline.__call__` does for text2music.

    Timbre is the silence latent's first 30 s. One clip at a time, so that nothing is padded.
    """
    device = pipeline.condition_encoder.device
    text, text_mask, lyric, lyric_mask = pipeline.encode_prompt(
        **asdict(fields),
        device=device,
        max_text_length=MAX_TEXT_TOKENS,
        max_lyric_length=MAX_LYRIC_TOKENS,
    )
    timbre_frames = math.ceil(TIMBRE_DURATION_S * pipeline.latents_per_second)
    timbre = pipeline.condition_encoder.silence_latent[:, :timbre_frames].to(pipeline.transformer.dtype)
    hidden_states, mask = pipeline.condition_encoder(
        text_hidden_states=text,
        text_attention_mask=text_mask,
        lyric_hidden_states=lyric,
        lyric_attention_mask=lyric_mask,
        refer_audio_acoustic_hidden_states_packed=timbre.contiguous(),
        refer_audio_order_mask=torch.arange(1, device=device),
    )
    lost_text, lost_lyric = count_lost_tokens(pipeline, fields)
    return EncodedCondition(hidden_states[0, mask[0].bool()], lost_text, lost_lyric)


def count_lost_tokens(pipeline: AceStepPipeline, fields: PromptFields) -> tuple[int, int]:
    """Tokens of the prompt and of the lyrics beyond the model's limits, which `encode_prompt` cuts silently."""
    text, lyric = pipeline._format_prompt(**asdict(fields))
    text_tokens, lyric_tokens = (len(ids) for ids in pipeline.tokenizer([text, lyric]).input_ids)
    return max(0, text_tokens - MAX_TEXT_TOKENS), max(0, lyric_tokens - MAX_LYRIC_TOKENS)


def context_latents(silence_latent: torch.Tensor, num_frames: int) -> torch.Tensor:
    """What the DiT sees beside the noisy latents when everything is to be generated.

    Args:
        silence_latent: `[1, frames, channels]`, the condition encoder's buffer; repeated when `num_frames` is longer.
        num_frames: length of the crop; the context always starts at the silence's frame 0.

    Returns:
        `[num_frames, 2 * channels]`: silence, then a chunk mask of ones ("generate this frame").
    """
    silence = silence_latent[0]
    if silence.shape[0] < num_frames:
        silence = silence.repeat(math.ceil(num_frames / silence.shape[0]), 1)
    silence = silence[:num_frames]
    return torch.cat([silence, torch.ones_like(silence)], dim=-1)


def drop_conditions(
    encoder_hidden_states: torch.Tensor, null_condition_emb: torch.Tensor, dropped: torch.Tensor
) -> torch.Tensor:
    """Replace the whole condition sequence of each dropped item by the learned null embedding (CFG training).

    Args:
        encoder_hidden_states: `[batch, tokens, dim]`.
        null_condition_emb: `[1, 1, dim]`.
        dropped: bool `[batch]`.
    """
    null = null_condition_emb.to(encoder_hidden_states.dtype)
    return torch.where(dropped.view(-1, 1, 1), null, encoder_hidden_states)
