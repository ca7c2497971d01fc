"""PEFT's configurations for adapters in the record: what its layers need to know to hold them."""

from collections import Counter
from collections.abc import Callable, Iterable

from peft.tuners.lokr.layer import factorization

from .record import MAGNITUDE, Adapter, ModuleWeights, lokr_rank


def lora_config(adapter: Adapter, rename: Callable[[str], str] = str) -> dict:
    """Arguments of `LoraConfig` for an adapter of LoRAs or DoRAs alone; `rename` spells the layers' names.

    Raises:
        ValueError: only some of its layers have magnitudes, which PEFT has for all or none.
    """
    modules = adapter.modules
    with_magnitude = [name for name, weights in modules.items() if MAGNITUDE in weights.tensors]
    if len(with_magnitude) not in (0, len(modules)):
        raise ValueError(f"only {len(with_magnitude)} of its {len(modules)} layers are DoRA")
    rank_stabilised = all(weights.rank_stabilised for weights in modules.values())
    alphas = {
        name: weights.alpha if weights.rank_stabilised == rank_stabilised else weights.scale * weights.rank
        for name, weights in modules.items()
    }
    return {
        **_ranks_and_alphas({name: weights.rank for name, weights in modules.items()}, alphas, rename, "lora_alpha"),
        "target_modules": _targets(adapter, rename),
        "use_dora": bool(with_magnitude),
        "use_rslora": rank_stabilised,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def loha_config(adapter: Adapter, rename: Callable[[str], str] = str) -> dict:
    """Arguments of `LoHaConfig` for an adapter of LoHas alone."""
    ranks = {name: weights.rank for name, weights in adapter.modules.items()}
    alphas = {name: weights.alpha for name, weights in adapter.modules.items()}
    return {**_ranks_and_alphas(ranks, alphas, rename, "alpha"), "target_modules": _targets(adapter, rename)}


def lokr_config(adapter: Adapter, rename: Callable[[str], str] = str) -> dict | None:
    """Arguments of `LoKrConfig` that make PEFT create factors of exactly these shapes; None if none do.

    PEFT factorises every layer by one rule, and decides by the rank whether a factor is whole: w2 from half its larger
    side, w1 too with `decompose_both` (peft 0.21, `LoKrLayer.update_layer`).
    """
    shapes = {
        name: {part: tuple(tensor.shape) for part, tensor in weights.tensors.items()}
        for name, weights in adapter.modules.items()
    }
    decompose_both = any("lokr_w1_a" in parts for parts in shapes.values())
    factors = {name: _factor_shapes(parts) for name, parts in shapes.items()}
    ranks = {name: _creating_rank(adapter.modules[name], shapes[name], factors[name]) for name in shapes}
    for name, ((a, b), (c, d)) in factors.items():
        whole = (not (decompose_both and ranks[name] < max(a, b) / 2), not ranks[name] < max(c, d) / 2)
        if whole != ("lokr_w1" in shapes[name], "lokr_w2" in shapes[name]):
            return None
    for factor in (-1, *sorted({first[0] for first, _ in factors.values()})):
        if all(
            factorization(a * c, factor) == (a, c) and factorization(b * d, factor) == (b, d)
            for (a, b), (c, d) in factors.values()
        ):
            alphas = {name: weights.scale * ranks[name] for name, weights in adapter.modules.items()}
            for name, weights in adapter.modules.items():
                if ranks[name] == weights.rank:
                    alphas[name] = weights.alpha
            return {
                **_ranks_and_alphas(ranks, alphas, rename, "alpha"),
                "target_modules": _targets(adapter, rename),
                "decompose_both": decompose_both,
                "decompose_factor": factor,
            }
    return None


def _factor_shapes(parts: dict[str, tuple[int, ...]]) -> tuple[tuple[int, int], tuple[int, int]]:
    return tuple(
        parts[factor] if factor in parts else (parts[f"{factor}_a"][0], parts[f"{factor}_b"][1])
        for factor in ("lokr_w1", "lokr_w2")
    )


def _creating_rank(weights: ModuleWeights, parts: dict[str, tuple[int, ...]], factors: tuple) -> int:
    """The rank to ask PEFT for: the factors' own, or for whole ones the one that came with them if it makes them."""
    rank = lokr_rank(parts)
    if rank is not None:
        return rank
    return weights.rank if weights.rank >= max(factors[1]) / 2 else max(factors[1])


def _ranks_and_alphas(
    ranks: dict[str, int], alphas: dict[str, float], rename: Callable[[str], str], alpha_name: str
) -> dict:
    """The commonest rank and alpha, and the layers' whose own are others."""
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "r": rank,
        alpha_name: alpha,
        "rank_pattern": {rename(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {rename(name): value for name, value in alphas.items() if value != alpha},
    }


def most_common(values: Iterable) -> float:
    """The value that occurs most often, the first of equals."""
    return Counter(values).most_common(1)[0][0]


def _targets(adapter: Adapter, rename: Callable[[str], str]) -> list[str]:
    """The adapted layers' whole names, so that no other layer is taken for one."""
    return sorted(rename(name) for name in adapter.modules)
