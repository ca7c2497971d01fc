"""From a mode, environment variables and extra arguments to the command that the container runs."""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from . import checks
from .variables import HOST_NAMES, TRAINING, check_names, training_flags, without_training

MODES = ("train", "smoke", "generate", "dataset", "runpod", "lambda", "shell")
# Beside the package, in a checkout and installed alike.
SCRIPT = Path(__file__).resolve().parents[2] / "train_ace_step_lora.py"
HANDLERS = SCRIPT.parent / "serverless"
DEFAULT_PRESET = "c"
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


@dataclass(frozen=True)
class Folders:
    """Where the container's volumes are."""

    data: Path = Path("/data")
    output: Path = Path("/output")
    lora_config: Path = Path("/lora-cfg")
    cache: Path = Path("/cache")


@dataclass(frozen=True)
class Command:
    """What to run, in which environment and folder."""

    arguments: list[str]
    environment: dict[str, str]
    directory: Path


def choose_command(
    environment: Mapping[str, str], extra: Sequence[str] = (), *, folders: Folders | None = None
) -> Command:
    """Check what can be checked at once, and choose the command. `extra` arguments come last, and so win.

    Raises:
        UsageError: a variable is misspelt, a mode unknown, `/output` or `/data` unusable, or this is no AWS Lambda.
        RunError: no GPU, or too little shared memory.
    """
    folders = folders or Folders()
    from ..training.arguments import build_parser

    flags = vars(build_parser().parse_args([]))
    check_names([*environment, *environment.get(HOST_NAMES, "").split()], flags=flags)
    mode = environment.get("MODE") or "train"
    if mode not in MODES:
        raise UsageError(f"MODE must be one of {', '.join(MODES)}, not {mode!r}.")
    if environment.get("LOG_FORMAT", "") not in ("", "plain", "json"):
        raise UsageError(f"LOG_FORMAT must be plain or json, not {environment['LOG_FORMAT']!r}.")
    inner = without_training(environment)
    inner.pop(HOST_NAMES, None)
    if mode == "shell":
        return Command([inner.get("SHELL") or "/bin/sh", *extra], inner, Path.cwd())
    if mode not in ("train", "smoke"):
        _warn_of_training_variables(mode, environment)
    if mode == "lambda":
        return _lambda_command(inner, extra, folders)
    if mode == "runpod":
        checks.check_output(Path(environment.get("ACESTEP_JOBS_OUTPUT") or folders.output))
        if not checks.wants_gpu(environment):
            inner |= ON_CPU
        return Command([sys.executable, str(HANDLERS / "runpod_handler.py"), *extra], inner, HANDLERS)
    checks.check_output(folders.output)
    if mode in ("generate", "dataset"):
        return Command(_other_arguments(mode, environment, extra, folders), inner, folders.output)
    if mode == "train":
        checks.check_data(folders.data, named=_named_data(environment, extra))
    num_processes = checks.choose_num_processes(environment)
    checks.check_shared_memory(num_processes)
    if num_processes == 0:
        inner |= ON_CPU
    if mode == "smoke":
        arguments = [sys.executable, "-m", "acestep_pipeline.container.smoke"]
        arguments += [str(num_processes), *smoke_arguments(environment, extra, folders)]
        return Command(arguments, inner, folders.output)
    arguments = train_arguments(environment, extra, folders)
    return Command([*launcher(num_processes), *arguments], inner, folders.output)


def launcher(num_processes: int) -> list[str]:
    """What starts the training script so that signals reach it and its status is the container's: Python itself for
    one process, torchrun's agent with our statuses for several."""
    if num_processes <= 1:
        return [sys.executable, str(SCRIPT)]
    return [sys.executable, "-m", "acestep_pipeline.container.processes", str(num_processes), str(SCRIPT)]


