"""What a layer's update comes to: the difference of its weight, and a LoRA that is equal to it."""

import torch
from peft.tuners.oft.layer import OFTRotationModule

from .record import MAGNITUDE, ModuleWeights, oft_block_size

# PEFT's own defaults, for a file without them (peft 0.21, OFTConfig).
_OFT_DEFAULTS = {
    "coft": False,
    "eps": 6e-5,
    "block_share": False,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
}


def needs_base(weights: ModuleWeights) -> bool:
    """Whether the difference depends on the weight that it is added to."""
    return weights.kind in ("oft", "diag_oft") or MAGNITUDE in weights.tensors


@torch.no_grad()
def delta_weight(
    weights: ModuleWeights, base: torch.Tensor | None = None, *, config: dict | None = None
) -> torch.Tensor:
    """The difference that an update makes to a layer's weight, float32 `[out, in]`.

    LoRA: scale · B·A; LoKr: scale · w1 ⊗ w2 (Kronecker); LoHa: scale · (w1_a·w1_b) ∘ (w2_a·w2_b) (by element). With
    magnitudes m, as DoRA (arXiv 2402.09353) and LyCORIS: m · (W + that) / ‖W + that‖ − W, norms of rows or columns.
    OFT: W·Rᵀ − W with R made of rotations (PEFT), or Rᵀ·W − W, times a factor for each row (LyCORIS).

    Args:
        weights: the update.
        base: W, `[out, in]`; only needed if `needs_base`.
        config: PEFT's, for its OFT.
    """
    if needs_base(weights) and base is None:
        raise ValueError("this kind of update depends on the base weight, and none was given")
    tensors = {name: tensor.float() for name, tensor in weights.tensors.items()}
    if weights.kind == "oft":
        return _rotate_input(weights, tensors["oft_R"], base.float(), config or {}) - base.float()
    if weights.kind == "diag_oft":
        return _rotate_output(weights, tensors, base.float()) - base.float()
    delta = low_rank_delta(weights.kind, tensors)
    if weights.scale != 1:
        delta = delta * weights.scale
    if MAGNITUDE not in tensors:
        return delta
    magnitude, updated = tensors[MAGNITUDE], base.float() + delta
    of_columns = magnitude.ndim == 2 and magnitude.shape[0] == 1
    if not of_columns:
        magnitude = magnitude.reshape(-1, 1)
    return magnitude * updated / torch.linalg.norm(updated, dim=0 if of_columns else 1, keepdim=True) - base.float()


def low_rank_delta(kind: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The product of the tensors, before the scale."""
    if kind == "lora":
        return tensors["lora_B"] @ tensors["lora_A"]
    if kind == "lokr":
        return torch.kron(_whole(tensors, "lokr_w1"), _whole(tensors, "lokr_w2").contiguous())
    if kind == "loha":
        return _whole(tensors, "hada_w1") * _whole(tensors, "hada_w2")
    return tensors["diff"]


def _whole(tensors: dict[str, torch.Tensor], factor: str) -> torch.Tensor:
    return tensors[factor] if factor in tensors else tensors[f"{factor}_a"] @ tensors[f"{factor}_b"]


def _rotate_input(weights: ModuleWeights, rotations: torch.Tensor, base: torch.Tensor, config: dict) -> torch.Tensor:
    options = {name: config.get(name, default) for name, default in _OFT_DEFAULTS.items()}
    size = oft_block_size(weights)
    blocks = 1 if options["block_share"] else base.shape[1] // size
    if base.shape[1] % size or rotations.shape[0] != blocks:
        raise ValueError(f"{rotations.shape[0]} blocks of {size} don't make the {base.shape[1]} inputs of the layer")
    module = OFTRotationModule(blocks, rotations.shape[1], size, base.shape[1], **options)
    module.weight.data = rotations.clone()
    return base @ module.get_weight().T


def _rotate_output(weights: ModuleWeights, tensors: dict[str, torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """Cayley transform of skew-symmetric blocks, (I + Q)·(I − Q)⁻¹, as LyCORIS' Diag-OFT has it.

    Its bound on the norm of Q is the file's alpha times the layer's outputs.
    """
    blocks = tensors["oft_blocks"]
    skew = blocks - blocks.transpose(1, 2)
    if weights.constraint > 0:
        bound = weights.constraint * base.shape[0]
        skew = skew * min(1.0, bound / (float(torch.linalg.norm(skew)) + 1e-8))
    eye = torch.eye(blocks.shape[1])
    rotation = (eye + skew) @ torch.linalg.inv(eye - skew)
    # LyCORIS multiplies by the transpose: "k n m, k n i -> k m i".
    rotated = rotation.transpose(1, 2) @ base.reshape(*blocks.shape[:2], -1)
    rotated = rotated.reshape(base.shape)
    return tensors["rescale"].reshape(-1, 1) * rotated if "rescale" in tensors else rotated


@torch.no_grad()
def as_lora(weights: ModuleWeights) -> ModuleWeights:
    """A LoRA that makes the same difference, of the lowest rank that the factors show.

    LoKr: w1 ⊗ (u·v) = (w1 ⊗ u)·(I ⊗ v), or (I ⊗ u)·(w1 ⊗ v) where w1 is wider than high. LoHa: column (i, j) of B is
    the product of columns i and j, so that the rank is squared (Khatri-Rao). Where that is more than the layer has,
    one side is the identity.

    Raises:
        ValueError: it depends on the base weight.
    """
    if needs_base(weights):
        raise ValueError("what it does depends on the base weight, which a LoRA can't hold")
    if weights.kind == "lora":
        return weights
    tensors = {name: tensor.float() for name, tensor in weights.tensors.items()}
    out_width, in_width = weights.shape
    if weights.kind == "lokr" and "lokr_w2_a" in tensors:
        w1, up, down = _whole(tensors, "lokr_w1"), tensors["lokr_w2_a"], tensors["lokr_w2_b"]
        if w1.shape[1] <= w1.shape[0]:
            b, a = torch.kron(w1, up), torch.kron(torch.eye(w1.shape[1]), down)
        else:
            b, a = torch.kron(torch.eye(w1.shape[0]), up), torch.kron(w1, down)
    elif weights.kind == "loha":
        b = torch.einsum("oi,oj->oij", tensors["hada_w1_a"], tensors["hada_w2_a"]).flatten(1)
        a = torch.einsum("in,jn->ijn", tensors["hada_w1_b"], tensors["hada_w2_b"]).flatten(0, 1)
    else:
        b = a = None
    if a is None or a.shape[0] > min(out_width, in_width):
        delta = low_rank_delta(weights.kind, tensors)
        b, a = (torch.eye(out_width), delta) if out_width <= in_width else (delta, torch.eye(in_width))
    rank = a.shape[0]
    return ModuleWeights("lora", {"lora_A": a, "lora_B": b}, rank, weights.scale * rank)
