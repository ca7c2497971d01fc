"""`--torch_compile`: the DiT's blocks as compiled code, for the shapes that most forward passes of a run have.

Blocks are alike, so that three graphs serve all of them for each shape: one for the first block, whose input needs no
gradient, one for those with a sliding window, one for the others. What is compiled is the blocks' `forward`: modules,
hooks and names of weights stay what they are.

Compiled code has been wrong without a word: torch 2.13's vectorised kernels for CPUs, where a block's input lies
transposed in memory, as the first layer leaves it (its gradient off by 1 to 6 %, the adapter's by as much), and its
kernels for CUDA in backward passes through a table of shifts and scales (github.com/pytorch/pytorch/issues/193061).
The first is kept away by a contiguous input, the second by an option; and whatever else may come, every shape's
gradients are compared with those of the plain blocks before anything is trained with it.
"""

import functools
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from ..data.batching import BatchLoader, EpochPlanner, MicroBatch
from ..errors import RunError, UsageError

# Masks of dropout are those of the plain blocks: compiled code has random numbers of its own otherwise.
OPTIONS = {"fallback_random": True, "triton.mix_order_reduction": False}
# Each shape takes a minute or so to compile: those of so many passes, of the run's first updates, are worth it.
SURVEYED_UPDATES, MAX_SHAPES, LEAST_SHARE = 200, 8, 0.02
# The most that gradients may differ from the plain blocks', as a share of their norm.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
Shape = tuple[int, int, int]  # of a forward pass: items, latent frames, condition tokens


def check_compile_hardware(device: torch.device, *, sharded: bool) -> None:
    """Raise `UsageError` if blocks can't be compiled for `device`, or if the model is `sharded` over processes."""
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--torch_compile is for CUDA and CPU, and this is {device.type}; leave it out.")
    if sharded:
        raise UsageError("--torch_compile works with one process or DDP; leave it out with FSDP and DeepSpeed.")
    if not any(map(shutil.which, ("cc", "gcc", "g++", "clang"))):
        raise UsageError(
            "--torch_compile needs a C compiler, and there is none; install gcc and g++, or leave it out."
        )


def common_passes(planner: EpochPlanner, loader: BatchLoader) -> list[tuple[MicroBatch, float]]:
    """One forward pass of each shape that is common in a run's first updates, and its share of them.

    They depend on data, seed and batch size alone, not on where a run is resumed: what is compiled is so in all of it.
    """
    passes, numbers = {}, Counter()
    for update in planner.plans_from(0, SURVEYED_UPDATES):
        for micro in (micro for process in update for micro in process):
            shape = loader.shape(micro)
            passes.setdefault(shape, micro)
            numbers[shape] += 1
    common = [(passes[shape], n / numbers.total()) for shape, n in numbers.most_common(MAX_SHAPES)]
    return [(micro, share) for micro, share in common if share >= LEAST_SHARE]


@dataclass(frozen=True)
class Compiled:
    """What compiling a shape took, in seconds with the first forward and backward pass, and how far its gradients are
    from the plain blocks', as a share of their norm."""

    shape: Shape
    share: float
    seconds: float
    difference: float


def compiled_graphs() -> int:
    """How many graphs this process has compiled."""
    return counters["stats"]["unique_graphs"]


