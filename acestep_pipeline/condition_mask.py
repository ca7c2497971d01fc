"""Batches of conditions of unequal length, exactly: padding that no cross-attention can see.

diffusers' DiT passes no mask to its cross-attention, so padded condition tokens would be attended to. Its attention
module and processor do take one; a hook on each cross-attention hands it over.
"""

import torch


class ConditionMask:
    """Hides padded condition tokens from the cross-attention of an `AceStepTransformer1DModel`.

    Add it once to a model, and `set` it before each forward pass; it stays until the next `set`, for backward passes
    that compute their activations again (gradient checkpointing).
    """

    def __init__(self, transformer: torch.nn.Module) -> None:
        self._mask: torch.Tensor | None = None
        for layer in transformer.layers:
            layer.cross_attn.register_forward_pre_hook(self._add_mask, with_kwargs=True)

    def set(self, mask: torch.Tensor | None) -> None:
        """Set the mask: bool `[batch, tokens]`, True where a token is real, or None where every token is."""
        self._mask = None if mask is None else mask[:, None, None, :]

    def _add_mask(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": self._mask}


def pad_conditions(conditions: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stack conditions `[tokens, dim]` with zeros after the shorter ones.

    Returns:
        `[batch, longest, dim]`, and the mask for `ConditionMask.set`, None if all lengths are equal.
    """
    lengths = torch.tensor([len(condition) for condition in conditions])
    padded = torch.nn.utils.rnn.pad_sequence(conditions, batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return padded, None if mask.all() else mask
