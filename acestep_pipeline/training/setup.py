"""What stands before the loop: the accelerator, the tracks, the caches, and a DiT with an adapter and nothing else."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, parse_flag_from_env, release_memory

from ..adapters.settings import LoraSettings, describe
from ..condition_mask import ConditionMask
from ..data.dataset_summary import summarise_tracks
from ..data.encoders import fingerprint
from ..data.held_out import load_train_and_held_out
from ..data.latent_cache import CachedTrack, LatentCache, prepare_tracks
from ..data.remote_rows import RemoteRow
from ..data.text.variants import TextOptions
from ..data.tracks import (
    Problem,
    Track,
    count_triggers,
    dataset_fingerprint,
    describe_problems,
    doubts_about_text,
)
from ..errors import UsageError
from ..hardware import bf16_is_fast, default_device
from .base_model import add_adapter, check_hardware, is_turbo, load_base, set_up_blocks
from .compilation import CompiledBlocks
from .launch import uses_deepspeed
from .parallelism import fsdp_plugin, join_processes
from .processes import check_same_everywhere, gather_lists, local_place, share

WEIGHT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass
class TrainingInputs:
    """All that is in memory while the DiT trains.

    `condition_mask` is told before each forward pass which condition tokens are padding; `silence_latent` is
    `[1, frames, channels]` float32, `null_condition_emb` `[1, 1, dim]`, both on the device; `compiled` is there with
    --torch_compile; `held_out` are the tracks that are validated on and never trained on; `encoders_used` says whether
    more than the DiT was fetched and loaded; `facts` are hashes and settings that name the run, `dataset` says what it
    is trained on (`summarise_tracks`).
    """

    transformer: torch.nn.Module
    condition_mask: ConditionMask
    lora_parameters: list[torch.nn.Parameter]
    silence_latent: torch.Tensor
    null_condition_emb: torch.Tensor
    compiled: CompiledBlocks | None
    tracks: list[CachedTrack]
    held_out: list[CachedTrack]
    frames_per_second: float
    is_turbo: bool
    encoders_used: bool
    facts: dict
    dataset: dict


def build_accelerator(
    *, mixed_precision: str, report_to: str, output_dir: Path, logging_dir: str, allow_tf32: bool
) -> Accelerator:
    """An accelerator in the precision that this hardware is fast in: bf16 becomes fp32 where bf16 would be slower.

    Raises:
        UsageError: fp16 without a CUDA device.
    """
    # Said aloud, or a torchrun on a machine without a GPU becomes so many runs that know nothing of each other.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or default_device().type == "cpu"
    device = join_processes(on_cpu=on_cpu)
    if mixed_precision == "fp16" and device.type != "cuda":
        raise UsageError(f"--mixed_precision fp16 needs a CUDA device, and this is {device.type}; use bf16 or no.")
    if mixed_precision == "bf16" and not bf16_is_fast(device):
        mixed_precision = "no"
    if allow_tf32:
        torch.set_float32_matmul_precision("high")
    return Accelerator(
        cpu=on_cpu and not uses_deepspeed(),
        fsdp_plugin=fsdp_plugin(),
        # Or the launcher's number, which says nothing of this loop, would divide every loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        mixed_precision=mixed_precision,
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(str(output_dir), str(output_dir / logging_dir)),
    )


def prepare_inputs(
    accelerator: Accelerator,
    *,
    checkpoint: dict,
    train_data_dir: str | None,
    dataset_name: str | None,
    validation_data_dir: str | None,
    validation_fraction: float,
    max_validation_samples: int,
    validation_seed: int,
    max_train_samples: int | None,
    min_duration_s: float,
    max_duration_s: float,
    streaming: bool,
    strict: bool,
    latent_cache_dir: Path,
    text: TextOptions,
    lora: LoraSettings,
    base_quantization: str,
    gradient_checkpointing: float,
    offload: bool,
    torch_compile: bool,
    seed: int,
) -> TrainingInputs:
    """Read the tracks, load the DiT, add the adapter, and fill the cache; the frozen encoders are loaded for what it
    lacks, and let go of.

    Args:
        accelerator: device, precision and process to work for; each process encodes its share of the tracks.
        checkpoint: arguments of `ACEStepPipeline.from_pretrained` that name the model.
        latent_cache_dir: where latents and conditions are kept.
        text: in which words tracks are told.
        gradient_checkpointing: in what share of the blocks.
        offload: keep the frozen weights of the blocks in the host's memory.
        torch_compile: make the blocks ready to be compiled.
        The others are the script's flags.

    Raises:
        UsageError: no track is usable, one has to be skipped under `strict`, model or targets are wrong, or the base
            can't be quantised so here.
    """
    device, weight_dtype = accelerator.device, WEIGHT_DTYPES[accelerator.mixed_precision]
    check_hardware(accelerator, base_quantization=base_quantization, offload=offload, torch_compile=torch_compile)
    tracks, held_out, problems = load_train_and_held_out(
        train_data_dir,
        dataset_name=dataset_name,
        validation_data_dir=validation_data_dir,
        validation_fraction=validation_fraction,
        max_validation_samples=max_validation_samples,
        validation_seed=validation_seed,
        min_duration_s=min_duration_s,
        max_train_samples=max_train_samples,
        seed=seed,
        streaming=streaming,
        show_progress=accelerator.is_main_process,
    )
    report_problems(problems + doubts_about_text(tracks, text), strict=strict, say=accelerator.print)
    transformer, encoders = load_base(
        checkpoint, latent_cache_dir=latent_cache_dir, weight_dtype=weight_dtype, device=device
    )
    facts = _identify_run(transformer, tracks, text, lora)
    same = {"the model": facts["model_sha256"], "the training data": facts["dataset_sha256"]}
    check_same_everywhere(same | {"the held-out tracks": dataset_fingerprint(held_out)})
    # Before the cache is filled, so that a wrong target fails early.
    lora_parameters = add_adapter(
        transformer, lora, base_quantization=base_quantization, offload=offload, device=device, seed=seed
    )
    cache = LatentCache(latent_cache_dir, encoders, text)
    cached, cached_held_out = (
        cache_tracks(accelerator, cache, chosen, max_duration_s=max_duration_s, strict=strict) if chosen else []
        for chosen in (tracks, held_out)
    )
    compiled = set_up_blocks(
        accelerator,
        transformer,
        torch_compile=torch_compile,
        gradient_checkpointing=gradient_checkpointing,
        offload=offload,
    )
    trained_on = {entry.id for entry in cached}
    inputs = TrainingInputs(
        transformer=transformer.train(),
        condition_mask=ConditionMask(transformer),
        lora_parameters=lora_parameters,
        silence_latent=encoders.facts.silence_latent.to(device, torch.float32),
        null_condition_emb=encoders.facts.null_condition_emb.to(device, weight_dtype),
        compiled=compiled,
        tracks=cached,
        held_out=cached_held_out,
        frames_per_second=encoders.facts.latents_per_second,
        is_turbo=is_turbo(transformer),
        encoders_used=encoders.are_loaded,
        facts=facts,
        dataset=summarise_tracks([track for track in tracks if track.id in trained_on]),
    )
    # The VAE, the text encoder and the condition encoder, if they were needed, have done their work.
    del cache, encoders
    release_memory()
    return inputs


def _identify_run(transformer: torch.nn.Module, tracks: list[Track], text: TextOptions, lora: LoraSettings) -> dict:
    """Hashes of the plain model and of the data, the adapter's settings, and the trigger words, if there are any."""
    facts = {
        "model_sha256": fingerprint(transformer),
        "dataset_sha256": dataset_fingerprint(tracks),
        "lora": describe(lora),
    }
    if triggers := count_triggers(tracks, text):
        facts["trigger_words"] = triggers
    return facts


