"""One DiT whose blocks compute in several ways: our attention or diffusers', plain or compiled, some checkpointed."""

import contextlib
from collections.abc import Iterator

import torch

from acestep_pipeline.masked_attention import use_masked_attention
from acestep_pipeline.training.compilation import CompiledBlocks
from acestep_pipeline.training.memory import enable_gradient_checkpointing


class BlockVariants:
    """The ways in which the blocks of a DiT can compute, one of them at a time; `compiled` are the compiled blocks."""

    def __init__(self, transformer: torch.nn.Module, ratios: set[float]) -> None:
        """Make them, with these shares of checkpointed blocks beside none; which one is used is open until `use`."""
        self.blocks = transformer.layers
        attentions = [module for layer in self.blocks for module in (layer.self_attn, layer.cross_attn)]
        self._dense_processors = {module: module.processor for module in attentions}
        use_masked_attention(transformer)
        self._our_processors = {module: module.processor for module in attentions}
        # The share of checkpointed blocks, and whether they are compiled -> how each computes.
        self._forwards = {(0.0, False): self._current_forwards()}
        self.compiled = CompiledBlocks(transformer)
        self._forwards[0.0, True] = self._current_forwards()
        for ratio in ratios - {0.0}:
            for compiled in (False, True):
                self._use_forwards(0.0, compiled=compiled)
                enable_gradient_checkpointing(transformer, ratio)
                self._forwards[ratio, compiled] = self._current_forwards()

    def use(self, ratio: float, *, dense: bool = False, compiled: bool = False) -> None:
        """Let a share `ratio` of the blocks be checkpointed, and all of them attend as diffusers' do (`dense`), or run
        as compiled code."""
        for module, processor in (self._dense_processors if dense else self._our_processors).items():
            module.set_processor(processor)
        self._use_forwards(ratio, compiled=compiled)

    def _current_forwards(self) -> list:
        return [block.forward for block in self.blocks]

    def _use_forwards(self, ratio: float, *, compiled: bool) -> None:
        for block, forward in zip(self.blocks, self._forwards[ratio, compiled], strict=True):
            block.forward = forward

    @contextlib.contextmanager
    def dense_masks(self) -> Iterator[None]:
        """Inside, attentions that need no mask get a dense one of zeros, `[1, 1, queries, keys]`."""

        def add(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if kwargs.get("attention_mask") is None:
                queries, keys = kwargs["hidden_states"], kwargs.get("encoder_hidden_states")
                shape = (1, 1, queries.shape[1], (queries if keys is None else keys).shape[1])
                kwargs = kwargs | {"attention_mask": masks.setdefault(shape, queries.new_zeros(shape))}
            return args, kwargs

        masks: dict[tuple, torch.Tensor] = {}
        hooks = [module.register_forward_pre_hook(add, with_kwargs=True) for module in self._dense_processors]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