class CompiledBlocks:
    """The blocks of an `AceStepTransformer1DModel`, compiled for the shapes of `compile`.

    Passes of other shapes, and all that need no gradients (validation), run as without it. Make it before blocks are
    checkpointed: what is computed again is then the same compiled code.
    """

    def __init__(self, transformer: torch.nn.Module, *, backend: str = "inductor") -> None:
        self.shapes: list[Compiled] = []
        self.too_large: list[Shape] = []  # what memory did not suffice for; it runs as it is, if it can
        self._signatures: set[tuple[int, ...]] = set()
        self._compiling, self._plain = False, False
        self._num_blocks = len(transformer.layers)
        self._graphs: int | None = None
        options = OPTIONS if backend == "inductor" else None
        for block in transformer.layers:
            compiled = torch.compile(block.forward, backend=backend, options=options, dynamic=False, fullgraph=True)
            block.forward = functools.partial(self._forward, block.forward, compiled)

    def _forward(self, plain: Callable, compiled: Callable, hidden_states: torch.Tensor, **inputs) -> torch.Tensor:
        signature = (*hidden_states.shape, *inputs["encoder_hidden_states"].shape)
        if self._compiling:
            self._signatures.add(signature)
        if self._plain or signature not in self._signatures or not torch.is_grad_enabled():
            return plain(hidden_states.contiguous(), **inputs)
        return compiled(hidden_states.contiguous(), **inputs)

    @property
    def num_recompilations(self) -> int:
        """Graphs that had to be compiled outside of `compile`: 0, or something is wrong."""
        return 0 if self._graphs is None else compiled_graphs() - self._graphs

    def compile_common(self, planner: EpochPlanner, loader: BatchLoader, *, device: torch.device, **options) -> None:
        """`compile` for `common_passes`, with its other arguments."""
        passes = [
            (loader.shape(micro), {name: tensor.to(device) for name, tensor in loader.load(micro).items()}, share)
            for micro, share in common_passes(planner, loader)
        ]
        self.compile(passes, **options)

    def compile(
        self,
        passes: Sequence[tuple[Shape, dict[str, torch.Tensor], float]],
        *,
        forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        parameters: list[torch.nn.Parameter],
        precision: torch.dtype,
    ) -> None:
        """Compile each shape, and no others that were compiled before, and compare gradients. No `.grad` is touched.

        Args:
            passes: of each shape, one batch of `BatchLoader.load` on the device, and its share of all passes.
            forward: from a batch to its summed squared error, through the blocks.
            parameters: of the adapter.
            precision: that of the forward pass.

        Raises:
            RunError: blocks can't be compiled, or compiled ones compute something else.
        """
        self.shapes, self.too_large, self._signatures = [], [], set()
        again = self.num_recompilations
        limit = 4 * self._num_blocks * MAX_SHAPES
        with torch._dynamo.config.patch(
            recompile_limit=limit, accumulated_recompile_limit=limit * self._num_blocks, optimize_ddp=False
        ):
            for shape, batch, share in passes:
                found = self._compile_one(batch, forward, parameters, TOLERANCE[precision])
                if found is None:
                    self.too_large.append(shape)
                else:
                    self.shapes.append(Compiled(shape, share, *found))
        self._graphs = compiled_graphs() - again

    def _compile_one(
        self, batch: dict, forward: Callable, parameters: list, tolerance: float
    ) -> tuple[float, float] | None:
        """Seconds and difference; None if memory did not suffice: what was not compared is not trained with."""
        known = set(self._signatures)

        def gradients(*, plain: bool) -> list[torch.Tensor]:
            self._plain, self._compiling = plain, not plain
            try:
                torch.manual_seed(0)
                error = forward(batch) / batch["latents"].numel()
                found = torch.autograd.grad(error, parameters, allow_unused=True)
            finally:
                self._plain = self._compiling = False
            return [gradient for gradient in found if gradient is not None]

        try:
            expected = gradients(plain=True)
            start = time.perf_counter()
            found = gradients(plain=False)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise RunError(f"the blocks can't be compiled here ({reason}); leave --torch_compile out.") from error
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            self._signatures = known
            return None
        difference = relative_difference(found, expected)
        taken = time.perf_counter() - start
        if not difference <= tolerance and all(gradient.isfinite().all() for gradient in expected):
            raise RunError(
                f"compiled blocks give other gradients here than plain ones (by {difference:.1g} of their norm, "
                f"{tolerance:g} at most is rounding); leave --torch_compile out."
            )
        return taken, difference

    def describe(self, frames_per_second: float) -> str:
        """What was compiled, for a person."""
        if not self.shapes:
            reason = "memory did not suffice" if self.too_large else "no shape of forward passes is common enough"
            return f"Compiled nothing: {reason}, so all run as they are."
        named = ", ".join(
            f"{items} × {frames / frames_per_second:g} s with {tokens} condition tokens"
            for items, frames, tokens in (compiled.shape for compiled in self.shapes)
        )
        seconds, share = sum(c.seconds for c in self.shapes), sum(c.share for c in self.shapes)
        worst = max(c.difference for c in self.shapes)
        return (
            f"Compiled {len(self.shapes)} shapes of forward passes in {seconds:.0f} s ({named}): {share:.0%} of all; "
            f"others run as they are. Gradients are those of plain blocks but for {worst:.1g} of their norm."
        )

    def rows(self) -> list[tuple[str, str]]:
        """For the model card's table: what was compiled, and how often again."""
        seconds = sum(compiled.seconds for compiled in self.shapes)
        again = f"{self.num_recompilations} recompilations"
        return [("compiled", f"{len(self.shapes)} shapes of forward passes in {seconds:.0f} s, {again}")]


def relative_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The norm of what differs over the norm of what was expected, over all tensors; waits for the device."""
    differs = torch.stack([(one - other).float().square().sum() for one, other in zip(found, expected, strict=True)])
    norm = torch.stack([gradient.float().square().sum() for gradient in expected]).sum()
    return float((differs.sum() / norm.clamp(min=torch.finfo(norm.dtype).tiny)).sqrt())
