#!/usr/bin/env python
"""How far `acestep-lora estimate` is from what an update really takes: bytes at the peak, and seconds.

    python benchmarks/estimate.py                       small models; on a GPU also the full-size ones
    python benchmarks/estimate.py --stages full_size    on a CPU the 2 B model, with random weights: 12 GB of memory
    python benchmarks/estimate.py --suite gpu --model small --max_seconds 2 --updates 1       a rehearsal on a CPU

Measured is the peak of what tensors take during one update (forward, backward, clip, optimizer): on a CPU summed over
PyTorch's allocations, on a GPU `torch.cuda.max_memory_allocated`. The assumed part of a prediction (CUDA's context,
the allocator's fragmentation) is not in it, since neither measurement sees that.

The time is predicted from the rates that this machine is measured to reach (`acestep-lora estimate --gpu this`), and,
on a GPU of the table, also from what its maker publishes; measured is the median of --updates updates.
`estimate_table.py` writes the table in docs/training.md.
"""

import argparse
import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.condition_mask import ConditionMask
from acestep_pipeline.errors import UsageError, one_sentence_errors
from acestep_pipeline.estimation.compute_time import move_seconds, pass_seconds, pass_work, update_bytes
from acestep_pipeline.estimation.gpus import Gpu, find_gpu
from acestep_pipeline.estimation.memory_use import Batch, Precision, inspect_adapter, predict_update
from acestep_pipeline.estimation.this_machine import measure
from acestep_pipeline.training.base_model import add_adapter
from acestep_pipeline.training.memory import enable_gradient_checkpointing
from acestep_pipeline.training.optimization import build_optimizer
from acestep_pipeline.training.optimizers import OPTIMIZERS
from benchmarks.random_models import SIZES, condition_width, random_transformer, transformer_shape
from benchmarks.results_file import RESULTS, Results, measure_or_not
from benchmarks.suites import check_stages, choose_suite, suite_parser
from train_ace_step_lora import squared_error


@dataclass(frozen=True)
class Case:
    """An update of a model of `SIZES`: so many passes (`accumulation`), each of `items` windows of `seconds`."""

    model: str
    seconds: int = 30
    items: int = 1
    condition_tokens: int = 150
    dropout: float = 0.05
    rank: int = 16
    checkpointing: float = 0.0
    quantization: str = "none"
    optimizer: str = "adamw"
    accumulation: int = 2
    bf16: bool = False

    @property
    def frames(self) -> int:
        """Latent frames of a window, at 25 Hz."""
        return self.seconds * 25

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the frozen weights, and of what is computed with them."""
        return torch.bfloat16 if self.bf16 else torch.float32


SMALL_CASES = [
    Case("mid"),
    Case("mid", dropout=0.0),
    Case("mid", items=2),
    Case("mid", checkpointing=1.0),
    Case("mid", checkpointing=0.5),
    Case("mid", quantization="nf4", checkpointing=1.0),
    Case("mid", quantization="int8"),
    Case("mid", optimizer="adamw_8bit", rank=64),
    Case("mid", bf16=True, seconds=20),
    Case("mid-xl"),
    Case("mid-xl", checkpointing=1.0, seconds=60),
]
CPU_CASES = [
    Case("2b", rank=64, accumulation=1, checkpointing=1.0),
    Case("2b", rank=64, accumulation=1, seconds=10),
    Case("2b", rank=64, accumulation=1, checkpointing=1.0, quantization="nf4"),
]
GPU_CASES = [
    Case("2b", rank=64, bf16=True, **({"seconds": 60} | changes))
    for changes in (
        {}, {"checkpointing": 1.0}, {"checkpointing": 0.5}, {"checkpointing": 1.0, "quantization": "nf4"},
        {"checkpointing": 1.0, "quantization": "int8"}, {"checkpointing": 1.0, "seconds": 240},
        {"checkpointing": 1.0, "optimizer": "paged_adamw_8bit"},
    )
]  # fmt: skip
GPU_CASES += [Case("xl", rank=64, bf16=True, seconds=60, checkpointing=1.0, quantization="nf4")]
SUITES = {
    "cpu": {"small": SMALL_CASES, "full_size": CPU_CASES},
    "gpu": {"small": SMALL_CASES, "full_size": GPU_CASES},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = suite_parser(__doc__, "estimate", SUITES, unset="both on a GPU, small on a CPU")
    p.add_argument("--model", choices=SIZES, help="this model instead of those of the suite")
    p.add_argument("--max_seconds", type=int, help="windows of at most this, instead of those of the suite")
    p.add_argument("--updates", type=int, default=7, help="updates timed of each case (default: %(default)s)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the cases."""
    args = parse_args(argv)
    suite = choose_suite(args.suite, rehearsed=args.model is not None, rehearsal="--model small")
    stages = SUITES[suite]
    check_stages(args.stages, stages, suite)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = args.output or RESULTS / f"estimate_{suite}.json"
    results = Results(output, overwrite=args.overwrite, describe=describe_row)
    for stage in args.stages or (["small"] if suite == "cpu" else stages):
        for case in stages[stage]:
            seconds = min(case.seconds, args.max_seconds or case.seconds)
            case = dataclasses.replace(case, model=args.model or case.model, seconds=seconds)
            if not results.has(stage, case):
                print(f"{stage}: {describe(case)} …", flush=True)
                measured = functools.partial(measure_case, case, device, updates=args.updates)
                results.add(stage, case, measure_or_not(measured, ("update",)))
    print(f"Wrote {output}; benchmarks/estimate_table.py puts it into docs/training.md.")


