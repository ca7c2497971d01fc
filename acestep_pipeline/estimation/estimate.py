"""`acestep-lora estimate`: peak memory and time of a training, from its flags, its data and a GPU's name."""

import argparse
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..adapters.trainable import add_lora
from ..conditioning import MAX_LYRIC_TOKENS, MAX_TEXT_TOKENS
from ..data.batching import EpochPlanner, MicroBatch
from ..data.held_out import load_train_and_held_out
from ..data.latent_cache import CachedTrack, crop_frames, plan_windows
from ..data.tracks import Track
from ..errors import UsageError
from ..training.batch_size import choose_batch_size
from ..training.memory import samples_one_by_one
from ..training.optimizers import OPTIMIZERS
from ..training.settings import lora_settings, validation_steps
from .compute_time import (
    CONVOLUTION_EFFICIENCY,
    host_seconds,
    move_seconds,
    pass_seconds,
    pass_work,
    update_bytes,
)
from .gpus import Gpu
from .memory_use import (
    CUDA_CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    Adapter,
    Batch,
    Precision,
    inspect_adapter,
    moving_bytes,
    predict_update,
)
from .model_shapes import ModelShape, num_parameters
from .other_phases import encoder_parameters, encoding_bytes, samples_bytes

FRAMES_PER_SECOND = 25
# A driver and a desktop keep some of a GPU's nominal memory to themselves.
USABLE_MEMORY = 0.95
# The prompt's template, and characters that Qwen3's tokenizer puts in one token of English text.
TEMPLATE_TOKENS = 70
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Estimate:
    """What a training takes on one GPU.

    Attributes:
        update: bytes at the peak of an update, by part; `encoding` and `samples`: of the phases before and after.
        batch: the largest forward pass.
        update_s, transfer_s: seconds of an update (the mean), and of all blocks' way from the host (`--offload`).
        validation_s, encoding_s: seconds of all validations, and of encoding the data.
    """

    update: dict[str, int]
    encoding: int
    samples: int
    num_parameters: int
    adapter_parameters: int
    batch: Batch
    bfloat16: bool
    num_updates: int
    update_s: float
    transfer_s: float
    validation_s: float
    encoding_s: float

    @property
    def peak(self) -> int:
        """Bytes of the phase that takes most."""
        return max(sum(self.update.values()), self.encoding, self.samples)


def read_tracks(data: str, args: argparse.Namespace) -> tuple[list[Track], list[Track]]:
    """The tracks that training would use, from their headers and texts, and those that it would hold out.

    Raises:
        UsageError: there are none.
    """
    train, held_out, _ = load_train_and_held_out(
        data,
        dataset_name=None,
        validation_data_dir=args.validation_data_dir,
        validation_fraction=args.validation_fraction,
        max_validation_samples=args.max_validation_samples,
        validation_seed=args.validation_seed,
        min_duration_s=args.min_duration_s,
        max_train_samples=args.max_train_samples,
        seed=args.seed,
        streaming=args.streaming,
    )
    return train, held_out


