"""Three ways to train the same DiT on the same windows, for `training_speed.py` to compare.

Each way is a generator that ends an optimizer update at every `yield`:

- `ours`: the steps of `train_ace_step_lora.py`'s loop, with the package's functions, on a latent cache on disk;
- `ours_dense`: the same with diffusers' own attention, and its dense masks;
- `compiled`: ours with the blocks compiled, as `--torch_compile` does it;
- `one_by_one`, `padded`, `plain_optimizer`, `waiting`, `not_read_ahead`: ours without one trick each (`Tricks`);
- `checkpointed`, `half_checkpointed`: ours with all blocks, or half of them, computed again;
- `bare`: forward, backward, clip and AdamW on batches that lie in memory, written down without a package;
- `peers`: as other trainers of this model do it: one window in a forward pass, four of them accumulated, conditions
  padded to ~770 tokens that are attended to, a dense additive mask in every attention, AdamW in plain loops.
"""

import contextlib
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.condition_mask import ConditionMask
from acestep_pipeline.data import batching
from acestep_pipeline.data.cache_files import write_cache_file
from acestep_pipeline.data.draws import DrawSettings
from acestep_pipeline.data.latent_cache import CachedTrack, Window
from acestep_pipeline.estimation.memory_use import inspect_adapter
from acestep_pipeline.hardware import default_device
from acestep_pipeline.masked_attention import use_masked_attention
from acestep_pipeline.presets import load_preset
from acestep_pipeline.prompt_fields import PromptFields
from acestep_pipeline.training import optimization, setup
from acestep_pipeline.training.compilation import CompiledBlocks, relative_difference
from acestep_pipeline.training.health import NanGuard
from acestep_pipeline.training.interruption import Interruption
from acestep_pipeline.training.memory import enable_gradient_checkpointing
from acestep_pipeline.training.parallelism import choose_parallelism
from acestep_pipeline.training.tracking import MetricsFile
from benchmarks.random_models import condition_width, random_transformer
from train_ace_step_lora import squared_error

FRAMES_PER_SECOND = 25
NUM_TRACKS = 16
# Text padded to 256 tokens, lyrics to 512, one or two of timbre.
PADDED_TOKENS = 770
PRESET = load_preset("c")
PHASES = ("data", "forward", "backward", "optimizer", "other")


@dataclass(frozen=True)
class Case:
    """What is trained: a model, on so many windows of one length an update, of tracks whose condition tokens are
    spread evenly, in their logarithm, from the least to the most; and the share of checkpointed blocks."""

    size: str = "2b"
    seconds: int = 60
    least_tokens: int = 30
    most_tokens: int = 400
    checkpointing: float = 0.0
    windows: int = PRESET["effective_batch_size"]

    def tokens(self) -> list[int]:
        """Condition tokens of each track."""
        ratio = self.most_tokens / self.least_tokens
        return [round(self.least_tokens * ratio ** (index / (NUM_TRACKS - 1))) for index in range(NUM_TRACKS)]


@dataclass(frozen=True)
class Tricks:
    """What the script's loop does, each of which a way may leave out: all windows of an update in one pass; conditions
    no longer than the batch's longest; one call of AdamW for all parameters (foreach, on CUDA fused); no waiting for
    the device within an update; batches read ahead; and with `compiled`, blocks as compiled code."""

    one_pass: bool = True
    trimmed: bool = True
    joint_optimizer: bool = True
    no_waiting: bool = True
    read_ahead: bool = True
    compiled: bool = False


# What a way leaves out of ours, or adds to it; and the share of blocks that it checkpoints, if not the case's.
TRICKS = {
    "one_by_one": Tricks(one_pass=False),
    "padded": Tricks(trimmed=False),
    "plain_optimizer": Tricks(joint_optimizer=False),
    "waiting": Tricks(no_waiting=False),
    "not_read_ahead": Tricks(read_ahead=False),
    "compiled": Tricks(compiled=True),
}
RATIOS = {"checkpointed": 1.0, "half_checkpointed": 0.5}


