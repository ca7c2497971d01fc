#!/usr/bin/env python
"""How far `acestep-lora estimate` is from what an update really takes: bytes at the peak, and seconds.

    python benchmarks/estimate.py                     small models; on a GPU also the full-size ones
    python benchmarks/estimate.py --full-size         the 2 B model as well, with random weights (12 GB)

Measured is the peak of what tensors take during one update (forward, backward, clip, optimizer): on a CPU summed over
PyTorch's allocations, on a GPU `torch.cuda.max_memory_allocated`. The assumed part of a prediction (CUDA's context,
the allocator's fragmentation) is not in it, since neither measurement sees that.

The time is predicted from the rates that this machine is measured to reach (`acestep-lora estimate --gpu this`), and,
on a GPU of the table, also from what its maker publishes; measured is the median of --updates updates.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.condition_mask import ConditionMask
from acestep_pipeline.errors import UsageError
from acestep_pipeline.estimation.compute_time import move_seconds, pass_seconds, pass_work, update_bytes
from acestep_pipeline.estimation.gpus import Gpu, find_gpu
from acestep_pipeline.estimation.memory_use import Batch, Precision, inspect_adapter, predict_update
from acestep_pipeline.estimation.this_machine import measure
from acestep_pipeline.masked_attention import use_masked_attention
from acestep_pipeline.quantization import quantize_base
from acestep_pipeline.training.memory import enable_gradient_checkpointing
from acestep_pipeline.training.optimization import build_optimizer
from acestep_pipeline.training.optimizers import OPTIMIZERS
from benchmarks.random_models import condition_width, random_transformer, transformer_shape
from benchmarks.results_file import origin
from train_ace_step_lora import squared_error

RESULTS = Path(__file__).parent / "results" / "estimate.json"
DEFAULTS = {"seconds": 30, "items": 1, "condition_tokens": 150, "dropout": 0.05, "rank": 16, "checkpointing": 0.0,
            "quantization": "none", "optimizer": "adamw", "accumulation": 2, "bf16": False}  # fmt: skip
SMALL_CASES = [
    {"model": "mid"},
    {"model": "mid", "dropout": 0.0},
    {"model": "mid", "items": 2},
    {"model": "mid", "checkpointing": 1.0},
    {"model": "mid", "checkpointing": 0.5},
    {"model": "mid", "quantization": "nf4", "checkpointing": 1.0},
    {"model": "mid", "quantization": "int8"},
    {"model": "mid", "optimizer": "adamw_8bit", "rank": 64},
    {"model": "mid", "bf16": True, "seconds": 20},
    {"model": "mid-xl"},
    {"model": "mid-xl", "checkpointing": 1.0, "seconds": 60},
]
FULL_CASES = [
    {"model": "2b", "rank": 64, "seconds": 30, "checkpointing": 1.0, "accumulation": 1},
    {"model": "2b", "rank": 64, "seconds": 10, "accumulation": 1},
    {"model": "2b", "rank": 64, "seconds": 30, "checkpointing": 1.0, "accumulation": 1, "quantization": "nf4"},
]
GPU_CASES = [
    {"model": "2b", "rank": 64, "bf16": True, "seconds": 60, "accumulation": 2, **changes}
    for changes in (
        {}, {"checkpointing": 1.0}, {"checkpointing": 0.5}, {"checkpointing": 1.0, "quantization": "nf4"},
        {"checkpointing": 1.0, "quantization": "int8"}, {"checkpointing": 1.0, "seconds": 240},
        {"checkpointing": 1.0, "optimizer": "paged_adamw_8bit"},
    )
]  # fmt: skip
GPU_CASES += [{"model": "xl", "rank": 64, "bf16": True, "seconds": 60, "checkpointing": 1.0, "quantization": "nf4"}]


def main() -> None:
    """Run the cases that this machine can, and write a table and the results file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--full-size", action="store_true", help="also the 2 B model on the CPU: 12 GB, minutes")
    p.add_argument("--updates", type=int, default=7, help="updates timed of each case (default: %(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = SMALL_CASES + (GPU_CASES if device.type == "cuda" else FULL_CASES if args.full_size else [])
    rates = {precision: {"this": measure(device, mixed_precision=precision)} for precision in ("no", "bf16")}
    if device.type == "cuda":
        with contextlib.suppress(UsageError):  # a GPU that is not in the table
            published = find_gpu(torch.cuda.get_device_name(device))
            rates = {precision: by_name | {"published": published} for precision, by_name in rates.items()}
    rows = []
    for case in cases:
        case = DEFAULTS | case
        rows.append(case | run_case(case, device, rates["bf16" if case["bf16"] else "no"], args.updates))
        print(describe(rows[-1]), flush=True)
    as_json = {key: {name: vars(gpu) for name, gpu in named.items()} for key, named in rates.items()}
    result = origin() | {"rates": as_json, "updates_timed": args.updates, "cases": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {args.output}")


def describe(row: dict) -> str:
    """One line of the table."""
    settings = {name: row[name] for name, value in DEFAULTS.items() if row[name] != value}
    predicted, measured = sum(row["predicted_bytes"].values()) / 1e6, row["measured_bytes"] / 1e6
    sizes = f"{predicted:7.0f} of {measured:7.0f} MB = {row['bytes_ratio']:5.3f}"
    times = "".join(
        f"   {row['predicted_s'][name]:7.3f} of {row['measured_s']:7.3f} s = {ratio:5.2f} ({name})"
        for name, ratio in row["time_ratio"].items()
    )
    return f"{row['model']:8}{sizes}{times}  {settings}"


def run_case(case: dict, device: torch.device, rates: dict[str, Gpu], updates: int) -> dict:
    """Bytes by part and seconds of one update as predicted (the seconds from each of `rates`), and as measured."""
    dtype = torch.bfloat16 if case["bf16"] else torch.float32
    torch.manual_seed(0)
    model = random_transformer(case["model"], device=torch.device("cpu"), dtype=dtype)
    frames = case["seconds"] * 25
    batch = Batch(case["items"], frames, case["condition_tokens"])
    on_cpu = device.type == "cpu"
    precision = Precision(weight=dtype.itemsize, mask=4 if on_cpu else 1, shared_keys=on_cpu)
    use_masked_attention(model)
    quantize_base(model, case["quantization"], device=device)
    parameters = add_lora(model, LoraSettings(r=case["rank"], lora_dropout=case["dropout"]), seed=0)
    for parameter in parameters:  # the upper matrices start as zeros, and zeros are no input to time
        parameter.detach().normal_(std=0.02)
    with torch.device("meta"):
        plain = AceStepTransformer1DModel(**transformer_shape(case["model"]))
    adapter = inspect_adapter(model, dropout=case["dropout"])
    work = pass_work(plain.config, adapter, batch, precision, base_quantization=case["quantization"],
                     gradient_checkpointing=case["checkpointing"])  # fmt: skip
    after = update_bytes(adapter, OPTIMIZERS[case["optimizer"]].state_bytes)
    predicted_s = {
        name: case["accumulation"] * pass_seconds(work, gpu, precision) + move_seconds(after, gpu)
        for name, gpu in rates.items()
    }
    predicted = predict_update(
        plain,
        adapter,
        batch,
        precision,
        base_quantization=case["quantization"],
        gradient_checkpointing=case["checkpointing"],
        optimizer=case["optimizer"],
    )
    if case["checkpointing"]:
        enable_gradient_checkpointing(model, case["checkpointing"])
    model.train().to(device)
    optimizer = build_optimizer(
        parameters, optimizer=case["optimizer"], learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.999,
        adam_weight_decay=0.01, adam_epsilon=1e-8, fused=device.type == "cuda",
    )  # fmt: skip
    condition_mask = ConditionMask(model)
    width = condition_width(model)
    silence = torch.randn(1, 15000, 64, device=device)
    null = torch.randn(1, 1, width, device=device, dtype=dtype)

    def update() -> None:
        for _ in range(case["accumulation"]):
            inputs = {
                "latents": torch.randn(batch.items, frames, 64, device=device),
                "noise": torch.randn(batch.items, frames, 64, device=device),
                "sigmas": torch.full((batch.items,), 0.5, device=device),
                "encoder_hidden_states": torch.randn(batch.items, batch.condition_tokens, width, device=device),
                "dropped": torch.zeros(batch.items, dtype=torch.bool, device=device),
            }
            with torch.autocast(device.type, dtype, enabled=case["bf16"]):
                loss = squared_error(model, inputs, condition_mask, silence, null)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    update()  # optimizer state and caches are there from the first one on
    peak = measure_peak(update, model, optimizer, device)
    seconds = statistics.median(time_once(update, device) for _ in range(updates))
    return {
        "predicted_bytes": predicted,
        "measured_bytes": peak,
        "bytes_ratio": round(sum(predicted.values()) / peak, 3),
        "predicted_s": {name: round(value, 4) for name, value in predicted_s.items()},
        "measured_s": round(seconds, 4),
        "time_ratio": {name: round(value / seconds, 3) for name, value in predicted_s.items()},
    }


def time_once(work: Callable[[], None], device: torch.device) -> float:
    """Seconds until `work` and what it started on the device are done."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure_peak(update, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Bytes of tensors at the peak of `update`, with what model and optimizer hold already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        update()
        return torch.cuda.max_memory_allocated()
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    held = sum({key: size for tensor in tensors for key, size in storages(tensor)}.values())
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        update()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return held + peak


def storages(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """(address, bytes) of the memory behind a tensor, a quantised one's scales included."""
    parts = [getattr(tensor, name) for name in ("qdata", "scale", "zero_point") if hasattr(tensor, name)]
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        parts = [tensor.data, state.absmax, state.state2.absmax]
    return [(part.untyped_storage().data_ptr(), part.untyped_storage().nbytes()) for part in parts or [tensor.data]]


if __name__ == "__main__":
    main()
