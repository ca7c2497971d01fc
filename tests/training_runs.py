"""Running the flagship script from tests: in this process (quick), or in processes of its own, as users do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_ace_step_lora.py"


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


def start(data: Path, output: Path, *, script: Path = SCRIPT, num_processes: int = 1, **changes) -> subprocess.Popen:
    """Start the script with `accelerate launch`; with several processes on CPU, with torchrun, as accelerate has no
    launcher of its own for that."""
    if num_processes == 1:
        launcher = ["-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1", "--num_machines"]
        launcher += ["1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *flags(data, output, **changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
    )


def metrics(output: Path) -> list[dict]:
    """The lines of a run's metrics, without wall-clock times."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
