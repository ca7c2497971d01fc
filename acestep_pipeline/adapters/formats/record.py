"""The one form that adapters of all formats are brought into: what is added to which layer of the transformer."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Kind of a layer's update -> the tensors that it may have, by the names of PEFT and LyCORIS.
KIND_TENSORS = {
    "lora": ("lora_A", "lora_B"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "oft": ("oft_R",),
    "diag_oft": ("oft_blocks", "rescale"),
    "full": ("diff",),
}
# DoRA's norms; LoRA, LoKr and LoHa may have them.
MAGNITUDE = "magnitude"
KIND_NAMES = {
    "lora": "LoRA",
    "dora": "DoRA",
    "lokr": "LoKr",
    "loha": "LoHa",
    "oft": "OFT",
    "diag_oft": "OFT (LyCORIS)",
    "full": "full weights",
}


@dataclass(frozen=True)
class ModuleWeights:
    """The update of one linear layer with weight W `[out, in]`; `deltas.delta_weight` is what it comes to.

    Attributes:
        kind: a key of `KIND_TENSORS`.
        tensors: of these names, and `magnitude` (`[out]` or `[out, 1]`: norms of rows; `[1, in]`: of columns).
            LoRA: A `[rank, in]`, B `[out, rank]`. LoKr: factors w1 and w2, each whole or as the product of `_a` and
            `_b`. LoHa: `_a` `[out, rank]`, `_b` `[rank, in]`. OFT (PEFT): the upper triangles of skew-symmetric blocks
            `[blocks, size·(size−1)/2]` that rotate the input; LyCORIS: whole blocks `[blocks, size, size]` that rotate
            the output, and a factor `[out, 1]`. Full: the difference `[out, in]`.
        rank: that the alpha is divided by.
        alpha: as it was stored or configured.
        rank_stabilised: whether it is divided by the root of the rank instead (rsLoRA).
        constraint: LyCORIS OFT's bound on the norm of its blocks; 0 is none.
    """

    kind: str
    tensors: dict[str, torch.Tensor]
    rank: int = 1
    alpha: float = 1.0
    rank_stabilised: bool = False
    constraint: float = 0.0

    @property
    def scale(self) -> float:
        """What the product of the tensors is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(out, in) of the layer that this fits; None for a side that fits any."""
        return layer_shape(self.kind, {name: tuple(tensor.shape) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class Adapter:
    """An adapter of any format.

    Attributes:
        modules: the transformer's layers, by diffusers' names, and what is added to each.
        family: which program's format it was, for a person.
        unknown: keys of the file that belong to no layer of an ACE-Step 1.5 transformer.
        config: PEFT's configuration that came with it (from `adapter_config.json` or the file's metadata), or {}.
        metadata: the file's own metadata.
        path: the file, if it was one.
    """

    modules: dict[str, ModuleWeights]
    family: str = "a state dict"
    unknown: tuple[str, ...] = ()
    config: dict = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def kinds(self) -> Counter:
        """How many layers there are of each kind; `dora` for a LoRA with magnitudes."""
        return Counter(
            "dora" if weights.kind == "lora" and MAGNITUDE in weights.tensors else weights.kind
            for weights in self.modules.values()
        )


def layer_shape(kind: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
    """(out, in) of the layer that tensors of these shapes are for; None for a side that they don't tell.

    Raises:
        ValueError: they don't belong together, or one is missing.
    """
    if kind == "lora":
        down, up = _need(shapes, "lora_A"), _need(shapes, "lora_B")
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise ValueError(f"A {list(down)} and B {list(up)} don't belong together")
        return up[0], down[1]
    if kind == "lokr":
        (a, b), (c, d) = (_factor_shape(shapes, f"lokr_{factor}") for factor in ("w1", "w2"))
        return a * c, b * d
    if kind == "loha":
        first, second = (
            _product_shape(_need(shapes, f"hada_{factor}_a"), _need(shapes, f"hada_{factor}_b"))
            for factor in ("w1", "w2")
        )
        if first != second:
            raise ValueError(f"its two products are {list(first)} and {list(second)}")
        return first
    if kind == "oft":
        _block_size(_need(shapes, "oft_R"))
        return None, None
    if kind == "diag_oft":
        blocks = _need(shapes, "oft_blocks")
        if len(blocks) != 3 or blocks[1] != blocks[2]:
            raise ValueError(f"its blocks are {list(blocks)}")
        return blocks[0] * blocks[1], None
    diff = _need(shapes, "diff")
    if len(diff) != 2:
        raise ValueError(f"its difference is {list(diff)}, not that of a linear layer")
    return diff


def lokr_rank(shapes: dict[str, tuple[int, ...]]) -> int | None:
    """The rank that a LoKr's factors show; None if both are whole."""
    for name in ("lokr_w2_b", "lokr_w1_b"):
        if name in shapes:
            return shapes[name][0]
    return None


def _need(shapes: dict[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"it is without its {name}: the file is incomplete")
    return shapes[name]


def _factor_shape(shapes: dict[str, tuple[int, ...]], factor: str) -> tuple[int, int]:
    if factor in shapes:
        if len(shapes[factor]) != 2:
            raise ValueError(f"its {factor} is {list(shapes[factor])}, not that of a linear layer")
        return shapes[factor]
    if not shapes.keys() & {f"{factor}_a", f"{factor}_b"}:
        raise ValueError(f"it is a LoKr without its {factor}: the file is incomplete")
    return _product_shape(_need(shapes, f"{factor}_a"), _need(shapes, f"{factor}_b"))


def _product_shape(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, int]:
    if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
        raise ValueError(f"{list(left)} and {list(right)} are no factors of one matrix")
    return left[0], right[1]


def _block_size(shape: tuple[int, ...]) -> int:
    """Of PEFT's OFT: n·(n−1)/2 numbers are a skew-symmetric matrix of size n."""
    size = (1 + math.isqrt(1 + 8 * shape[-1])) // 2
    if len(shape) != 2 or size * (size - 1) // 2 != shape[-1]:
        raise ValueError(f"its rotations are {list(shape)}, which is no number of skew-symmetric blocks")
    return size


def oft_block_size(weights: ModuleWeights) -> int:
    """Size of the blocks of PEFT's OFT."""
    return _block_size(tuple(weights.tensors["oft_R"].shape))
