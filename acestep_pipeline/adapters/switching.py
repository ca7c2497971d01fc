"""The pipeline's methods that choose which of the loaded adapters act."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import get_adapter_name

from ..errors import UsageError
from . import hotswap as adapter_hotswap
from . import quick_lora
from .mixed_batch import Choice, adapters_by_item, check_choices
from .settings import parse_targets
from .weights import (
    ActiveAdapters,
    Weight,
    activate,
    active_adapters,
    adapter_layers,
    check_not_fused,
    check_schedule,
    check_weights,
    on_schedule,
    set_active,
)


class AdapterSwitching:
    """What `ACEStepPipeline` does with adapters beyond diffusers' methods of the same names: it checks before it
    changes anything, takes weights by layer, by step and by prompt, and switches without making a tensor."""

    def __call__(
        self,
        *args: Any,
        adapters: Sequence[Choice] | None = None,
        adapter_schedule: Mapping[str, Weight | Sequence[tuple[float, Weight]]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as diffusers does, with adapters for this call; afterwards those of before act again.

        Args:
            args: diffusers', the first is the prompt or a list of them.
            adapters: for each prompt None (no adapter), a name, `(name, weight)`, or `{name: weight, …}`.
            adapter_schedule: weights by the step, `{"jazz": [(0.0, 0.0), (0.4, 0.8)], "lofi": 0.5}`: from 40 % of the
                steps on jazz at 0.8, lofi all the time. No other adapter acts.
            kwargs: diffusers'.

        Raises:
            UsageError: an adapter that isn't loaded, an impossible weight, or both of these arguments at once.
        """
        if adapters is not None:
            if adapter_schedule is not None or (kwargs.get("attention_kwargs") or {}).get("scale", 1.0) != 1.0:
                raise UsageError("adapters by prompt go with neither an adapter_schedule nor attention_kwargs' scale.")
            prompts = args[0] if args else kwargs.get("prompt")
            weights = check_choices(self.transformer, adapters, num_items=_count(prompts))
            with adapters_by_item(self.transformer, weights):
                return super().__call__(*args, **kwargs)
        if adapter_schedule is None:
            return super().__call__(*args, **kwargs)
        schedule = check_schedule(self.transformer, adapter_schedule)
        before = ActiveAdapters(self.transformer)
        try:
            callback = on_schedule(self.transformer, schedule, kwargs.pop("callback_on_step_end", None))
            return super().__call__(*args, callback_on_step_end=callback, **kwargs)
        finally:
            before.restore()

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight | None] | None = None
    ) -> None:
        """Let these adapters act, and no others; see `adapter_weights.check_weights` for weights by layer.

        Raises:
            UsageError: one isn't loaded, or a weight is none from -2 to 2. The adapters of before act on.
        """
        activate(self.transformer, check_weights(self.transformer, adapter_names, adapter_weights))

    def get_active_adapters(self) -> list[str]:
        """The adapters that act on at least one layer: not those of weight 0."""
        return active_adapters(self.transformer)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters and free their memory; those that remain act as before.

        Raises:
            UsageError: one isn't loaded.
        """
        names = list(check_weights(self.transformer, adapter_names, None))
        check_not_fused(self.transformer)
        # peft would let another adapter act in the place of an active one that goes.
        for _, layer in adapter_layers(self.transformer):
            set_active(layer, [name for name in layer.active_adapters if name not in names])
        super().delete_adapters(names)

    def enable_lora_hotswap(
        self, target_rank: int = 128, target_modules: str | Sequence[str] = "attention+mlp"
    ) -> None:
        """Give the adapters that are loaded from now on room for others, so that `load_lora_weights(…, hotswap=True)`
        and `set_adapters` with other weights need no new compilation. Call it before the first is loaded.

        Args:
            target_rank: the highest rank to come. Every adapter takes the memory and time of this rank.
            target_modules: the layers to come, sets or names as for training; by default all of the blocks.

        Raises:
            UsageError: see `adapter_hotswap.make_room`.
        """
        adapter_hotswap.make_room(self.transformer, target_rank=target_rank, targets=parse_targets(target_modules))

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: dict[str, torch.Tensor],
        transformer: torch.nn.Module,
        adapter_name: str | None = None,
        *,
        hotswap: bool = False,
        metadata: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """diffusers' step of loading that adds the layers: quicker where `quick_lora` can, in place where
        `adapter_hotswap` is to.

        Raises:
            ValueError: there is no room for it.
        """
        adapter_name = adapter_name or get_adapter_name(transformer)
        load_anew = super().load_lora_into_transformer

        def load(state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None) -> None:
            load_anew(dict(state_dict), transformer, adapter_name=adapter_name, metadata=metadata, **options)

        if hotswap or getattr(transformer, "_hotswap_room", None) is not None:
            adapter_hotswap.load(
                transformer,
                state_dict,
                metadata,
                adapter_name=adapter_name,
                hotswap=hotswap,
                load_anew=load,
            )
        elif not quick_lora.add_lora(transformer, state_dict, metadata, adapter_name):
            load(state_dict, metadata)


def _count(prompts: str | list[str] | None) -> int:
    return len(prompts) if isinstance(prompts, list) else 1
