#!/usr/bin/env python
"""How long switching, swapping and loading adapters takes on the full-size DiT (2 B, random weights, bfloat16).

    python benchmarks/hot_swap.py            on a CPU: 7 GB of memory, a few minutes

Adapters are rank 64 on all attention layers: 44.0 M parameters, as `--preset c` trains them; their files are in the
page cache. Compared in one run with what plain diffusers does (`AceStepPipeline.load_lora_weights`, `set_adapters`).
"""

import argparse
import gc
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora, save_lora
from acestep_pipeline.estimation.model_shapes import SHAPES, num_parameters
from acestep_pipeline.paths import LORA_WEIGHTS_NAME
from acestep_pipeline.progress import quiet_loading
from acestep_pipeline.tiny_checkpoint import tiny_checkpoint_path

RESULTS = Path(__file__).parent / "results" / "hot_swap.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="2b", help="the DiT (default: %(default)s)")
    p.add_argument("--rank", type=int, default=64, help="of the adapters (default: %(default)s)")
    p.add_argument("--resident", type=int, default=4, help="adapters loaded at once (default: %(default)s)")
    p.add_argument("--loads", type=int, default=7, help="loadings of each kind (default: %(default)s)")
    p.add_argument("--swaps", type=int, default=100, help="switches, and hot-swaps (default: %(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    return p.parse_args(argv)


def main() -> None:
    """Measure, print and write the results file."""
    args = parse_args()
    torch.set_grad_enabled(False)
    transformer = random_transformer(SHAPES[args.shape].transformer)
    ours, plain = pipelines(transformer)
    result = {
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0],
        "parameters": num_parameters(transformer),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        files = write_adapters(transformer, Path(root), rank=args.rank, number=2)
        result["adapter_parameters"] = sum(
            tensor.numel() for tensor in load_file(files[0] / LORA_WEIGHTS_NAME).values()
        )
        before = base_hash(transformer)
        result["load_s"] = measure_loading(ours, plain, files, loads=args.loads)
        print(json.dumps(result["load_s"]), flush=True)
        for number in range(args.resident):
            ours.load_lora_weights(files[number % 2], adapter_name=f"adapter_{number}")
        result["switch_s"] = measure_switching(ours, plain, resident=args.resident, swaps=args.swaps)
        print(json.dumps(result["switch_s"]), flush=True)
        ours.delete_adapters([f"adapter_{number}" for number in range(2, args.resident)])
        result["hotswap"] = measure_hotswaps(ours, files, swaps=args.swaps)
        print(json.dumps(result["hotswap"]), flush=True)
        ours.unload_lora_weights()
        result["base_weights_identical"] = base_hash(transformer) == before
    result["load_average_after"] = os.getloadavg()[0]
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Base weights identical: {result['base_weights_identical']}. Wrote {args.output}")


def random_transformer(shape: dict) -> AceStepTransformer1DModel:
    """A DiT with random bfloat16 weights, filled a gigabyte a second."""
    with torch.device("meta"):
        transformer = AceStepTransformer1DModel(**shape)
    transformer = transformer.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    noise = torch.randn(1_000_003, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)
    for parameter in transformer.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), noise.numel()):
            part = flat[start : start + noise.numel()]
            part.copy_(noise[: part.numel()])
    return transformer


def pipelines(transformer: torch.nn.Module) -> tuple[ACEStepPipeline, AceStepPipeline]:
    """Ours and diffusers', on the same DiT; the other components are the tiny checkpoint's."""
    with quiet_loading():
        ours = ACEStepPipeline.from_pretrained(tiny_checkpoint_path())
        ours.register_modules(transformer=transformer)
        return ours, AceStepPipeline(**ours.components)


def write_adapters(transformer: torch.nn.Module, root: Path, *, rank: int, number: int) -> list[Path]:
    """Adapter directories as training leaves them, with random weights."""
    add_lora(transformer, LoraSettings(r=rank, lora_alpha=3.0 * rank), seed=0)
    for index in range(number):
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.01 * (index + 1))
        save_lora(transformer, root / f"adapter_{index}")
    transformer.unload_lora()
    return [root / f"adapter_{index}" for index in range(number)]


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's CPU time, which other processes hardly change."""
    start = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def describe(seconds: list[tuple[float, float]]) -> dict[str, float]:
    """Median, fastest and slowest by the clock, and the median CPU time."""
    wall, cpu = zip(*seconds, strict=True)
    row = {"median": statistics.median(wall), "min": min(wall), "max": max(wall), "median_cpu": statistics.median(cpu)}
    return {name: round(value, 5) for name, value in row.items()}


def measure_loading(ours: ACEStepPipeline, plain: AceStepPipeline, files: list[Path], *, loads: int) -> dict:
    """Loading beside another adapter, as a service does; reading alone for comparison."""
    loaders = {
        "ours": lambda path: ours.load_lora_weights(path, adapter_name="new"),
        "diffusers": lambda path: plain.load_lora_weights(path, adapter_name="new"),
        "reading_the_file": lambda path: [t.clone() for t in load_file(path / LORA_WEIGHTS_NAME).values()],
    }
    first = timed(lambda: ours.load_lora_weights(files[0], adapter_name="there"))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for number in range(loads + 1):
        for name, load in loaders.items():
            took = timed(lambda load=load, number=number: load(files[number % len(files)]))
            if number:  # the first one warms up
                seconds[name].append(took)
            if name != "reading_the_file":
                ours.delete_adapters("new")
            gc.collect()
    ours.delete_adapters("there")
    return {name: describe(values) for name, values in seconds.items()} | {"ours_first_of_all": describe([first])}


def measure_switching(ours: ACEStepPipeline, plain: AceStepPipeline, *, resident: int, swaps: int) -> dict:
    """`set_adapters` among resident adapters, and bytes of tensors that it allocates."""
    names = [f"adapter_{number}" for number in range(resident)]
    result = {}
    for label, pipeline in (("ours", ours), ("diffusers", plain)):
        seconds = []
        for number in range(swaps):
            chosen = [names[number % resident], names[(number + 1) % resident]]
            seconds.append(timed(lambda p=pipeline, chosen=chosen: p.set_adapters(chosen, [0.8, 0.4])))
        result[label] = describe(seconds)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as profiler:
        for name in names:
            ours.set_adapters(name, 0.5)
    events = profiler.profiler.kineto_results.events()
    result["bytes_allocated"] = sum(event.nbytes() for event in events if event.name() == "[memory]")
    return result


def measure_hotswaps(ours: ACEStepPipeline, files: list[Path], *, swaps: int) -> dict:
    """`load_lora_weights(…, hotswap=True)`, each followed by a switch, and the memory after some and after all."""
    seconds, memory = [], {}
    for number in range(1, swaps + 1):
        path = files[number % len(files)]
        seconds.append(timed(lambda path=path: ours.load_lora_weights(path, adapter_name="adapter_0", hotswap=True)))
        ours.set_adapters(f"adapter_{number % 2}", 0.8)
        if number in (swaps // 10, swaps):
            gc.collect()
            memory[number] = resident_bytes()
    return {"seconds": describe(seconds), "resident_bytes_after": memory}


def resident_bytes() -> int:
    """Memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


def base_hash(transformer: torch.nn.Module) -> str:
    """SHA-256 of all of the model's own weights."""
    digest = hashlib.sha256()
    own = {name.replace(".base_layer", ""): tensor for name, tensor in transformer.state_dict().items()}
    for _, tensor in sorted((name, tensor) for name, tensor in own.items() if ".lora_" not in name):
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
