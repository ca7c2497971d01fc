"""How far training moved each adapted layer: the norm of its update over that of its frozen weight.

The update dW is what the adapter adds to the weight W when it is merged, scale included. Both norms are Frobenius'.
Those of a LoRA and a LoKr come from their small factors; W, dequantised if need be, is there one layer at a time.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch.distributed.tensor import DTensor

from .offload import bring_weights


@dataclass(frozen=True)
class ModuleNorm:
    """The squared norms of a layer's update and of its weight."""

    name: str
    update_squared: float
    weight_squared: float

    @property
    def block(self) -> int | None:
        """The number of its transformer block; None for a layer outside of them."""
        match = re.match(r"layers\.(\d+)\.", self.name)
        return int(match[1]) if match else None

    @property
    def kind(self) -> str:
        """What layer of a block it is, such as `cross_attn.to_v`."""
        return re.sub(r"^layers\.\d+\.|\.0$", "", self.name)


def relative_norm(norms: Iterable[ModuleNorm]) -> float:
    """||dW|| / ||W|| of several layers taken together; 0 for none."""
    update, weight = (sum(getattr(norm, of) for norm in norms) for of in ("update_squared", "weight_squared"))
    return (update / weight) ** 0.5 if weight else 0.0


def group_by(norms: Iterable[ModuleNorm], attribute: str) -> dict:
    """The relative norm by `block` or `kind`, in the order of the layers."""
    groups = defaultdict(list)
    for norm in norms:
        groups[getattr(norm, attribute)].append(norm)
    return {key: relative_norm(group) for key, group in groups.items()}


@torch.no_grad()
def measure_update_norms(transformer: torch.nn.Module) -> tuple[ModuleNorm, ...]:
    """The norms of every layer that an adapter of PEFT's (LoRA, rsLoRA, DoRA, LoKr) is active in.

    Call it on all processes where each holds a share of the weights.

    Raises:
        TypeError: an adapter of another kind.
    """
    norms = []
    for name, layer in transformer.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        (adapter,) = layer.active_adapters
        bring_weights(transformer, name)
        weight = dequantize_module_weight(layer.get_base_layer()).detach()
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        rows = weight.float().square().sum(1).double().cpu()
        if isinstance(layer, LoKrLayer):
            update = _lokr(layer, adapter)
        elif not isinstance(layer, LoraLayer):
            raise TypeError(f"{name}: the norm of a {type(layer).__name__} is not known.")
        elif adapter in layer.lora_magnitude_vector:
            update = _dora(layer, adapter, weight, rows)
        else:
            update = _lora(layer, adapter)
        norms.append(ModuleNorm(name, float(update), float(rows.sum())))
    return tuple(norms)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()


def _product_squared(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """||B A||² = tr(BᵀB AAᵀ), of two matrices as small as the rank."""
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)


def _lora(layer: LoraLayer, adapter: str) -> torch.Tensor:
    """dW = s B A."""
    a, b = (_exact(part[adapter].weight) for part in (layer.lora_A, layer.lora_B))
    return layer.scaling[adapter] ** 2 * _product_squared(b, a)


def _dora(layer: LoraLayer, adapter: str, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """dW = g (W + D) - W with D = s B A, where g scales every row (an output) to its trained magnitude m:
    g = m / ||W + D||. The scalar products of the rows of W and D are those of W Aᵀ and s B."""
    a, b = layer.lora_A[adapter].weight, _exact(layer.lora_B[adapter].weight) * layer.scaling[adapter]
    crossed = (_exact(weight.float() @ a.T.float()) * b).sum(1)
    added = (b @ (_exact(a) @ _exact(a).T) * b).sum(1)
    g = _exact(layer.lora_magnitude_vector[adapter].weight) / (rows + 2 * crossed + added).clamp(min=0).sqrt()
    return ((g - 1) ** 2 * rows + 2 * g * (g - 1) * crossed + g**2 * added).sum().clamp(min=0)


def _lokr(layer: LoKrLayer, adapter: str) -> torch.Tensor:
    """dW = s W1 ⊗ W2, whose norm is the product of the factors'; a factor may be a product itself."""
    squared = layer.scaling[adapter] ** 2
    for factor in ("lokr_w1", "lokr_w2"):
        whole, *halves = (getattr(layer, f"{factor}{end}") for end in ("", "_a", "_b"))
        if adapter in whole:
            squared = squared * _exact(whole[adapter]).square().sum()
        else:
            squared = squared * _product_squared(*(_exact(half[adapter]) for half in halves))
    return squared
