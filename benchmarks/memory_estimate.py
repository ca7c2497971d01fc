#!/usr/bin/env python
"""How far `acestep-lora estimate` is from what an update really takes: bytes at the peak, predicted and measured.

    python benchmarks/memory_estimate.py                     small models; on a GPU also the full-size ones
    python benchmarks/memory_estimate.py --full-size         the 2 B model as well, with random weights (12 GB)

Measured is the peak of what tensors take during one update (forward, backward, clip, optimizer): on a CPU summed over
PyTorch's allocations, on a GPU `torch.cuda.max_memory_allocated`. The assumed part of a prediction (CUDA's context,
the allocator's fragmentation) is not in it, since neither measurement sees that.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.condition_mask import ConditionMask
from acestep_pipeline.estimation.memory_use import Batch, Precision, inspect_adapter, predict_update
from acestep_pipeline.estimation.model_shapes import SHAPES
from acestep_pipeline.hardware import describe_device
from acestep_pipeline.quantization import quantize_base
from acestep_pipeline.training.memory import enable_gradient_checkpointing
from acestep_pipeline.training.optimization import build_optimizer
from train_ace_step_lora import squared_error

RESULTS = Path(__file__).parent / "results" / "memory_estimate.json"
SMALL = {
    "mid": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64},
    "mid-xl": {"hidden_size": 640, "intermediate_size": 2432, "num_hidden_layers": 10, "num_attention_heads": 16,
               "num_key_value_heads": 4, "head_dim": 64, "encoder_hidden_size": 512},
}  # fmt: skip
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
    p.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = SMALL_CASES + (GPU_CASES if device.type == "cuda" else FULL_CASES if args.full_size else [])
    rows = []
    for case in cases:
        case = DEFAULTS | case
        predicted, measured = run_case(case, device)
        rows.append(case | {"predicted_bytes": predicted, "measured_bytes": measured,
                            "ratio": round(sum(predicted.values()) / measured, 3)})  # fmt: skip
        print(describe(rows[-1]), flush=True)
    result = {"device": describe_device(device), "torch": torch.__version__, "python": platform.python_version(),
              "cases": rows}  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {args.output}")


def describe(row: dict) -> str:
    """One line of the table."""
    settings = {name: row[name] for name, value in DEFAULTS.items() if row[name] != value}
    predicted, measured = sum(row["predicted_bytes"].values()) / 1e6, row["measured_bytes"] / 1e6
    sizes = f"{predicted:9.0f} MB predicted{measured:9.0f} MB measured"
    return f"{row['model']:8}{sizes}{row['ratio']:8.3f}  {settings}"


def run_case(case: dict, device: torch.device) -> tuple[dict[str, int], int]:
    """Predicted bytes by part, and the measured peak, of one update."""
    dtype = torch.bfloat16 if case["bf16"] else torch.float32
    torch.manual_seed(0)
    shape = SHAPES[case["model"]].transformer if case["model"] in SHAPES else SMALL[case["model"]]
    with torch.device("meta"):
        model = AceStepTransformer1DModel(**shape)
    model = model.to_empty(device="cpu").to(dtype)
    for parameter in model.parameters():
        parameter.detach().normal_(std=0.02)
    frames = case["seconds"] * 25
    batch = Batch(case["items"], frames, case["condition_tokens"])
    precision = Precision(weight=dtype.itemsize, mask=1 if device.type == "cuda" else 4)
    quantize_base(model, case["quantization"], device=device)
    parameters = add_lora(model, LoraSettings(r=case["rank"], lora_dropout=case["dropout"]), seed=0)
    with torch.device("meta"):
        plain = AceStepTransformer1DModel(**shape)
    predicted = predict_update(
        plain,
        inspect_adapter(model, dropout=case["dropout"]),
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
    width = model.config.encoder_hidden_size or model.config.hidden_size
    silence = torch.zeros(1, 15000, 64, device=device)
    null = torch.zeros(1, 1, width, device=device, dtype=dtype)

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
    return predicted, measure_peak(update, model, optimizer, device)


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