class PhaseClock:
    """Adds up the seconds of the phases of an update. While it is off it does nothing; while it is on, the device
    finishes each phase before the next begins."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on, self.seconds = device, False, dict.fromkeys(PHASES, 0.0)

    def ended(self, phase: str) -> None:
        """`phase` has ended, and the next begins."""
        if self.on:
            synchronize(self.device)
            now = time.perf_counter()
            self.seconds[phase] += now - self._since
            self._since = now

    def start(self) -> None:
        """Switch it on, from here."""
        synchronize(self.device)
        self.on, self._since = True, time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def write_tracks(case: Case, width: int, folder: Path, dtype: torch.dtype) -> list[CachedTrack]:
    """A latent cache of random tracks, as the package writes it."""
    generator = torch.Generator().manual_seed(0)
    frames, tracks = case.seconds * FRAMES_PER_SECOND, []
    for number, tokens in enumerate(case.tokens()):
        latents, condition = folder / f"latents-{number}.safetensors", folder / f"condition-{number}.safetensors"
        mean = torch.randn(frames, 64, generator=generator)
        write_cache_file(latents, {"mean": mean, "std": 0.1 + torch.rand(frames, 64, generator=generator)}, {})
        states = torch.randn(tokens, width, generator=generator).to(dtype)
        write_cache_file(condition, {"encoder_hidden_states": states}, {})
        window = Window(0, PromptFields(prompt="random", audio_duration=float(case.seconds)), condition, tokens)
        tracks.append(CachedTrack(str(number), latents, frames, frames, (window,)))
    return tracks


class Bench:
    """A DiT with preset c's adapter, tracks in a cache, and the ways to train the one on the other."""

    def __init__(self, case: Case, folder: Path) -> None:
        """Build all of it; the precision is the preset's on a GPU and float32 on a CPU."""
        AcceleratorState._reset_state(reset_partial_state=True)
        self.case, self.folder = case, folder
        on_cpu = default_device().type == "cpu"
        self.accelerator = setup.build_accelerator(
            mixed_precision="no" if on_cpu else PRESET["mixed_precision"],
            report_to="none",
            output_dir=folder,
            logging_dir="logs",
            allow_tf32=True,
        )
        self.device = self.accelerator.device
        self.dtype = setup.WEIGHT_DTYPES[self.accelerator.mixed_precision]
        torch.manual_seed(0)
        self.transformer = random_transformer(case.size, device=self.device, dtype=self.dtype)
        settings = LoraSettings(
            r=PRESET["rank"], lora_alpha=float(PRESET["lora_alpha"]), lora_dropout=PRESET["lora_dropout"]
        )
        self.parameters = add_lora(self.transformer, settings, seed=0)
        for parameter in self.parameters:  # the upper matrices start as zeros, and zeros are no input to time
            parameter.detach().normal_(std=0.02)
        attentions = [module for layer in self.transformer.layers for module in (layer.self_attn, layer.cross_attn)]
        self.dense_processors = {module: module.processor for module in attentions}
        use_masked_attention(self.transformer)
        self.our_processors = {module: module.processor for module in attentions}
        self.adapter = inspect_adapter(self.transformer, dropout=PRESET["lora_dropout"])
        blocks = self.transformer.layers
        # The share of checkpointed blocks, and whether they are compiled -> how each computes.
        self.forwards = {(0.0, False): [block.forward for block in blocks]}
        self.compiled = CompiledBlocks(self.transformer)
        self.forwards[0.0, True] = [block.forward for block in blocks]
        for ratio in {case.checkpointing, 0.5, 1.0} - {0.0}:
            for compiled in (False, True):
                self.use_blocks(0.0, compiled=compiled)
                enable_gradient_checkpointing(self.transformer, ratio)
                self.forwards[ratio, compiled] = [block.forward for block in blocks]
        self.use_blocks(case.checkpointing, compiled=False)
        self.transformer.train()
        width = condition_width(self.transformer)
        self.condition_mask = ConditionMask(self.transformer)
        self.silence_latent = torch.randn(1, 15000, 64, device=self.device)
        self.null_condition_emb = torch.randn(1, 1, width, device=self.device, dtype=self.dtype)
        self.tracks = write_tracks(case, width, folder, self.dtype)
        self.effective_batch_size = case.windows
        self.loader, self.bucketed_loader = (
            batching.BatchLoader(
                self.tracks,
                DrawSettings(seed=42, cfg_dropout=0.15, items_per_update=self.effective_batch_size),
                pin_memory=self.device.type == "cuda",
                bucket_conditions=bucketed,
            )
            for bucketed in (False, True)
        )
        self.bare_forward = self.transformer.forward  # which Accelerate wraps
        self.model = self.accelerator.prepare_model(self.transformer)
        self.clock = PhaseClock(self.device)

    def use_blocks(self, ratio: float, *, compiled: bool) -> None:
        """Let the blocks compute as `forwards` has it."""
        for block, forward in zip(self.transformer.layers, self.forwards[ratio, compiled], strict=True):
            block.forward = forward

    def planner(self, micro_batch_size: int) -> batching.EpochPlanner:
        """The updates of a run with so many windows in a forward pass."""
        return batching.EpochPlanner(
            self.tracks,
            seed=42,
            effective_batch_size=self.effective_batch_size,
            micro_batch_size=micro_batch_size,
        )

    def optimizer(self, **options) -> torch.optim.AdamW:
        """AdamW with the preset's rate, as one writes it down."""
        return torch.optim.AdamW(self.parameters, lr=PRESET["learning_rate"], **options)

    def loss(self, model: Callable, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The script's sum of squared errors over a batch."""
        return squared_error(model, batch, self.condition_mask, self.silence_latent, self.null_condition_emb)

    def in_memory(self, micro_batch_size: int) -> list[list[dict[str, torch.Tensor]]]:
        """The batches of an epoch's updates, on the device."""
        return [
            [{name: tensor.to(self.device) for name, tensor in self.loader.load(micro).items()} for micro in update[0]]
            for update in self.planner(micro_batch_size).plan(0)
        ]

    def elements(self, num_items: int) -> int:
        """Numbers in the latents of so many windows."""
        return num_items * self.case.seconds * FRAMES_PER_SECOND * 64

    # ---------------------------------------------------------------------------------------------------- the ways
    def bare(self) -> Iterator[None]:
        """Forward, backward, clip, AdamW, on batches of four windows in memory."""
        optimizer = self.optimizer()
        return self._plain_loop(optimizer, itertools.cycle(self.in_memory(self.effective_batch_size)))

    def peers(self) -> Iterator[None]:
        """Windows one by one, padded conditions, AdamW in plain loops."""
        updates = self.in_memory(1)
        for batch in itertools.chain.from_iterable(updates):
            states = batch["encoder_hidden_states"]
            missing = PADDED_TOKENS - states.shape[1]
            batch["encoder_hidden_states"] = torch.nn.functional.pad(states, (0, 0, 0, missing))
        return self._plain_loop(self.optimizer(foreach=False, fused=False), itertools.cycle(updates))

    def _plain_loop(self, optimizer: torch.optim.Optimizer, updates: Iterator) -> Iterator[None]:
        autocast = functools.partial(
            torch.autocast, self.device.type, self.dtype, enabled=self.dtype is not torch.float32
        )
        elements = self.elements(self.effective_batch_size)
        for batches in updates:
            for batch in batches:
                with autocast():
                    loss = self.loss(self.bare_forward, batch) / elements
                self.clock.ended("forward")
                loss.backward()
                self.clock.ended("backward")
            torch.nn.utils.clip_grad_norm_(self.parameters, PRESET["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
            self.clock.ended("optimizer")
            yield

    def ours(self, tricks: Tricks = Tricks()) -> Iterator[None]:
        """The loop of the script: data read ahead from the cache, NaN guard, schedule, metrics and all."""
        parallel = choose_parallelism(self.accelerator, max_grad_norm=PRESET["max_grad_norm"])
        optimizer = optimization.build_optimizer(
            self.parameters, optimizer="adamw", learning_rate=PRESET["learning_rate"], adam_beta1=0.9,
            adam_beta2=0.999, adam_weight_decay=1e-2, adam_epsilon=1e-8,
            fused=self.device.type == "cuda" and tricks.joint_optimizer,
        )  # fmt: skip
        if not tricks.joint_optimizer:
            for group in optimizer.param_groups:
                group["foreach"] = False
        lr_scheduler = optimization.build_lr_scheduler(
            optimizer, lr_scheduler=PRESET["lr_scheduler"], lr_warmup_steps=100, num_updates=10**6
        )
        optimizer = self.accelerator.prepare_optimizer(optimizer)
        guard, interruption = NanGuard(stops=True, scaler=None), Interruption()
        metrics = MetricsFile(Path(tempfile.mkdtemp(dir=self.folder)), first_update=0)
        planner = self.planner(self.effective_batch_size if tricks.one_pass else 1)
        loader = self.bucketed_loader if tricks.compiled else self.loader
        if tricks.compiled:
            self.compiled.compile_common(
                planner, loader, forward=functools.partial(self.loss, self.model), parameters=self.parameters,
                precision=self.dtype, device=self.device,
            )  # fmt: skip
        plans, ahead = itertools.tee(planner.plans_from(0, 10**6))
        micro_batches = (micro for update in ahead for micro in update[0])
        batches = loader.stream(micro_batches, num_workers=int(tricks.read_ahead))
        with contextlib.closing(batches), contextlib.closing(metrics):
            try:
                for done, update in enumerate(plans):
                    own = batches if tricks.trimmed else map(pad_to_most, batches)
                    line = self._our_update(update[0], own, parallel, interruption, tricks)
                    if not guard.refuses(line["loss"], line["grad_norm"]):
                        optimizer.step()
                        lr_scheduler.step()
                    optimizer.zero_grad()
                    self.clock.ended("optimizer")
                    line["lr"] = optimization.current_learning_rate(optimizer)
                    metrics.write({"update": done + 1, **line})
                    self.clock.ended("other")
                    yield
            finally:
                interruption.release()

    def _our_update(
        self, micro_batches: list, batches: Iterator, parallel, interruption: Interruption, tricks: Tricks
    ) -> dict:
        """Forward and backward passes of an update, and what comes of them."""
        items = [item for micro in micro_batches for item in micro.items]
        update_loss = torch.zeros((), device=self.device)
        for step, micro in enumerate(micro_batches):
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in next(batches).items()}
            self.clock.ended("data")
            torch.manual_seed(batching.keyed_seed(42, "dropout", micro.update, step, 0))
            loss = self.loss(self.model, batch) * (micro.weight / self.elements(len(items)))
            if not tricks.no_waiting:
                loss.item()
            self.clock.ended("forward")
            parallel.backward(loss)
            update_loss += loss.detach()
            if not tricks.no_waiting:
                batch["sigmas"].tolist(), update_loss.item(), self.parameters[-1].grad.norm().item()
            self.clock.ended("backward")
        sums = torch.stack([update_loss, update_loss.new_tensor(False)])
        (update_loss, _), _ = interruption.agree(self.accelerator, sums)
        self.clock.ended("other")
        return {"loss": update_loss, "grad_norm": parallel.finish_gradients(self.parameters)}

    def steps(self, way: str) -> Iterator[None]:
        """The updates of a way, each to be made within its own `attention`."""
        if way in ("bare", "peers"):
            return getattr(self, way)()
        return self.ours(TRICKS.get(way, Tricks()))

    def attention(self, way: str) -> contextlib.AbstractContextManager:
        """What `way` attends and computes with, set up here; and what its updates have to be made within."""
        dense = way in ("bare", "peers", "ours_dense")
        for module, processor in (self.dense_processors if dense else self.our_processors).items():
            module.set_processor(processor)
        self.use_blocks(RATIOS.get(way, self.case.checkpointing), compiled=way == "compiled")
        return self.dense_masks() if way == "peers" else contextlib.nullcontext()

    @contextlib.contextmanager
    def no_dropout(self) -> Iterator[None]:
        """Inside, the adapter drops nothing, and afterwards its weights are what they were."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        dropouts = [module for module in self.transformer.modules() if isinstance(module, torch.nn.Dropout)]
        shares = [module.p for module in dropouts]
        try:
            for module in dropouts:
                module.p = 0.0
            yield
        finally:
            for module, share in zip(dropouts, shares, strict=True):
                module.p = share
            with torch.no_grad():
                for parameter, before in zip(self.parameters, kept, strict=True):
                    parameter.copy_(before)

    def first_step(self, way: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Without dropout: the clipped gradients of a way's first update, and the steps that its optimizer makes."""
        gradients = []

        def keep(*_) -> None:
            gradients.extend(parameter.grad.clone() for parameter in self.parameters)

        hook = register_optimizer_step_pre_hook(keep)
        try:
            with self.no_dropout(), self.attention(way), contextlib.closing(self.steps(way)) as steps:
                before = [parameter.detach().clone() for parameter in self.parameters]
                next(steps)
                return gradients, [p.detach() - b for p, b in zip(self.parameters, before, strict=True)]
        finally:
            hook.remove()

    def difference(self, way: str) -> float:
        """By how much of their norm a way's gradients differ from ours, in the first update; of another optimizer, its
        step; of compiled blocks, what was found when they were compiled."""
        if way == "compiled":
            return max(compiled.difference for compiled in self.compiled.shapes)
        kind = int(way == "plain_optimizer")
        return relative_difference(self.first_step(way)[kind], self.first_step("ours")[kind])

    @contextlib.contextmanager
    def dense_masks(self) -> Iterator[None]:
        """Inside, attentions that need no mask get a dense one of zeros, `[1, 1, queries, keys]`."""

        def add(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if kwargs.get("attention_mask") is None:
                queries, keys = kwargs["hidden_states"], kwargs.get("encoder_hidden_states")
                shape = (1, 1, queries.shape[1], (queries if keys is None else keys).shape[1])
                kwargs = kwargs | {"attention_mask": masks.setdefault(shape, queries.new_zeros(shape))}
            return args, kwargs

        masks: dict[tuple, torch.Tensor] = {}
        hooks = [module.register_forward_pre_hook(add, with_kwargs=True) for module in self.dense_processors]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def pad_to_most(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch with conditions of `PADDED_TOKENS`, the padding hidden by a mask."""
    states = batch["encoder_hidden_states"]
    items, tokens = states.shape[:2]
    mask = batch.get("condition_mask", torch.ones(items, tokens, dtype=torch.bool))
    missing = PADDED_TOKENS - tokens
    return batch | {
        "encoder_hidden_states": torch.nn.functional.pad(states, (0, 0, 0, missing)),
        "condition_mask": torch.nn.functional.pad(mask, (0, missing)),
    }


@functools.cache
def count_flops(case: Case, num_items: int, num_tokens: int) -> int:
    """Operations of one forward and backward pass as PyTorch counts them, without doing any (on the meta device):
    the plain attention algorithm, nothing computed twice."""
    model = random_transformer(case.size, device=torch.device("meta"), dtype=torch.float32)
    add_lora(model, LoraSettings(r=PRESET["rank"], lora_dropout=PRESET["lora_dropout"]), seed=0)
    frames = case.seconds * FRAMES_PER_SECOND
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.train()(
            hidden_states=torch.empty(num_items, frames, 64),
            timestep=torch.empty(num_items),
            timestep_r=torch.empty(num_items),
            encoder_hidden_states=torch.empty(num_items, num_tokens, condition_width(model)),
            context_latents=torch.empty(num_items, frames, 128),
        ).sample.square().sum().backward()
    return counter.get_total_flops()
