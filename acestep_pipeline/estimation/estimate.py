"""`acestep-lora estimate`: peak memory and time of a training, from its flags, its data and a GPU's name."""

import argparse
import functools
import math
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..adapters import add_lora
from ..conditioning import MAX_LYRIC_TOKENS, MAX_TEXT_TOKENS
from ..data.batching import Visits
from ..data.latent_cache import crop_frames
from ..data.tracks import Track, load_tracks
from ..errors import UsageError
from ..pipeline import ENCODE_TILE_FRAMES
from ..training.optimizers import OPTIMIZERS
from ..training.settings import lora_settings
from .compute_time import CONVOLUTION_EFFICIENCY, move_seconds, pass_seconds, pass_work, update_bytes
from .gpus import Gpu
from .memory_use import CUDA_CONTEXT_BYTES, FRAGMENTATION, GIB, Batch, Precision, inspect_adapter, predict_update
from .model_shapes import ModelShape, num_parameters

FRAMES_PER_SECOND = 25
# A driver and a desktop keep some of a GPU's nominal memory to themselves.
USABLE_MEMORY = 0.95
# The prompt's template, and characters that Qwen3's tokenizer puts in one token of English text.
TEMPLATE_TOKENS = 70
CHARACTERS_PER_TOKEN = 4
# Peak of the VAE's encoder on one tile over the bytes of its widest activation, measured on a CPU.
VAE_TILE_TENSORS = 5.1


@dataclass(frozen=True)
class Estimate:
    """What a training takes on one GPU.

    Attributes:
        update: bytes at the peak of an update, by part; `encoding` and `samples`: of the phases before and after.
        update_s, encoding_s: seconds of an update (the mean) and of encoding the data.
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
    encoding_s: float

    @property
    def peak(self) -> int:
        """Bytes of the phase that takes most."""
        return max(sum(self.update.values()), self.encoding, self.samples)


def read_tracks(data: str, args: argparse.Namespace) -> list[Track]:
    """The tracks that training would use, from their headers and texts; raises `UsageError` if there are none."""
    return load_tracks(data, min_duration_s=args.min_duration_s, max_train_samples=args.max_train_samples,
                       seed=args.seed, judge_tags=False)[0]  # fmt: skip


def condition_tokens(track: Track) -> int:
    """About how many tokens a track's condition has: text, lyrics and one of timbre."""
    text = min(MAX_TEXT_TOKENS, TEMPLATE_TOKENS + len(track.tags) // CHARACTERS_PER_TOKEN)
    lyrics = min(MAX_LYRIC_TOKENS, 15 + len(track.lyrics) // CHARACTERS_PER_TOKEN)
    return text + lyrics + 1


def estimate(shape: ModelShape, args: argparse.Namespace, tracks: list[Track], gpu: Gpu) -> Estimate:
    """Estimate the training that the script's arguments `args` describe, on `tracks` and one `gpu`."""
    transformer = shape.build("transformer")
    total = num_parameters(transformer)
    adapter_model = shape.build("transformer")
    add_lora(adapter_model, lora_settings(args), seed=0)
    adapter = inspect_adapter(adapter_model, dropout=args.lora_dropout, use_dora=args.use_dora)
    half = args.mixed_precision == "fp16" or (args.mixed_precision == "bf16" and gpu.bf16_tflops is not None)
    precision = Precision(weight=2 if half else 4, mask=1, fused_mask=False)
    checkpointing = args.gradient_checkpointing_ratio if args.gradient_checkpointing else 0.0
    micro, accumulation = batch_division(args)
    crops = [
        crop_frames(int(t.duration_s * FRAMES_PER_SECOND), args.max_duration_s, FRAMES_PER_SECOND) for t in tracks
    ]
    crops = [frames for frames in crops if frames]
    if not crops:
        raise UsageError("no track is long enough to train on.")
    batch = Batch(micro, max(crops), max(map(condition_tokens, tracks)))
    update = predict_update(
        transformer, adapter, batch, precision, base_quantization=args.base_quantization,
        gradient_checkpointing=checkpointing, optimizer=args.optimizer,
    )  # fmt: skip
    update["fragmentation (assumed)"] = math.ceil(FRAGMENTATION * sum(update.values()))
    update["CUDA context (assumed)"] = math.ceil(CUDA_CONTEXT_BYTES)

    times = {}
    for frames in set(crops):
        work = pass_work(
            transformer.config, adapter, Batch(micro, frames, batch.condition_tokens), precision,
            base_quantization=args.base_quantization, gradient_checkpointing=checkpointing,
        )  # fmt: skip
        times[frames] = pass_seconds(work, gpu, precision)
    state_bytes = OPTIMIZERS[args.optimizer].state_bytes
    update_s = accumulation * sum(times[frames] for frames in crops) / len(crops)
    update_s += move_seconds(update_bytes(adapter, state_bytes), gpu)
    visits = Visits(
        [1] * len(tracks), [t.sampling_weight for t in tracks], [t.repeats for t in tracks], seed=0
    ).visits_per_epoch
    per_epoch = -(-visits // (micro * accumulation))
    weights = encoder_parameters(shape)
    return Estimate(
        update=update,
        encoding=encoding_bytes(shape, weights, precision),
        samples=samples_bytes(weights, total, precision) if args.num_validation_samples else 0,
        num_parameters=total,
        adapter_parameters=adapter.num_parameters,
        batch=batch,
        bfloat16=half,
        num_updates=args.max_train_steps or args.num_train_epochs * per_epoch,
        update_s=update_s,
        encoding_s=encoding_seconds(shape, sum(t.duration_s for t in tracks), gpu),
    )


def batch_division(args: argparse.Namespace) -> tuple[int, int]:
    """(items in a forward pass, forward passes in an update). Of an effective batch alone, the least memory: ones."""
    effective = getattr(args, "effective_batch_size", None)
    micro = args.train_batch_size or 1
    accumulation = args.gradient_accumulation_steps or -(-(effective or micro) // micro)
    if micro < 1 or accumulation < 1:
        raise UsageError("--train_batch_size and --gradient_accumulation_steps must be positive.")
    return micro, accumulation


def encoding_bytes(shape: ModelShape, weights: dict[str, int], precision: Precision) -> int:
    """Bytes while the cache is filled: encoders (the VAE in float32, in tiles), and no DiT."""
    hop = math.prod(shape.vae["downsampling_ratios"])
    tile = shape.vae["encoder_hidden_size"] * ENCODE_TILE_FRAMES * hop * 4
    encoders = (weights["text_encoder"] + weights["condition_encoder"]) * precision.weight + weights["vae"] * 4
    return math.ceil(encoders + VAE_TILE_TENSORS * tile + CUDA_CONTEXT_BYTES)


def samples_bytes(weights: dict[str, int], transformer: int, precision: Precision) -> int:
    """Bytes while the samples at the end are generated: the whole pipeline in the run's precision, unquantised."""
    return math.ceil((sum(weights.values()) + transformer) * precision.weight + 0.5 * GIB + CUDA_CONTEXT_BYTES)


@functools.cache
def encoder_parameters(shape: ModelShape) -> dict[str, int]:
    """How many parameters each frozen encoder has."""
    return {name: num_parameters(shape.build(name)) for name in ("text_encoder", "condition_encoder", "vae")}


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
