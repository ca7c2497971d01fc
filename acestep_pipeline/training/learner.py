"""The model in training, and what changes its adapter."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from ..data.batching import EpochPlanner
from .ema import AdapterAverage
from .health import NanGuard
from .optimization import averaged_weights, current_learning_rate
from .parallelism import Parallelism


@dataclass(frozen=True)
class Learner:
    """`transformer` is the model as it was loaded, `model` what is called: the same, or what DDP, FSDP2 or DeepSpeed
    made of it. `parameters` are the adapter's."""

    parallel: Parallelism
    transformer: torch.nn.Module
    model: torch.nn.Module
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    average: AdapterAverage
    nan_guard: NanGuard

    @property
    def accelerator(self) -> Accelerator:
        """The one that the processes share the model by."""
        return self.parallel.accelerator

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The adapter is meanwhile as it is to be used: averaged, where the optimizer or `--ema_decay` averages it."""
        with averaged_weights(self.optimizer), self.average.applied():
            yield

    def state(self) -> dict:
        """Its part of a checkpoint, as `checkpointing.save_checkpoint` takes it."""
        return {
            "transformer": self.transformer,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "scaler": self.nan_guard.scaler,
            "ema": self.average,
            "nan_guard": self.nan_guard,
        }

    def step(self, loss: float, losses: list, *, update: int, output_dir: Path) -> dict[str, float | bool]:
        """Let an update's gradients change the adapter, unless they are NaN or infinite; call it on every process.

        Args:
            loss: the update's, of all processes.
            losses: of each pass of this process, as `NanGuard.report` names them.
            update: its number.
            output_dir: where checkpoints are.

        Returns:
            `loss`, `grad_norm` before clipping and `lr`; `left_out` where the adapter is unchanged.

        Raises:
            RunError: it is the last broken update in a row that is put up with.
        """
        grad_norm = self.parallel.finish_gradients(self.parameters)
        values = {"loss": loss, "grad_norm": grad_norm, "lr": current_learning_rate(self.optimizer)}
        if self.nan_guard.refuses(loss, grad_norm):
            self.nan_guard.report(self.accelerator, losses, update=update, output_dir=output_dir)
            values["left_out"] = True
        else:
            self.optimizer.step()
            if not self.accelerator.optimizer_step_was_skipped:
                self.lr_scheduler.step()
                self.average.update()
        self.optimizer.zero_grad()
        return values

    def give_way(self, planner: EpochPlanner, update: list) -> int:
        """Forget the gradients of an update that did not fit into memory, and have it divided anew.

        Returns:
            How many frames a forward pass of several windows has from now on.
        """
        self.optimizer.zero_grad()
        frames = planner.halve(update)
        clear_device_cache(garbage_collection=True)
        return frames