def train_arguments(environment: Mapping[str, str], extra: Sequence[str], folders: Folders) -> list[str]:
    """The training script's arguments: a restart with the same ones resumes."""
    preset = environment.get("PRESET") or DEFAULT_PRESET
    data = environment.get("ACESTEP_DATA") or str(folders.data)
    name = environment.get("EXP_NAME") or f"{preset}-{Path(data).name}"
    if Path(name).name != name:
        raise UsageError(f"EXP_NAME={name} must be a plain name: it is that of a folder in {folders.output}.")
    arguments = ["--preset", preset, "--exp_name", name, "--output_dir", str(folders.output / name)]
    if "--dataset_name" not in extra:
        arguments += ["--train_data_dir", data]
    resume = environment.get("RESUME") or "latest"
    if resume != "no" and "--overwrite_output_dir" not in extra:
        arguments += ["--resume_from_checkpoint", resume]
    config = checks.choose_lora_config(folders.lora_config, environment.get("LORA_CONFIG"))
    arguments += ["--lora_config", config] if config else []
    chosen_here = ("PRESET", "EXP_NAME", "RESUME", "LORA_CONFIG")
    return [*arguments, *training_flags(environment, without=chosen_here), *extra]


def smoke_arguments(environment: Mapping[str, str], extra: Sequence[str], folders: Folders) -> list[str]:
    """The smoke test's arguments: its output folder and data, and what the training gets beside its own settings."""
    own = ("PRESET", "EXP_NAME", "EPOCHS", "MAX_TRAIN_STEPS", "EVERY_N_TRAIN_STEPS", "RESUME", "LORA_CONFIG")
    own += ("PUSH_TO_S3", "PUSH_TO_HUB", "HUB_MODEL_ID", "HUB_PRIVATE_REPO", "HUB_TAG")  # five updates are no release
    config = checks.choose_lora_config(folders.lora_config, environment.get("LORA_CONFIG"))
    flags = ["--lora_config", config] if config else []
    data = environment.get("ACESTEP_DATA") or str(folders.data)
    return [str(folders.output), data, *flags, *training_flags(environment, without=own), *extra]


def _warn_of_training_variables(mode: str, environment: Mapping[str, str]) -> None:
    for variable in TRAINING:
        if environment.get(variable.name):
            print(f"warning: {variable.name} does nothing with MODE={mode}.", file=sys.stderr, flush=True)


def _lambda_command(environment: dict[str, str], extra: Sequence[str], folders: Folders) -> Command:
    """AWS's runtime client with our handler. Lambda lets nothing be written but /tmp: what the image keeps in its
    cache volume goes there."""
    if not environment.get("AWS_LAMBDA_RUNTIME_API"):
        raise UsageError(
            "MODE=lambda runs in AWS Lambda, which sets AWS_LAMBDA_RUNTIME_API; choose another mode here."
        )
    if extra:
        raise UsageError(f"MODE=lambda takes no arguments; leave out {' '.join(extra)} (the function's CMD).")
    moved = Path(tempfile.gettempdir(), "cache")
    for name, value in environment.items():
        if Path(value).is_relative_to(folders.cache):
            environment[name] = str(moved / Path(value).relative_to(folders.cache))
    arguments = [sys.executable, "-m", "awslambdaric", "lambda_handler.handler"]
    return Command(arguments, environment, HANDLERS)


def _other_arguments(mode: str, environment: Mapping[str, str], extra: Sequence[str], folders: Folders) -> list[str]:
    command = [sys.executable, "-m", "acestep_pipeline.cli"]
    if mode == "generate":
        return [*command, "generate", *extra]
    checks.check_data(folders.data, named=environment.get("ACESTEP_DATA"))
    data = environment.get("ACESTEP_DATA") or str(folders.data)
    output = str(folders.output / "dataset")
    return [*command, "dataset", "build", "--data-dir", data, "--output-dir", output, "--validate-audio", *extra]


def _named_data(environment: Mapping[str, str], extra: Sequence[str]) -> str | None:
    for flag in ("--train_data_dir", "--dataset_name"):
        for index, argument in enumerate(extra):
            value = argument.partition("=")[2] if argument.startswith(f"{flag}=") else None
            if argument == flag and index + 1 < len(extra):
                value = extra[index + 1]
            if value:
                return f"hub://{value}" if flag == "--dataset_name" else value
    return environment.get("ACESTEP_DATA") or None


def run(command: Command) -> None:
    """Become the command, so that it gets the signals and gives the status; with LOG_FORMAT=json its parent."""
    os.chdir(command.directory)
    if command.environment.get("LOG_FORMAT") == "json":
        from .log_lines import run_logged

        raise SystemExit(run_logged(command.arguments, command.environment))
    os.execvpe(command.arguments[0], command.arguments, command.environment)
