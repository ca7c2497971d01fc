"""How the processes of a run share one model: DDP, FSDP2 or DeepSpeed ZeRO-2, behind the same few methods.

Whichever it is, the adapter is float32 and whole on every process, an update's gradient is the sum over processes, and
what a checkpoint holds does not depend on how its run was divided.
"""

import os
import warnings
from collections.abc import Iterable

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from accelerate.utils.memory import should_reduce_batch_size

from ..errors import RunError
from .launch import uses_deepspeed, uses_fsdp
from .offload import is_offloaded
from .optimization import sum_gradients
from .processes import COLLECTIVE_TIMEOUT
from .zero2 import WholeState


def join_processes(*, on_cpu: bool) -> torch.device:
    """Find the other processes of this run, if there are any; returns this one's device."""
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, wherever it is installed, warns of it
    if on_cpu and uses_deepspeed():
        import deepspeed

        # Its shared-memory kernels would have to be compiled first; gloo is enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Accelerate takes DeepSpeed for something of GPUs: on a CPU it has to be told the backend.
        return PartialState(backend="gloo", timeout=COLLECTIVE_TIMEOUT).device
    state = PartialState(cpu=on_cpu, timeout=COLLECTIVE_TIMEOUT)
    if uses_fsdp() and state.distributed_type is DistributedType.MULTI_CPU:
        # Accelerate reads its FSDP settings on GPUs alone, though torch divides a model over gloo just as well.
        state.distributed_type = DistributedType.MULTI_GPU
    return state.device


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """FSDP2 as the launcher was told, with what follows from this model and this program; None without FSDP."""
    if not uses_fsdp():
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["AceStepTransformerBlock"],
        mixed_precision_policy=MixedPrecisionPolicy(),  # autocast, as without FSDP
        cpu_ram_efficient_loading=False,  # it would leave the encoders of all but one process without weights
    )


def choose_parallelism(accelerator: Accelerator, *, max_grad_norm: float) -> "Parallelism":
    """The one that the launcher asks for; gradients are clipped to `max_grad_norm`."""
    kinds = {DistributedType.FSDP: FSDP2, DistributedType.DEEPSPEED: ZeRO2}
    return kinds.get(accelerator.distributed_type, Parallelism)(accelerator, max_grad_norm)


class Parallelism:
    """One process, or DDP: every process has the whole model, and works for itself until gradients are summed."""

    # Whether all processes have to run the same number of forward passes.
    lock_step = False

    def __init__(self, accelerator: Accelerator, max_grad_norm: float) -> None:
        self.accelerator = accelerator
        self.max_grad_norm = max_grad_norm

    def prepare(self, transformer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        """The model to call and the optimizer to step; the adapter's parameters stay the tensors that they are."""
        placement = [False, True] if is_offloaded(transformer) else None  # None: accelerate moves all
        return self.accelerator.prepare(transformer, optimizer, device_placement=placement)

    def can_repeat(self, error: RuntimeError) -> bool:
        """Whether `error` says that memory ran out, and the update can be divided anew."""
        return should_reduce_batch_size(error)

    def gather(self, optimizer) -> None:
        """Before one process saves a checkpoint, on all of them: bring the optimizer's state together."""

    def backward(self, loss: torch.Tensor) -> None:
        """One micro-batch's backward pass."""
        self.accelerator.backward(loss)

    def finish_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> float:
        """Sum the gradients of an update over processes and clip them; returns their norm before that."""
        sum_gradients(parameters)
        return float(self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm))


class FSDP2(Parallelism):
    """Every process holds a share of the frozen model and fetches the rest block by block.

    The adapter is left out of it: it is small, and so it is trained, saved and resumed as without FSDP.
    """

    lock_step = True

    def prepare(self, transformer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        """As without FSDP; `transformer` itself is divided, in place."""
        self.accelerator.state.fsdp_plugin.ignored_modules = [
            module
            for module in transformer.modules()
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        ]
        compute_in_autocast(transformer, self.accelerator)
        # The loss is computed out of place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        return super().prepare(transformer, optimizer)

    def can_repeat(self, error: RuntimeError) -> bool:
        """Never: the others wait for this process in the middle of a pass."""
        return refuse_to_repeat(error)


class ZeRO2(Parallelism):
    """Every process has the whole model, and a share of the adapter's gradients and of the optimizer's state."""

    lock_step = True

    def prepare(self, transformer: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        """DeepSpeed's engine, and the optimizer with a whole state to save and load."""
        compute_in_autocast(transformer, self.accelerator)
        warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed.c10d_logger")
        self.accelerator.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own statistics
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # step() ends an update, whenever it is called
            "gradient_clipping": self.max_grad_norm,
            "bf16": {"enabled": False},  # it would make the adapter bf16
        }
        engine, optimizer = super().prepare(transformer, optimizer)
        return engine, WholeState(optimizer)

    def can_repeat(self, error: RuntimeError) -> bool:
        """Never: the others wait for this process in the middle of a pass."""
        return refuse_to_repeat(error)

    def gather(self, optimizer: WholeState) -> None:
        """Bring the optimizer's state together."""
        optimizer.gather()

    def backward(self, loss: torch.Tensor) -> None:
        """One micro-batch's backward pass. DeepSpeed takes the mean over processes, of which this makes the sum."""
        # An infinite loss may have a finite gradient, which the engine would step by: NaN it leaves out.
        nothing_or_nan = torch.where(loss.isfinite(), 1.0, torch.nan)
        self._engine.backward(loss * (nothing_or_nan * self.accelerator.num_processes))

    def finish_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> float:
        """All of the update, the optimizer's step included; one that is not finite is left out. Returns the norm."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    @property
    def _engine(self):
        return self.accelerator.deepspeed_engine_wrapped.engine


def compute_in_autocast(transformer: torch.nn.Module, accelerator: Accelerator) -> None:
    """What accelerate does to a model that it wraps for mixed precision, for those that it leaves to others."""
    if accelerator.mixed_precision == "bf16":
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        transformer.forward = convert_outputs_to_fp32(autocast(transformer.forward))


def refuse_to_repeat(error: RuntimeError) -> bool:
    """False.

    Raises:
        RunError: memory ran out.
    """
    if should_reduce_batch_size(error):
        raise RunError(
            "memory ran out; where processes share one model an update can't be repeated in halves: continue with a "
            "smaller --train_batch_size or --gradient_checkpointing and --resume_from_checkpoint latest."
        ) from error
    return False
