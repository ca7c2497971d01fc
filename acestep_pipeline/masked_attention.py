"""Attention under a mask, without most of what the mask hides: sliding windows, and padded conditions.

diffusers' DiT gives every second block's self-attention a dense additive mask `[tokens, tokens]`, and all products
behind it are computed. Here queries go in blocks, each with the keys that any of them sees. And while queries share
keys (grouped-query attention), PyTorch on CUDA has no fused kernel that takes a mask (see `enable_gqa` of
`torch.nn.functional.scaled_dot_product_attention`) and would keep all weights: there, each head gets keys of its own.
"""

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.ace_step_transformer import AceStepAttnProcessor2_0

# Queries of a block: longer ones compute more behind the mask, shorter ones make more calls.
BLOCK = 256
# Kinds of device whose fused kernels take no mask with shared keys.
UNSHARED_KEYS_ON = ("cuda",)


def use_masked_attention(transformer: torch.nn.Module) -> None:
    """Let an `AceStepTransformer1DModel` attend so wherever there may be a mask; full self-attention has none."""
    for layer in transformer.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.set_processor(MaskedAttnProcessor())
        layer.cross_attn.set_processor(MaskedAttnProcessor())


class MaskedAttnProcessor(AceStepAttnProcessor2_0):
    """In the place of diffusers' processor: self-attention within a sliding window, or cross-attention."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`hidden_states` `[batch, tokens, dim]` → the same. `attention_mask` is heeded by cross-attention alone."""
        source = encoder_hidden_states if attn.is_cross_attention else hidden_states
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, attn.head_dim)))
        key = attn.norm_k(attn.to_k(source).unflatten(-1, (attn.kv_heads, attn.head_dim)))
        value = attn.to_v(source).unflatten(-1, (attn.kv_heads, attn.head_dim))
        if not attn.is_cross_attention:
            query, key = (
                apply_rotary_emb(states, image_rotary_emb, use_real=True, use_real_unbind_dim=-2, sequence_dim=1)
                for states in (query, key)
            )
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if attn.is_cross_attention:
            attended = attention(query, key, value, attention_mask, scale=attn.scaling)
        else:
            attended = windowed_attention(query, key, value, window=attn.sliding_window, scale=attn.scaling)
        attended = attended.transpose(1, 2).flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](attended))


def windowed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int, scale: float, block: int = BLOCK
) -> torch.Tensor:
    """Attention of each query to the keys at most `window` places before or after it.

    Args:
        query: `[batch, heads, tokens, dim]`.
        key: `[batch, kv_heads, tokens, dim]`, each shared by `heads / kv_heads` of the queries' heads.
        value: as `key`.
        window: the most places between a query and a key that it sees.
        scale: of the products.
        block: queries that are computed together.

    Returns:
        `[batch, heads, tokens, dim]`.
    """
    tokens = query.shape[2]
    if tokens <= window + 1:  # every query sees every key
        return attention(query, key, value, None, scale=scale)
    key, value = unshared(query, key), unshared(query, value)
    places = torch.arange(tokens, device=query.device)
    attended = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        seen = slice(max(0, start - window), min(tokens, end + window))
        mask = (places[start:end, None] - places[seen]).abs() <= window
        attended.append(attention(query[:, :, start:end], key[:, :, seen], value[:, :, seen], mask, scale=scale))
    return torch.cat(attended, dim=2)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, scale: float
) -> torch.Tensor:
    """Attention, where `mask` (if there is one) is True; shapes as of `windowed_attention`."""
    if mask is not None:
        key, value = unshared(query, key), unshared(query, value)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )


def unshared(query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Keys or values for each head of `query`, on devices that have a use for it; else as they are."""
    if query.device.type not in UNSHARED_KEYS_ON:
        return states
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)
