"""Batches of conditions of unequal length, exactly: padding that no cross-attention can see.

diffusers' DiT passes no mask to its cross-attention, so padded condition tokens would be attended to. Its attention
module and processor do take one; a hook on each cross-attention hands it over.
"""

import contextlib
from collections.abc import Iterator

import torch


class ConditionMask:
    """Hides padded condition tokens from the cross-attention of an `AceStepTransformer1DModel`.

    Add it once to a model, and `set` it before each forward pass; it stays until the next `set`, for backward passes
    that compute their activations again (gradient checkpointing).
    """

    def __init__(self, transformer: torch.nn.Module) -> None:
        self._mask: torch.Tensor | None = None
        attentions = [layer.cross_attn for layer in transformer.layers]
        self._hooks = [module.register_forward_pre_hook(self._add_mask, with_kwargs=True) for module in attentions]

    def set(self, mask: torch.Tensor | None) -> None:
        """Set the mask: bool `[batch, tokens]`, True where a token is real, or None where every token is."""
        self._mask = None if mask is None else mask[:, None, None, :]

    def remove(self) -> None:
        """Take the hooks off the model again."""
        for hook in self._hooks:
            hook.remove()

    def _add_mask(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": self._mask}


@contextlib.contextmanager
def padding_hidden(condition_encoder: torch.nn.Module, transformer: torch.nn.Module) -> Iterator[None]:
    """While this context lasts, `transformer` heeds the masks that `condition_encoder` returns with its conditions.

    `AceStepPipeline.__call__` drops them, so that what a prompt sounds like would depend on the lengths of the other
    prompts in its batch. A batch without padding runs without any hook.
    """
    masks: dict[int, torch.Tensor] = {}
    condition_mask: ConditionMask | None = None

    def keep(module: torch.nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        nonlocal condition_mask
        mask = output[1].bool()
        masks[mask.shape[1]] = mask
        if condition_mask is None and not mask.all():
            condition_mask = ConditionMask(transformer)

    def choose(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if condition_mask is not None:
            conditions = kwargs["encoder_hidden_states"]
            mask = masks[conditions.shape[1]]
            # Guidance runs the batch a second time behind itself, without its conditions; these are all alike there.
            condition_mask.set(mask.repeat(len(conditions) // len(mask), 1))

    hooks = [
        condition_encoder.register_forward_hook(keep),
        transformer.register_forward_pre_hook(choose, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if condition_mask is not None:
            condition_mask.remove()


def pad_conditions(
    conditions: list[torch.Tensor], num_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stack conditions `[tokens, dim]` with zeros after the shorter ones, up to `num_tokens` if it is given.

    Returns:
        `[batch, longest or num_tokens, dim]`, and the mask for `ConditionMask.set`; without `num_tokens` None if all
        lengths are equal.
    """
    lengths = torch.tensor([len(condition) for condition in conditions])
    padded = torch.nn.utils.rnn.pad_sequence(conditions, batch_first=True)
    if num_tokens is not None:
        padded = torch.nn.functional.pad(padded, (0, 0, 0, num_tokens - padded.shape[1]))
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return padded, None if num_tokens is None and mask.all() else mask