def condition_tokens(track: Track) -> int:
    """About how many tokens a track's condition has: text, lyrics and one of timbre."""
    text = min(MAX_TEXT_TOKENS, TEMPLATE_TOKENS + len(track.tags) // CHARACTERS_PER_TOKEN)
    lyrics = min(MAX_LYRIC_TOKENS, 15 + len(track.lyrics) // CHARACTERS_PER_TOKEN)
    return text + lyrics + 1


@dataclass(frozen=True)
class Pass:
    """What decides about one forward and backward pass: model, adapter, precision and the flags that say how."""

    transformer: torch.nn.Module
    adapter: Adapter
    precision: Precision
    base_quantization: str
    gradient_checkpointing: float
    offload: bool
    gpu: Gpu

    def seconds(self, batch: Batch) -> float:
        """Time of a pass. With `offload` the base comes twice, and the transfer takes its time where it is longer."""
        work = pass_work(
            self.transformer.config, self.adapter, batch, self.precision,
            base_quantization=self.base_quantization, gradient_checkpointing=self.gradient_checkpointing,
        )  # fmt: skip
        return max(pass_seconds(work, self.gpu, self.precision), 2 * self.transfer_seconds())

    def forward_seconds(self, batch: Batch) -> float:
        """Time of a forward pass alone: a third of a pass, a fourth where all blocks are checkpointed."""
        return max(self.seconds(batch) / (3 + self.gradient_checkpointing), self.transfer_seconds())

    def transfer_seconds(self) -> float:
        """Time in which all blocks come from the host."""
        if not self.offload:
            return 0.0
        moving = moving_bytes(self.transformer, self.base_quantization, self.precision)
        return host_seconds(self.transformer.config.num_hidden_layers * moving, self.gpu)


def estimate(
    shape: ModelShape, args: argparse.Namespace, tracks: list[Track], held_out: list[Track], gpu: Gpu, *,
    num_processes: int = 1,
) -> Estimate:  # fmt: skip
    """Estimate the training that the script's arguments `args` describe, on `tracks`, on `num_processes` of one `gpu`.

    Updates are divided into forward passes as training divides them, into halves too where they would not fit.
    """
    transformer = shape.build("transformer")
    total = num_parameters(transformer)
    adapter_model = shape.build("transformer")
    add_lora(adapter_model, lora_settings(args), seed=0)
    adapter = inspect_adapter(adapter_model, dropout=args.lora_dropout, use_dora=args.use_dora)
    half = args.mixed_precision == "fp16" or (args.mixed_precision == "bf16" and gpu.bf16_tflops is not None)
    precision = Precision(weight=2 if half else 4, mask=1, shared_keys=False)
    checkpointing = args.gradient_checkpointing_ratio if args.gradient_checkpointing else 0.0
    one = Pass(transformer, adapter, precision, args.base_quantization, checkpointing, args.offload, gpu)
    tokens = max(map(condition_tokens, tracks))
    usable = USABLE_MEMORY * gpu.memory_gb * GIB

    planner = plan_updates(tracks, args, num_processes)
    while True:
        plan = planner.plan(0)
        largest = max((micro for update in plan for process in update for micro in process), key=planner.frames)
        batch = batch_of(planner, largest, tokens)
        update = predict_update(
            transformer, adapter, batch, precision, base_quantization=args.base_quantization,
            gradient_checkpointing=checkpointing, optimizer=args.optimizer, offload=args.offload,
            ema=args.ema_decay is not None,
        )  # fmt: skip
        update["fragmentation (assumed)"] = math.ceil(FRAGMENTATION * sum(update.values()))
        update["CUDA context (assumed)"] = math.ceil(CUDA_CONTEXT_BYTES)
        if sum(update.values()) <= usable or batch.items == 1:
            break
        planner.halve([[largest]])

    one_by_one = samples_one_by_one(args.base_quantization, offload=args.offload)
    num_updates = args.max_train_steps or args.num_train_epochs * planner.updates_per_epoch
    weights = encoder_parameters(shape)
    return Estimate(
        update=update,
        encoding=encoding_bytes(shape, weights, precision),
        samples=args.num_validation_samples and samples_bytes(shape, weights, total, precision, one_by_one=one_by_one),
        num_parameters=total,
        adapter_parameters=adapter.num_parameters,
        batch=batch,
        bfloat16=half,
        num_updates=num_updates,
        update_s=update_seconds(one, planner, plan, tokens, OPTIMIZERS[args.optimizer].state_bytes, num_processes),
        transfer_s=one.transfer_seconds(),
        validation_s=validation_seconds(one, args, planner, held_out, tokens, num_updates) / num_processes,
        encoding_s=encoding_seconds(shape, sum(t.duration_s for t in (*tracks, *held_out)), gpu) / num_processes,
    )


def plan_updates(tracks: list[Track], args: argparse.Namespace, num_processes: int) -> EpochPlanner:
    """The planner of training, for tracks whose audio has not been encoded yet; raises `UsageError` as training."""
    size = choose_batch_size(
        effective_batch_size=args.effective_batch_size,
        train_batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_processes=num_processes,
    )
    entries = []
    for track in tracks:
        frames = int(track.duration_s * FRAMES_PER_SECOND)
        if crop := crop_frames(frames, args.max_duration_s, FRAMES_PER_SECOND):
            windows = (None,) * len(plan_windows(max(frames, crop), crop))  # only their number counts
            entries.append(CachedTrack(track.id, Path(), frames, crop, windows, track.sampling_weight, track.repeats))
    if not entries:
        raise UsageError("no track is long enough to train on.")
    return EpochPlanner(
        entries,
        seed=args.seed,
        effective_batch_size=size.effective,
        micro_batch_size=size.micro,
        num_processes=num_processes,
    )


def batch_of(planner: EpochPlanner, micro: MicroBatch, tokens: int) -> Batch:
    """The shape of a forward pass; conditions are taken to be as long as the longest, `tokens`."""
    return Batch(len(micro.items), planner.crop_frames[micro.items[0].track], tokens)


def update_seconds(
    one: Pass, planner: EpochPlanner, plan: list, tokens: int, state_bytes: float, num_processes: int
) -> float:
    """Mean time of the updates of an epoch: that of the process which has most to do, then the sum of the gradients
    over all (each sends and receives them twice, less its own share), the clip and the optimizer."""
    seconds = functools.cache(one.seconds)
    passes = [
        max(sum(seconds(batch_of(planner, micro, tokens)) for micro in process) for process in update)
        for update in plan
    ]
    gradients = 4 * one.adapter.num_parameters
    summing = host_seconds(2 * gradients * (num_processes - 1) / num_processes, one.gpu)
    return sum(passes) / len(passes) + summing + move_seconds(update_bytes(one.adapter, state_bytes), one.gpu)


def validation_seconds(
    one: Pass, args: argparse.Namespace, planner: EpochPlanner, held_out: list[Track], tokens: int, num_updates: int
) -> float:
    """Time of all validations: before the first update, after the last, and as often as the flags say in between."""
    if not held_out:
        return 0.0
    steps = validation_steps(
        argparse.Namespace(**vars(args) | {"num_updates": num_updates}),
        updates_per_epoch=planner.updates_per_epoch,
        items_per_update=planner.effective_batch_size,
        num_held_out=len(held_out),
    )
    crops = [
        crop_frames(int(t.duration_s * FRAMES_PER_SECOND), args.max_duration_s, FRAMES_PER_SECOND) for t in held_out
    ]
    once = sum(one.forward_seconds(Batch(1, crop, tokens)) for crop in crops if crop) * args.num_validation_draws
    return once * (1 + -(-num_updates // steps))


@functools.cache
def encoding_flops(shape: ModelShape) -> int:
    """Operations of the VAE's encoder on a second of audio, counted on the meta device."""
    vae = shape.build("vae")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encoder(torch.empty(1, 2, vae.config.sampling_rate, device="meta"))
    return counter.get_total_flops()


def encoding_seconds(shape: ModelShape, audio_s: float, gpu: Gpu) -> float:
    """Time of the VAE's encoder on `audio_s` seconds, in float32; the text encoders' is small beside it."""
    return encoding_flops(shape) * audio_s / (gpu.fp32_tflops * 1e12 * CONVOLUTION_EFFICIENCY)


def fits(found: Estimate, gpu: Gpu) -> bool:
    """Whether the phase that takes most fits into what is usable of the GPU's memory."""
    return found.peak <= USABLE_MEMORY * gpu.memory_gb * GIB
