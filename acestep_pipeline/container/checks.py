"""What the entrypoint refuses before anything is downloaded or loaded: one sentence each, with the fix."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import RunError, UsageError
from ..paths import GIB, free_space_bytes, holds_something, probe_writable

SHARED_MEMORY = Path("/dev/shm")
# NCCL's buffers between two GPUs; Docker's default, 64 MiB, is too little from two GPUs on.
SHARED_MEMORY_BYTES = 128 * 1024**2
# NVIDIA's driver on Linux, and under WSL.
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


def check_output(folder: Path) -> None:
    """Refuse an output folder that this user can't write.

    Raises:
        UsageError: it can't.
    """
    try:
        probe_writable(folder)
    except OSError as error:
        raise UsageError(
            f"{folder} can't be written by user {os.getuid()} ({error.strerror}); mount a folder that this user owns "
            f"(-v DIR:{folder}), or start the container as its owner (--user $(id -u):$(id -g))."
        ) from error


def check_data(folder: Path, *, named: str | None) -> None:
    """Refuse to start without training music; an address (`named` with ://) is not looked at.

    Raises:
        UsageError: nothing is mounted.
    """
    if named and "://" in named:
        return
    where = Path(named) if named else folder
    if not holds_something(where):
        raise UsageError(
            f"{where} is empty: mount a folder of music or a dataset there (-v DIR:{where}:ro), or name one with "
            "ACESTEP_DATA; MODE=smoke needs none."
        )


def check_shared_memory(num_processes: int, *, free_bytes: int | None = None) -> None:
    """Refuse several GPUs with too little shared memory.

    Raises:
        RunError: each process needs `SHARED_MEMORY_BYTES`.
    """
    if free_bytes is None:
        free_bytes = free_space_bytes(SHARED_MEMORY)
    needed = num_processes * SHARED_MEMORY_BYTES
    if num_processes > 1 and free_bytes < needed:
        raise RunError(
            f"{SHARED_MEMORY} has {free_bytes / GIB:.2f} GiB free and {num_processes} GPUs need {needed / GIB:.2f}; "
            f"start the container with --shm-size {2 * num_processes}g or --ipc host, or with NUM_GPUS=1."
        )


def choose_num_processes(environment: Mapping[str, str]) -> int:
    """How many GPUs to train on: `NUM_GPUS`, else all that PyTorch sees; 0 is the CPU, and has to be asked for.

    Raises:
        UsageError: `NUM_GPUS` is no number.
        RunError: there is no GPU, or there are too few.
    """
    wanted = environment.get("NUM_GPUS") or None
    if wanted is not None and not wanted.isdecimal():
        raise UsageError(f"NUM_GPUS must be a number of GPUs, or 0 for the CPU, not {wanted!r}.")
    if wanted is not None and int(wanted) == 0:
        return 0

    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        from ..hardware import check_device

        status, detail, *fix = check_device()
        fix = fix[0] if status == "error" else "start the container with --gpus all on a machine with an NVIDIA GPU"
        raise RunError(f"no GPU can be used: {detail}; {fix}, or set NUM_GPUS=0 to train on the CPU.")
    if wanted is not None and int(wanted) > found:
        raise RunError(f"NUM_GPUS={wanted}, but there are {found}; lower it, or give the container more (--gpus all).")
    return int(wanted or found)


def wants_gpu(environment: Mapping[str, str], *, devices: Sequence[Path] = GPU_DEVICES) -> bool:
    """Whether a worker is to use the GPU: unless `NUM_GPUS` is 0. Looks for the driver's device and imports no torch,
    which a worker that starts cold has no time for.

    Raises:
        RunError: it is, and there is none.
    """
    if environment.get("NUM_GPUS") == "0":
        return False
    if not any(device.exists() for device in devices):
        raise RunError(
            f"no GPU can be used: there is no {devices[0]}; start the worker on a machine with an NVIDIA GPU (docker: "
            "--gpus all), or set NUM_GPUS=0 to work on the CPU."
        )
    return True


def choose_lora_config(folder: Path, named: str | None) -> str | None:
    """The LoRA JSON: `named`, in `folder` or with its whole path, else the only one in `folder`, else None.

    Raises:
        UsageError: there is no such file, or there are several and none is named.
    """
    if named:
        for path in (folder / named, Path(named)):
            if path.is_file():
                return str(path)
        raise UsageError(f"LORA_CONFIG={named}: there is no such file, neither here nor in {folder}.")
    found = sorted(folder.glob("*.json"))
    if len(found) > 1:
        raise UsageError(
            f"{folder} has several files: {', '.join(path.name for path in found)}; choose one with LORA_CONFIG."
        )
    return str(found[0]) if found else None