def describe(case: Case) -> str:
    """E.g. `2 B, bf16, nf4, rank 64, 60 s, checkpointing`."""
    parts = [
        {"2b": "2 B", "xl": "XL"}.get(case.model, case.model),
        "bf16" if case.bf16 else "float32",
        case.quantization if case.quantization != "none" else "",
        f"rank {case.rank}",
        "" if case.dropout else "no dropout",
        f"{case.items} × {case.seconds} s" if case.items > 1 else f"{case.seconds} s",
        f"{case.accumulation} passes" if case.accumulation > 1 else "",
        {0.0: "", 1.0: "checkpointing"}.get(
            case.checkpointing, f"{100 * case.checkpointing:.0f} % of the blocks checkpointed"
        ),
        case.optimizer if case.optimizer != "adamw" else "",
    ]
    return ", ".join(filter(None, parts))


def describe_row(row: dict) -> str:
    """What was predicted and measured, for a person."""
    if row.get("out_of_memory"):
        return "out of memory"
    predicted, measured = sum(row["predicted_bytes"].values()) / 1e6, row["measured_bytes"] / 1e6
    times = "".join(
        f", {row['predicted_s'][name]:.3f} of {row['measured_s']:.3f} s = {ratio:.2f} ({name})"
        for name, ratio in row["time_ratio"].items()
    )
    return f"{predicted:,.0f} of {measured:,.0f} MB = {row['bytes_ratio']:.3f}{times}"


@functools.cache
def find_rates(device: torch.device, mixed_precision: str) -> dict[str, Gpu]:
    """Those that this machine is measured to reach, and of a GPU in the table also what is published."""
    rates = {"this": measure(device, mixed_precision=mixed_precision)}
    if device.type == "cuda":
        with contextlib.suppress(UsageError):  # a GPU that is not in the table
            rates["published"] = find_gpu(torch.cuda.get_device_name(device))
    return rates


def measure_case(case: Case, device: torch.device, *, updates: int) -> list[dict]:
    """The row of a case, with the rates that its time is predicted from."""
    rates = find_rates(device, "bf16" if case.bf16 else "no")
    return [
        run_case(case, device, rates, updates)
        | {"rates": {name: vars(gpu) for name, gpu in rates.items()}, "updates_timed": updates}
    ]


def run_case(case: Case, device: torch.device, rates: dict[str, Gpu], updates: int) -> dict:
    """Bytes by part and seconds of one update as predicted (the seconds from each of `rates`), and as measured."""
    torch.manual_seed(0)
    model = random_transformer(case.model, device=torch.device("cpu"), dtype=case.dtype)
    lora = LoraSettings(r=case.rank, lora_dropout=case.dropout)
    parameters = add_adapter(model, lora, base_quantization=case.quantization, offload=False, device=device, seed=0)
    for parameter in parameters:  # the upper matrices start as zeros, and zeros are no input to time
        parameter.detach().normal_(std=0.02)
    predicted, predicted_s = predict(case, model, device, rates)
    update, optimizer = build_update(case, model, parameters, device)
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


def predict(
    case: Case, model: torch.nn.Module, device: torch.device, rates: dict[str, Gpu]
) -> tuple[dict[str, int], dict[str, float]]:
    """Of an update of a model with its adapter: bytes by part, and seconds from each of `rates`."""
    with torch.device("meta"):
        plain = AceStepTransformer1DModel(**transformer_shape(case.model))
    adapter = inspect_adapter(model, dropout=case.dropout)
    batch = Batch(case.items, case.frames, case.condition_tokens)
    on_cpu = device.type == "cpu"
    precision = Precision(weight=case.dtype.itemsize, mask=4 if on_cpu else 1, shared_keys=on_cpu)
    how = {"base_quantization": case.quantization, "gradient_checkpointing": case.checkpointing}
    size_bytes = predict_update(plain, adapter, batch, precision, **how, optimizer=case.optimizer)
    work = pass_work(plain.config, adapter, batch, precision, **how)
    after = update_bytes(adapter, OPTIMIZERS[case.optimizer].state_bytes)
    seconds = {
        name: case.accumulation * pass_seconds(work, gpu, precision) + move_seconds(after, gpu)
        for name, gpu in rates.items()
    }
    return size_bytes, seconds


def build_update(
    case: Case, model: torch.nn.Module, parameters: list[torch.nn.Parameter], device: torch.device
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Make a model with its adapter ready to train on the device: a function that does one update on random windows,
    and its optimizer."""
    if case.checkpointing:
        enable_gradient_checkpointing(model, case.checkpointing)
    model.train().to(device)
    optimizer = build_optimizer(
        parameters, optimizer=case.optimizer, learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.999,
        adam_weight_decay=0.01, adam_epsilon=1e-8, fused=device.type == "cuda",
    )  # fmt: skip
    condition_mask = ConditionMask(model)
    width = condition_width(model)
    silence = torch.randn(1, 15000, 64, device=device)
    null = torch.randn(1, 1, width, device=device, dtype=case.dtype)

    def update() -> None:
        for _ in range(case.accumulation):
            inputs = {
                "latents": torch.randn(case.items, case.frames, 64, device=device),
                "noise": torch.randn(case.items, case.frames, 64, device=device),
                "sigmas": torch.full((case.items,), 0.5, device=device),
                "encoder_hidden_states": torch.randn(case.items, case.condition_tokens, width, device=device),
                "dropped": torch.zeros(case.items, dtype=torch.bool, device=device),
            }
            with torch.autocast(device.type, case.dtype, enabled=case.bf16):
                loss = squared_error(model, inputs, condition_mask, silence, null)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update, optimizer


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
    with one_sentence_errors():
        main()
