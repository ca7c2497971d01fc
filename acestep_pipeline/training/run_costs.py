"""What a run took: hardware, time, and at most how much energy its GPUs."""

import shutil
import subprocess

import torch

from ..hardware import describe_device


def cost_rows(device: torch.device, *, num_processes: int, training_s: float) -> list[tuple[str, str]]:
    """Hardware, time and energy as rows of the model card's table; without the energy where nothing bounds it."""
    rows = [
        ("hardware", f"{num_processes} × {describe_device(device)}" if num_processes > 1 else describe_device(device)),
        ("time", _duration(training_s)),
    ]
    limit_w = power_limit_w(device)
    if limit_w is not None:
        energy_kwh = limit_w * num_processes * training_s / 3.6e6
        rows.append(
            ("energy", f"at most {energy_kwh:.3g} kWh on the GPU: its power limit, {limit_w:g} W, for all that time")
            if num_processes == 1
            else (
                "energy",
                f"at most {energy_kwh:.3g} kWh on the GPUs: the power limit of the first, {limit_w:g} W, for each of "
                f"{num_processes} for all that time",
            )
        )
    return rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def power_limit_w(device: torch.device) -> float | None:
    """The limit that an NVIDIA GPU's driver holds its power to, in watts; None where there is none to be asked."""
    if device.type != "cuda" or torch.version.hip or shutil.which("nvidia-smi") is None:
        return None
    # By its id: numbers differ where CUDA_VISIBLE_DEVICES hides some.
    return ask_power_limit_w(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def ask_power_limit_w(gpu: str) -> float | None:
    """The enforced power limit of the GPU with this id (`GPU-…`), as `nvidia-smi` says it; None if it doesn't."""
    command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=enforced.power.limit", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        limit_w = float(answer.stdout.strip())
    except (OSError, subprocess.SubprocessError, ValueError):  # "[N/A]" among them
        return None
    return limit_w if 0 < limit_w < 1e5 else None
