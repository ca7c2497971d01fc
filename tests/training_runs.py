"""Running the flagship script from tests: in this process (quick), or in processes of its own, as users do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_ace_step_lora.py"
CONFIGS = ROOT / "examples" / "accelerate_configs"


def flags(data: Path, output: Path, **changes) -> list[str]:
    """Flags of a short run on `data`; True and False become `--flag` and `--no-flag`, None leaves a flag out."""
    values = {
        "preset": "smoke",
        "pretrained_model_name_or_path": "tiny",
        "train_data_dir": data,
        "output_dir": output,
        "min_duration_s": 1,
        "max_duration_s": 4,
        "max_train_samples": 4,
        "num_validation_samples": 0,
        "learning_rate": 1e-3,
        "rank": 4,
        "lora_alpha": 8,
        "mixed_precision": "no",  # bf16 is not native everywhere, and equal to nothing to 1e-5
    } | changes
    command = []
    for name, value in values.items():
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            command += [f"--{name}", str(value)]
    return command


def train_here(data: Path, output: Path, **changes) -> None:
    """Run the script's `train` in this process."""
    import train_ace_step_lora

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    train_ace_step_lora.train(train_ace_step_lora.arguments.parse_args(flags(data, output, **changes)))


def start(
    data: Path, output: Path, *, script: Path = SCRIPT, config: str | None = None, launch_flags=(), **changes
) -> subprocess.Popen:
    """Start the script with `accelerate launch`: one process, or as a file in `examples/accelerate_configs` says.

    Those files are for GPUs, and run as they are on a machine without one: accelerate starts the processes it is
    told to, and they find CPUs. A machine's GPUs are hidden here.
    """
    if config is None:
        launcher = ["--quiet", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
        launcher += ["--dynamo_backend", "no"]
    else:
        launcher = ["--config_file", str(CONFIGS / config)]
        launcher += launch_flags or ["--main_process_port", "0"]  # 0: any free port
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(script), *flags(data, output, **changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )


def metrics(output: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a run's metrics, without wall-clock times."""
    lines = [json.loads(line) for line in (output / name).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
