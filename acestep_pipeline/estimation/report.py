"""What `acestep-lora estimate` says."""

import argparse
import copy

from ..errors import UsageError
from ..paths import default_data, default_model
from ..presets import preset_names
from ..training.argument_checks import check_bounds
from ..training.arguments import parse_args
from ..training.memory import samples_one_by_one
from .compute_time import BANDWIDTH_EFFICIENCY, CONVOLUTION_EFFICIENCY, HOST_LINK_EFFICIENCY, MATMUL_EFFICIENCY
from .estimate import USABLE_MEMORY, Estimate, estimate, fits, read_tracks
from .gpus import GPUS, Gpu, find_gpu
from .memory_use import GIB
from .model_shapes import ModelShape, choose_shape
from .this_machine import measure


def run(args: argparse.Namespace) -> int:
    """Estimate and print; 0 if it fits (or no GPU was named), 1 if not."""
    flags = list(args.training_flags) + (["--preset", args.preset] if args.preset else [])
    training = parse_args(flags)
    if args.num_processes < 1:
        raise UsageError(f"--num_processes must be positive, not {args.num_processes}.")
    check_bounds(training)
    data, _ = default_data(args.data)
    checkpoint, _ = default_model(args.pretrained_model_name_or_path, preset=args.preset)
    shape = choose_shape(args.config, checkpoint, args.variant_dir)
    gpus = GPUS if args.gpu is None else [named_gpu(args.gpu, training.mixed_precision)]
    tracks = read_tracks(data, training)
    number = {"num_processes": args.num_processes}
    estimates = [(gpu, estimate(shape, training, *tracks, gpu, **number)) for gpu in gpus]
    print(describe_workload(shape, training, *map(len, tracks), estimates[-1][1]))
    if args.gpu is None:
        print(describe_all(estimates))
        return 0
    gpu, found = estimates[0]
    print(describe(found, gpu, training, args.num_processes))
    if fits(found, gpu):
        return 0
    print(describe_alternative(shape, flags, tracks, gpu, args.num_processes))
    return 1


def named_gpu(name: str, mixed_precision: str) -> Gpu:
    """The GPU of that name, or `this` machine's device, measured now."""
    if name != "this":
        return find_gpu(name)
    print("Measuring this machine ...", flush=True)
    return measure(mixed_precision=mixed_precision)


def describe_workload(
    shape: ModelShape, training: argparse.Namespace, num_tracks: int, num_held_out: int, found: Estimate
) -> str:
    """What is estimated."""
    held_out = f" and {num_held_out} held out" if num_held_out else ""
    return (
        f"Model {shape.name}: {found.num_parameters / 1e6:,.0f} M parameters, base_quantization "
        f"{training.base_quantization}; adapter {found.adapter_parameters / 1e6:.1f} M; preset "
        f"{training.preset or 'none'}\n"
        f"Data: {num_tracks} tracks{held_out}; windows of up to {found.batch.frames / 25:g} s, conditions of about "
        f"{found.batch.condition_tokens} tokens"
    )


def describe(found: Estimate, gpu: Gpu, training: argparse.Namespace, num_processes: int) -> str:
    """Memory by part, phases, time, and what was assumed."""
    batch = found.batch
    lines = [
        f"\nPeak memory of an update on {'each of ' * (num_processes > 1)}{num_processes} x {gpu.name} (predicted; "
        f"{'half precision' if found.bfloat16 else 'float32'}; forward passes of up to {batch.items} x "
        f"{batch.frames / 25:g} s):"
    ]
    lines += [f"  {name:26}{size / GIB:8.2f} GiB" for name, size in found.update.items()]
    lines += [f"  {'all':26}{sum(found.update.values()) / GIB:8.2f} GiB"]
    lines += [f"Filling the cache: {found.encoding / GIB:.2f} GiB (encoders, no DiT)."]
    if found.samples:
        turns = "one model at a time; " * samples_one_by_one(training.base_quantization, offload=training.offload)
        lines += [f"Samples at the end: {found.samples / GIB:.2f} GiB ({turns}--num_validation_samples 0: none)."]
    verdict = "It fits" if fits(found, gpu) else "It does not fit"
    lines += [f"{verdict}: {found.peak / GIB:.2f} of {gpu.memory_gb:g} GiB, of which {USABLE_MEMORY:.0%} are usable."]
    training_s = found.num_updates * found.update_s
    validating = f"validations {duration(found.validation_s)}; " if found.validation_s else ""
    together = duration(training_s + found.validation_s + found.encoding_s)
    lines += [
        f"\nTime: {found.update_s:.2f} s an update, {found.num_updates} updates: {duration(training_s)}; {validating}"
        f"encoding {duration(found.encoding_s)}; together {together}, downloads not counted."
    ]
    if training.offload:
        lines += [
            f"--offload: the base comes from the host in {found.transfer_s:.2f} s, forward and backward, in every "
            f"pass, while it computes ({1 if gpu.measured else HOST_LINK_EFFICIENCY:.0%} of {gpu.host_gb_s:.3g} GB/s)."
        ]
    if gpu.measured:
        matmul = gpu.bf16_tflops if found.bfloat16 and gpu.bf16_tflops else gpu.fp32_tflops
        lines += [
            f"Measured just now: {matmul:.3g} TFLOP/s in matrix products, {gpu.bandwidth_gb_s:.3g} GB/s in memory. "
            f"Assumed: {CONVOLUTION_EFFICIENCY:.0%} of float32 for encoding."
        ]
        return "\n".join(lines)
    lines += [
        f"Assumed: {MATMUL_EFFICIENCY:.0%} of the published matrix throughput, {BANDWIDTH_EFFICIENCY:.0%} of the "
        f"bandwidth, {CONVOLUTION_EFFICIENCY:.0%} of float32 for encoding ({gpu.source}). Not yet measured on GPUs.",
    ]
    return "\n".join(lines)


def describe_all(estimates: list[tuple[Gpu, Estimate]]) -> str:
    """One line for each known GPU."""
    lines = [f"\n{'predicted':20}{'peak':>10}{'':14}{'pass':>9}{'update':>11}{'training':>12}"]
    for gpu, found in estimates:
        verdict = "fits" if fits(found, gpu) else "does not fit"
        total = duration(found.num_updates * found.update_s)
        size = f"{found.batch.items:>4} x {found.batch.frames / 25:3g} s"
        lines += [f"{gpu.name:20}{found.peak / GIB:6.1f} GiB  {verdict:12}{size}{found.update_s:7.2f} s{total:>12}"]
    return "\n".join(lines)


def describe_alternative(shape: ModelShape, flags: list[str], tracks: tuple, gpu: Gpu, num_processes: int) -> str:
    """The preset for this model that fits and takes most of the memory."""
    prefix = "xl_vram_" if shape.transformer.get("hidden_size", 2048) > 2048 else "vram_"
    kept = copy.copy(flags)
    if "--preset" in kept:
        index = kept.index("--preset")
        del kept[index : index + 2]
    found = []
    for name in preset_names():
        if name.startswith(prefix):
            other = estimate(shape, parse_args([*kept, "--preset", name]), *tracks, gpu, num_processes=num_processes)
            if fits(other, gpu):
                found.append((other.peak, name))
    if not found:
        return "No preset makes it fit there: take a GPU with more memory, or a smaller --rank or --max_duration_s."
    peak, name = max(found)
    return f"--preset {name} fits: {peak / GIB:.2f} GiB."


def duration(seconds: float) -> str:
    """E.g. `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
