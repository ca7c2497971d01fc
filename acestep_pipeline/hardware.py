"""Facts about the machine (accelerator, native bfloat16, memory) and whether they are enough to train with.

The `check_…` functions are the doctor's: they return a status ("ok", "warning" or "error"), one sentence and, unless
all is well, the fix.
"""

import functools
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from .paths import GIB


@functools.cache
def bf16_is_fast(device: torch.device) -> bool:
    """Whether `device` computes bfloat16 matrix products natively: decided by hardware facts, never by timing.

    CUDA: compute capability 8.0 or newer, or any ROCm device. CPU: AMX or AVX512 with BF16 on x86, the BF16 extension
    on ARM; without them PyTorch emulates, tens of times slower than float32. MPS: no, since PyTorch says nothing
    about which Apple GPUs (M1: none) have bfloat16 units, and float32 is right on all of them. Other kinds of
    device: no, for the same reason.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return False


def measure_bf16_ratio(device: torch.device) -> float:
    """Time of a bfloat16 matrix product on `device` over that of the same product in float32: > 1 means slower.

    The median of seven timings each, under a second in all, on one CPU thread: with more, a busy shared machine made
    the ratio jump between 1 and 118 where one thread gives 43 to 63. Larger matrices give larger ratios on a CPU
    without native bfloat16, so take the number as an order of magnitude.
    """
    size = 256 if device.type == "cpu" else 2048
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right = torch.rand(2, size, size, device=device)
        bf16_s = _median_matmul_s(left.bfloat16(), right.bfloat16())
        return bf16_s / _median_matmul_s(left, right)
    finally:
        torch.set_num_threads(threads)


def _median_matmul_s(left: torch.Tensor, right: torch.Tensor) -> float:
    return median_s(lambda: torch.mm(left, right), left.device)


def median_s(work: Callable[[], object], device: torch.device, *, rounds: int = 7) -> float:
    """Seconds until `work` and what it started on the device are done: the median after one round to warm up."""
    timings = []
    for _ in range(rounds + 1):
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        timings.append(time.perf_counter() - started)
    return statistics.median(timings[1:])


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def default_device() -> torch.device:
    """The accelerator that PyTorch sees (CUDA, MPS, …), else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """E.g. "NVIDIA H100 80GB HBM3, 79.1 GiB" or "CPU (AMD EPYC, 2 cores, 23.4 GiB memory)"."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"
    machine = f"{_cpu_name()}, {_cpu_count()} cores, {memory_total_bytes() / GIB:.1f} GiB memory"
    return f"CPU ({machine})" if device.type == "cpu" else f"{device.type.upper()} ({machine})"


def _cpu_name() -> str:
    """The model name; Linux on ARM and macOS leave it out of the places read here, the architecture stands in."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_count() -> int:
    """Cores this process may use: a container or `taskset` often allows fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_total_bytes() -> int:
    """Main memory, or the control group's limit (a container's `--memory`) where that is lower."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroup_memory())])


def memory_available_bytes() -> int:
    """Main memory that can be had without swapping, within the control group's limit."""
    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in _cgroup_memory())])


def _cgroup_memory() -> list[tuple[int, int]]:
    """(limit, used) in bytes of this process's control group, as seen in a container; empty where nothing limits it.

    Page cache counts as used there, so inactive file pages, which the kernel gives back first, are taken off.
    """
    for root, limit_file, used_file, inactive in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),  # version 2
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        files = [Path(root, name) for name in (limit_file, used_file, "memory.stat")]
        if all(file.exists() for file in files):
            limit, used, stat = (file.read_text() for file in files)
            cached = dict(line.split() for line in stat.splitlines()).get(inactive, "0")
            return [] if limit.strip() == "max" else [(int(limit), int(used) - int(cached))]
    return []


def nvidia_gpu_present() -> bool:
    """Whether the machine has an NVIDIA GPU, asked of the driver: it doesn't matter which PyTorch is installed."""
    gpus = Path("/proc/driver/nvidia/gpus")
    if gpus.is_dir() and any(gpus.iterdir()):
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return True  # a driver that hangs is still a driver; the device check then says that PyTorch can't use it
    return listing.returncode == 0 and "GPU" in listing.stdout


def check_device() -> tuple[str, ...]:
    if torch.cuda.is_available():
        gpus, least_free = [], float("inf")
        for index in range(torch.cuda.device_count()):
            free, _ = torch.cuda.mem_get_info(index)
            least_free = min(least_free, free)
            described = describe_device(torch.device("cuda", index))
            gpus.append(f"cuda:{index} {described} ({free / GIB:.1f} GiB free)")
        if least_free < 8 * GIB:
            fix = "close what else uses it (`nvidia-smi` shows it), or use --gradient_checkpointing"
            return "warning", "; ".join(gpus) + ": less than 8 GiB is free", fix
        return "ok", "; ".join(gpus)
    if nvidia_gpu_present():
        if torch.version.cuda is None:
            fix = f"`pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}` from PyPI's index"
            return "error", f"there is an NVIDIA GPU, but torch {torch.__version__} is built without CUDA", fix
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            hidden = "there is an NVIDIA GPU, but CUDA_VISIBLE_DEVICES leaves PyTorch none"
            return "error", hidden, "unset CUDA_VISIBLE_DEVICES, or name a GPU that `nvidia-smi -L` lists"
        fix = "update the driver; in a container, start it with `--gpus all`"
        return "error", f"there is an NVIDIA GPU, but PyTorch (CUDA {torch.version.cuda}) can't use it", fix
    device = default_device()
    described = describe_device(device)
    if device.type == "cpu":
        fix = "use a machine with a GPU for the published checkpoints; `tiny` trains here"
        return "warning", f"{described}: only tiny models train at a useful speed", fix
    return "ok", described


def check_bf16() -> tuple[str, ...]:
    device = default_device()
    ratio = measure_bf16_ratio(device)
    speed = f"a bf16 matrix product takes {ratio:.1f} times as long as fp32 (measured)"
    if bf16_is_fast(device):
        return "ok", f"native on this {device.type} device: {speed}"
    detail = f"not native on this {device.type} device: {speed}; bf16 presets train in fp32 here"
    if device.type == "cuda":
        return "warning", detail, "use a GPU of compute capability 8.0 or newer (A100, RTX 30 series, …) for bf16"
    return "ok", detail


def check_memory() -> tuple[str, ...]:
    available = memory_available_bytes()
    detail = f"{available / GIB:.1f} GiB of {memory_total_bytes() / GIB:.1f} GiB available"
    if available < 8 * GIB:
        # 1,575 M transformer parameters are 6 GiB in fp32; the text and condition encoders come on top.
        fix = "close other programs or raise the container's memory limit; `tiny` needs far less"
        return "warning", f"{detail}: the published checkpoints may not load", fix
    return "ok", detail
