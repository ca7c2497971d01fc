"""What is measured of a way of training: time, throughput, operations, memory, and the shares of its phases.

Milliseconds of an optimizer update are the median and the quartiles over at least 20 of them (`--updates`), after a
warm-up that is left out. Ways that are compared take turns in one process, on one model; ratios are medians over the
turns. The shares of data, forward, backward and optimizer come from further updates, in which the device finishes each
phase before the next begins.
"""

import contextlib
import functools
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.errors import UsageError
from acestep_pipeline.estimation.compute_time import pass_work
from acestep_pipeline.estimation.gpus import Gpu, find_gpu
from acestep_pipeline.estimation.memory_use import Batch, Precision
from benchmarks.device_time import PHASES, elapsed, mark, synchronize
from benchmarks.random_models import condition_width, random_transformer
from benchmarks.training_bench import Bench
from benchmarks.training_cases import FRAMES_PER_SECOND, PRESET, RATIOS, TRICKS, Case
from benchmarks.training_difference import difference
from benchmarks.training_ways import attention, steps

WARM_UP, TURN, SPLIT_UPDATES = 3, 4, 3


def measure(case: Case, ways: tuple[str, ...], *, updates: int) -> list[dict]:
    """One row for each way, all on one model, in turns."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bench = Bench(case, Path(folder))
        runs = {way: Run(bench, way) for way in ways}
        for run in runs.values():
            stack.enter_context(contextlib.closing(run.steps))
            run.turn(WARM_UP, timed=False)
        number = 0
        while min(len(run.seconds) for run in runs.values()) < updates:
            # In turn from the front and from the back, so that a drift of the machine's speed cancels.
            for run in list(runs.values())[:: -1 if number % 2 else 1]:
                run.turn(min(TURN, updates))
            number += 1
        for run in runs.values():
            run.split(SPLIT_UPDATES)
        rows = [run.row() for run in runs.values()]
        for row, run in zip(rows, runs.values(), strict=True):
            if run.way != "ours" and "ours" in runs:
                pairs = zip(run.turns, runs["ours"].turns, strict=True)
                row["vs_ours"] = spread([mine / other for mine, other in pairs], digits=4)
            if run.way == "compiled":
                row["compile_s"] = round(sum(shape.seconds for shape in bench.blocks.compiled.shapes), 1)
                row["shapes"] = len(bench.blocks.compiled.shapes)
                row["recompilations"] = bench.blocks.compiled.num_recompilations
            if run.way in (*TRICKS, *RATIOS, "ours_dense"):
                row["difference"] = difference(bench, run.way)
        return rows


class Run:
    """One way of training within a comparison: its updates, and what was measured of them."""

    def __init__(self, bench: Bench, way: str) -> None:
        self.bench, self.way = bench, way
        self.steps: Iterator[None] = steps(bench, way)
        self.seconds: list[float] = []
        self.turns: list[float] = []  # seconds of an update, the mean over each turn
        self.peak_bytes = 0

    def turn(self, updates: int, *, timed: bool = True) -> None:
        """So many updates. On a GPU their ends are marked in its own stream, and nothing waits in between."""
        device = self.bench.device
        synchronize(device)
        reset_peak(device)
        with attention(self.bench, self.way):
            ends = [mark(device)]
            for _ in range(updates):
                next(self.steps)
                ends.append(mark(device))
        synchronize(device)
        taken = [elapsed(before, after) for before, after in zip(ends, ends[1:], strict=False)]
        if timed:
            self.seconds += taken
            self.turns.append(statistics.mean(taken))
            self.peak_bytes = max(self.peak_bytes, peak_bytes(device))
        else:
            self.warm_up_s = sum(taken)

    def split(self, updates: int) -> None:
        """Further updates, in which the device finishes each phase before the next begins."""
        clock = self.bench.clock
        clock.seconds = dict.fromkeys(PHASES, 0.0)
        with attention(self.bench, self.way):
            clock.start()
            for _ in range(updates):
                next(self.steps)
                clock.ended("other")
        clock.on = False
        self.phases = {phase: 1000 * seconds / updates for phase, seconds in clock.seconds.items()}

    def row(self) -> dict:
        """Everything that is reported of it."""
        bench, case = self.bench, self.bench.case
        items, median = bench.effective_batch_size, statistics.median(self.seconds)
        tokens = items * case.seconds * FRAMES_PER_SECOND / bench.transformer.config.patch_size
        flops, checked = update_flops(bench)
        gpu = known_gpu(torch.cuda.get_device_name()) if bench.device.type == "cuda" else None
        peak = gpu and (gpu.bf16_tflops if bench.dtype is torch.bfloat16 else gpu.fp32_tflops)
        return {
            "way": self.way,
            "precision": str(bench.dtype).removeprefix("torch."),
            "windows_per_update": items,
            "warm_up_updates": WARM_UP,
            "warm_up_s": round(self.warm_up_s, 2),
            "updates": len(self.seconds),
            "ms_per_update": spread([1000 * value for value in self.seconds]),
            "tracks_per_s": round(items / median, 3),
            "tokens_per_s": round(tokens / median),
            "tflop_per_update": round(flops / 1e12, 5),
            "formula_over_counted_flops": round(checked, 4),
            "tflop_per_s": round(flops / median / 1e12, 4),
            "peak_tflop_per_s": peak,
            "mfu": round(flops / median / 1e12 / peak, 4) if peak else None,
            "peak_memory_bytes": self.peak_bytes,
            "memory_is": "tensors on the GPU" if bench.device.type == "cuda" else "resident memory of the process",
            "phases_ms": {phase: round(value, 2) for phase, value in self.phases.items()},
            "preset_c_s": {str(tracks): round(num_updates(tracks) * median, 1) for tracks in (50, 100, 200)},
        }  # fmt: skip


def num_updates(tracks: int) -> int:
    """Optimizer updates of preset c on so many tracks of one length."""
    return PRESET["num_train_epochs"] * -(-tracks // PRESET["effective_batch_size"])


def update_flops(bench: Bench) -> tuple[float, float]:
    """Operations that an update needs, by formula (nothing computed twice, no key outside of a sliding window, no
    padding), and the same formula, with every key, over what PyTorch counts."""
    tokens, case = bench.case.tokens(), bench.case
    items, mean = bench.effective_batch_size, sum(tokens) / len(tokens)
    frames = case.seconds * FRAMES_PER_SECOND

    def formula(condition_tokens: float, *, windowed: bool) -> float:
        return pass_work(
            bench.transformer.config, bench.adapter, Batch(items, frames, condition_tokens), Precision(4, 4),
            base_quantization="none", gradient_checkpointing=0.0, attention_backward=2.0, windowed=windowed,
        ).flops  # fmt: skip

    counted = count_flops(case, items, round(mean))
    return formula(mean, windowed=True), formula(round(mean), windowed=False) / counted


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


def spread(values: list[float], digits: int = 2) -> dict[str, float]:
    """Median and quartiles, within the values that there are."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": round(median, digits), "q1": round(low, digits), "q3": round(high, digits)}


def known_gpu(name: str) -> Gpu | None:
    """The GPU that a driver's name means (`NVIDIA A100-SXM4-80GB`); None if it is not in the table."""
    words = name.replace("-", " ").split()
    # Memory and sockets are said otherwise there; what else a name has (Ti, NVL, Laptop) makes it another GPU.
    for left_out in ("", r"hbm\w*|sxm\w*", r"hbm\w*|sxm\w*|pcie", r"hbm\w*|sxm\w*|pcie|\d+gb"):
        with contextlib.suppress(UsageError):
            return find_gpu(" ".join(word for word in words if not re.fullmatch(left_out, word.lower())))
    return None


def reset_peak(device: torch.device) -> None:
    """Forget the peak of memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":  # man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Since `reset_peak`: of tensors on a GPU, else the process' resident memory (0 where the system doesn't say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else 0
