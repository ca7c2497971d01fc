"""Optimizer and learning-rate schedule, both counted in optimizer updates."""

import torch
from diffusers.optimization import get_scheduler


def build_optimizer(
    parameters: list[torch.nn.Parameter],
    *,
    learning_rate: float,
    adam_beta1: float,
    adam_beta2: float,
    adam_weight_decay: float,
    adam_epsilon: float,
) -> torch.optim.Optimizer:
    """AdamW over the adapter's float32 parameters."""
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=(adam_beta1, adam_beta2),
        weight_decay=adam_weight_decay,
        eps=adam_epsilon,
    )


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
    """diffusers' schedule of that name; step it once an optimizer update."""
    return get_scheduler(
        lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=lr_warmup_steps,
        num_training_steps=num_updates,
        num_cycles=lr_num_cycles,
        power=lr_power,
    )
