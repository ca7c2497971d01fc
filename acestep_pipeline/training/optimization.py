"""Optimizer and learning-rate schedule, both counted in optimizer updates."""

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator

import torch
import torch.distributed
from diffusers.optimization import get_scheduler

from .optimizers import OPTIMIZERS


def build_optimizer(
    parameters: list[torch.nn.Parameter],
    *,
    optimizer: str,
    learning_rate: float,
    adam_beta1: float,
    adam_beta2: float,
    adam_weight_decay: float,
    adam_epsilon: float,
    warmup_steps: int = 0,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer of `optimizers.OPTIMIZERS` over the adapter's float32 parameters.

    Weight decay pulls towards zero. For the matrices of an adapter that is the base model; for a vector (DoRA's
    magnitudes, which start as the norms of the frozen weights) it is no model at all: vectors are not decayed.

    Args:
        warmup_steps: for a schedule-free optimizer, which does this itself.
        fused: run AdamW's update as one kernel: for parameters on CUDA without a gradient scaler (which would not
            learn that the kernel skipped an update).
    """
    kind = OPTIMIZERS[optimizer]
    module, name = kind.constructor.rsplit(".", 1)
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    options = dict(kind.options)
    if kind.averages:
        options["warmup_steps"] = warmup_steps
    if kind.fused and fused:
        options["fused"] = True
    with contextlib.redirect_stdout(io.StringIO()):  # Prodigy prints that it decays weights
        built = getattr(importlib.import_module(module), name)(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            betas=(adam_beta1, adam_beta2),
            weight_decay=adam_weight_decay,
            eps=adam_epsilon,
            **options,
        )
    if kind.averages:
        built.train()
    return built


@contextlib.contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the parameters are those to evaluate and save; afterwards, those to go on training with, to the bit.

    They differ for a schedule-free optimizer alone.
    """
    while hasattr(optimizer, "optimizer"):  # what Accelerate wrapped
        optimizer = optimizer.optimizer
    averages = hasattr(optimizer, "eval")
    if averages:
        optimizer.eval()
    try:
        yield
    finally:
        if averages:
            optimizer.train()


def current_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate of the coming update: with Prodigy's estimate of the distance, with a schedule-free warm-up."""
    group = optimizer.param_groups[0]
    warmup = group.get("warmup_steps", 0)
    return group["lr"] * group.get("d", 1.0) * (min(1.0, (group["k"] + 1) / warmup) if warmup else 1.0)


def default_warmup_steps(num_updates: int) -> int:
    """Five in a hundred updates, at most 100: enough for Adam's second moment, none of a five-update smoke run."""
    return min(100, num_updates // 20)


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    lr_scheduler: str,
    lr_warmup_steps: int,
    num_updates: int,
    lr_num_cycles: int = 1,
    lr_power: float = 1.0,
) -> torch.optim.lr_scheduler.LRScheduler:
    """diffusers' schedule of that name; step it once an optimizer update.

    A schedule-free optimizer does the warm-up itself: for it the schedule is constant.
    """
    if lr_warmup_steps >= num_updates and lr_scheduler != "constant":
        warnings.warn(
            f"--lr_warmup_steps {lr_warmup_steps} is no less than the run's {num_updates} updates: its learning rate "
            "never reaches --learning_rate",
            stacklevel=2,
        )
    return get_scheduler(
        "constant" if hasattr(optimizer, "eval") else lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=lr_warmup_steps,
        num_training_steps=num_updates,
        num_cycles=lr_num_cycles,
        power=lr_power,
    )


@torch.no_grad()
def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over all processes, in one message; a process that had no item adds zeros."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    torch.distributed.all_reduce(flat)
    parts = flat.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad.copy_(part.view_as(parameter))