def cache_tracks(
    accelerator: Accelerator,
    cache: LatentCache,
    tracks: list[Track],
    *,
    max_duration_s: float,
    strict: bool,
) -> list[CachedTrack]:
    """Encode what the cache lacks, each process its share; every process gets all usable tracks, in order.

    A machine that doesn't share the others' directory then encodes for itself what it lacks of their shares.
    """
    # Neighbours of a streamed dataset are in one shard, which then few processes fetch; of files long and short ones,
    # which are often sorted, are spread.
    neighbours = any(isinstance(track.audio, RemoteRow) for track in tracks)
    own, found = prepare_tracks(
        cache,
        share(tracks, accelerator.process_index, accelerator.num_processes, neighbours=neighbours),
        max_duration_s=max_duration_s,
        show_progress=accelerator.is_local_main_process,
    )
    problems = gather_lists(found)
    report_problems(problems, strict=strict, say=accelerator.print)
    by_id = {entry.id: cache.locate(entry) for entry in gather_lists(own)}
    if not by_id:
        reasons = "; ".join(f"{problem.track}: {problem.reason}" for problem in problems if problem.skipped)
        raise UsageError(f"no track can be encoded: {reasons[:2000]}")
    here = share(tracks, *local_place(), neighbours=neighbours)
    lacking = [track for track in here if track.id in by_id and not by_id[track.id].is_here()]
    prepare_tracks(
        cache,
        lacking,
        max_duration_s=max_duration_s,
        show_progress=bool(lacking) and accelerator.is_local_main_process,
    )
    gather_lists([])  # until everyone's files are there
    return [by_id[track.id] for track in tracks if track.id in by_id]


def describe_tracks(tracks: list[CachedTrack], frames_per_second: float) -> str:
    """How many tracks and windows there are, how long, and how often each is heard, for a person."""
    longest_s = max(track.crop_frames for track in tracks) / frames_per_second
    described = f"{len(tracks)} tracks, {sum(len(track.windows) for track in tracks)} windows of up to {longest_s:g} s"
    shares = [track.weight * track.repeats for track in tracks]
    mean = sum(shares) / sum(track.repeats for track in tracks)
    rarest, commonest = min(shares) / mean, max(shares) / mean
    if not rarest == commonest == 1:
        described += f", each track heard {rarest:.4g} to {commonest:.4g} times an epoch"
    return described


def report_problems(problems: list[Problem], *, strict: bool, say: Callable[[str], None]) -> None:
    """Name every skipped track and every warning.

    Raises:
        UsageError: with `strict`, if a track was skipped.
    """
    skipped = [problem for problem in problems if problem.skipped]
    if problems:
        say(f"Tracks skipped: {len(skipped)}; warnings: {len(problems) - len(skipped)}.")
        say("\n".join(describe_problems(problems)))
    if skipped and strict:
        first = skipped[0]
        raise UsageError(f"--strict: {len(skipped)} tracks can't be used, the first is {first.track}: {first.reason}.")
