"""By how much an update of another way of training differs from ours, without dropout."""

import contextlib
from collections.abc import Iterator

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from acestep_pipeline.training.compilation import relative_difference
from benchmarks.training_bench import Bench
from benchmarks.training_ways import attention, steps


@contextlib.contextmanager
def no_dropout(bench: Bench) -> Iterator[None]:
    """Inside, the adapter drops nothing, and afterwards its weights are what they were."""
    kept = [parameter.detach().clone() for parameter in bench.parameters]
    dropouts = [module for module in bench.transformer.modules() if isinstance(module, torch.nn.Dropout)]
    shares = [module.p for module in dropouts]
    try:
        for module in dropouts:
            module.p = 0.0
        yield
    finally:
        for module, share in zip(dropouts, shares, strict=True):
            module.p = share
        with torch.no_grad():
            for parameter, before in zip(bench.parameters, kept, strict=True):
                parameter.copy_(before)


def first_step(bench: Bench, way: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Without dropout: the clipped gradients of a way's first update, and the steps that its optimizer makes."""
    gradients = []

    def keep(*_) -> None:
        gradients.extend(parameter.grad.clone() for parameter in bench.parameters)

    hook = register_optimizer_step_pre_hook(keep)
    try:
        with no_dropout(bench), attention(bench, way), contextlib.closing(steps(bench, way)) as updates:
            before = [parameter.detach().clone() for parameter in bench.parameters]
            next(updates)
            return gradients, [p.detach() - b for p, b in zip(bench.parameters, before, strict=True)]
    finally:
        hook.remove()


def difference(bench: Bench, way: str) -> float:
    """By how much of their norm a way's gradients differ from ours, in the first update; of another optimizer, its
    step; of compiled blocks, what was found when they were compiled."""
    if way == "compiled":
        return max(compiled.difference for compiled in bench.blocks.compiled.shapes)
    kind = int(way == "plain_optimizer")
    return relative_difference(first_step(bench, way)[kind], first_step(bench, "ours")[kind])
