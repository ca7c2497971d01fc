"""`acestep-lora doctor`: looks at everything training needs on this machine and says how to fix what is wrong.

Nothing outside the standard library is imported before the check that is about it, so that a broken installation is
reported instead of ending the report. No check shows a secret: tokens and keys are reported as present or absent, and
addresses lose their user names, passwords and queries.
"""

import argparse
import difflib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from . import paths

DISTRIBUTION = "ace-step-lora"
HUB_CHECKPOINT = "ACE-Step/acestep-v15-base"
KNOWN_VARIABLES = {"ACESTEP_MODEL", "ACESTEP_DATA", "ACESTEP_CACHE_DIR", "ACESTEP_DEBUG", "ACESTEP_S3_ROOT"}
HUB_TIMEOUT_S = 5
GIB = 1024**3


@dataclass(frozen=True)
class Check:
    """What one look found. `fix` says what to do about a warning or an error and is empty when all is well."""

    name: str
    status: Literal["ok", "warning", "error"]
    detail: str
    fix: str = ""


def run_checks(
    *,
    model: str | None = None,
    data: str | None = None,
    output_dir: Path = Path("output"),
    check_network: bool = True,
) -> list[Check]:
    """Run every check, in the order in which they are worth reading.

    `model` and `data` are what a run would be given; left out, the presets' defaults are looked at. Leaves nothing
    behind on disk. Without `check_network` nothing is sent to any other machine.
    """
    from_hub = _start_hub_probe() if check_network else None
    return [
        _run("Python", _check_python),
        _run("packages", _check_packages),
        _run("device", _check_device),
        _run("bfloat16", _check_bf16),
        _run("memory", _check_memory),
        _run("output directory", _check_output_dir, output_dir),
        _run("Hugging Face cache", _check_hub_cache),
        _run("project cache", _check_project_cache),
        _run("shared memory", _check_shared_memory),
        _run("audio", _check_audio),
        _run("Hub token", _check_hub_token),
        _run("Hub", _check_hub, from_hub),
        _run("S3", _check_s3, check_network),
        _run("trackers", _check_trackers),
        _run("Accelerate", _check_accelerate),
        _run("environment", _check_environment),
        _run("model", _check_model, model),
        _run("data", _check_data, data),
    ]


def _run(name: str, check: Callable[..., tuple[str, ...]], *arguments) -> Check:
    """A broken installation or driver shows as one of these three exceptions; anything else is a defect of ours."""
    try:
        return Check(name, *check(*arguments))
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        fix = "reinstall the packages with `pip install -r requirements.txt`; if it stays, report this line"
        return Check(name, "error", f"the check itself failed: {type(error).__name__}: {reason}", fix)


def _check_python() -> tuple[str, ...]:
    version = platform.python_version()
    if sys.version_info < (3, 11):
        return "error", f"Python {version} is too old", "make a virtual environment with Python 3.11 or newer"
    return "ok", f"{version} ({sys.executable})"


def _check_packages() -> tuple[str, ...]:
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return "error", f"{DISTRIBUTION} isn't installed, so what it requires isn't known", "run `pip install -e .`"
    found, wrong = {}, []
    for requirement in map(Requirement, required):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found[requirement.name] = version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} isn't installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} is required but {version} is installed")
    if wrong:
        return "error", "; ".join(wrong), "run `pip install -r requirements.txt` in this environment"
    shown = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
    return "ok", ", ".join(f"{name} {found[name]}" for name in shown if name in found)


def _check_device() -> tuple[str, ...]:
    import torch

    from . import hardware

    if torch.cuda.is_available():
        gpus, least_free = [], float("inf")
        for index in range(torch.cuda.device_count()):
            free, _ = torch.cuda.mem_get_info(index)
            least_free = min(least_free, free)
            described = hardware.describe_device(torch.device("cuda", index))
            gpus.append(f"cuda:{index} {described} ({free / GIB:.1f} GiB free)")
        if least_free < 8 * GIB:
            fix = (
                "close what else uses it (`nvidia-smi` shows it), or train with --gradient_checkpointing and --offload"
            )
            return "warning", "; ".join(gpus) + ": less than 8 GiB is free", fix
        return "ok", "; ".join(gpus)
    if hardware.nvidia_gpu_present():
        if torch.version.cuda is None:
            fix = f"`pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}` from PyPI's index"
            return "error", f"there is an NVIDIA GPU, but torch {torch.__version__} is built without CUDA", fix
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            hidden = "there is an NVIDIA GPU, but CUDA_VISIBLE_DEVICES leaves PyTorch none"
            return "error", hidden, "unset CUDA_VISIBLE_DEVICES, or name a GPU that `nvidia-smi -L` lists"
        fix = "update the driver; in a container, start it with `--gpus all`"
        return "error", f"there is an NVIDIA GPU, but PyTorch (CUDA {torch.version.cuda}) can't use it", fix
    device = hardware.default_device()
    described = hardware.describe_device(device)
    if device.type == "cpu":
        fix = "use a machine with a GPU for the published checkpoints; `tiny` trains here"
        return "warning", f"{described}: only tiny models train at a useful speed", fix
    return "ok", described


def _check_bf16() -> tuple[str, ...]:
    from . import hardware

    device = hardware.default_device()
    ratio = hardware.measure_bf16_ratio(device)
    speed = f"a bf16 matrix product takes {ratio:.2g} times as long as fp32 (measured)"
    if hardware.bf16_is_fast(device):
        return "ok", f"native on this {device.type} device: {speed}"
    detail = f"not native on this {device.type} device: {speed}; bf16 presets train in fp32 here"
    if device.type == "cuda":
        return "warning", detail, "use a GPU of compute capability 8.0 or newer (A100, RTX 30 series, …) for bf16"
    return "ok", detail


def _check_memory() -> tuple[str, ...]:
    from . import hardware

    available = hardware.memory_available_bytes()
    detail = f"{available / GIB:.1f} GiB of {hardware.memory_total_bytes() / GIB:.1f} GiB available"
    if available < 8 * GIB:
        # 1,575 M transformer parameters are 6 GiB in fp32; the text and condition encoders come on top.
        fix = "close other programs or raise the container's memory limit; `tiny` needs far less"
        return "warning", f"{detail}: the published checkpoints may not load", fix
    return "ok", detail


def _check_output_dir(output_dir: Path) -> tuple[str, ...]:
    return _check_directory(output_dir, 5, "give another --output_dir", unwritable="error")


def _check_hub_cache() -> tuple[str, ...]:
    from huggingface_hub import constants

    return _check_directory(Path(constants.HF_HUB_CACHE), 10, "set HF_HOME to another directory")


def _check_project_cache() -> tuple[str, ...]:
    return _check_directory(paths.cache_dir(), 5, "set ACESTEP_CACHE_DIR to another directory")


def _check_directory(directory: Path, wanted_gib: int, fix: str, unwritable: str = "warning") -> tuple[str, ...]:
    try:
        paths.probe_writable(directory)
    except OSError as error:
        return unwritable, f"{directory} can't be written ({error.strerror})", f"{fix}, or mend this one"
    free = f"{directory}: {paths.free_space_bytes(directory) / GIB:.1f} GiB free"
    if paths.free_space_bytes(directory) < wanted_gib * GIB:
        return "warning", f"{free}, less than {wanted_gib} GiB", f"make room there, or {fix}"
    return "ok", f"{free}, writable"


def _check_shared_memory() -> tuple[str, ...]:
    shm = Path("/dev/shm")
    if sys.platform != "linux":
        return "ok", f"{sys.platform} doesn't use /dev/shm"
    free = paths.free_space_bytes(shm) if shm.is_dir() else 0
    if free < 64 * 1024**2:
        fix = "start the container with `--shm-size 1g`, or train with --dataloader_num_workers 0"
        return "warning", f"/dev/shm has {free / 1024**2:.0f} MiB free: DataLoader workers may die", fix
    return "ok", f"/dev/shm: {free / GIB:.1f} GiB free for DataLoader workers"


def _check_audio() -> tuple[str, ...]:
    import numpy as np
    import soundfile
    import soxr

    sine = soxr.resample(0.5 * np.sin(2 * np.pi * 440 * np.arange(11025) / 44100), 44100, 48000)
    codecs = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "opus": "OPUS", "mp3": "MPEG_LAYER_III"}
    broken = []
    for name, subtype in codecs.items():
        file = io.BytesIO()
        try:
            soundfile.write(file, sine, 48000, format="OGG" if name == "opus" else name, subtype=subtype)
            file.seek(0)
            decoded, _ = soundfile.read(file)
        except (soundfile.SoundFileError, ValueError):  # ValueError: this libsndfile doesn't know the name
            broken.append(name)
            continue
        if abs(len(decoded) - len(sine)) > 4800 or not 0.3 < np.sqrt(np.mean(decoded**2)) < 0.4:  # 0.5 / √2 = 0.354
            broken.append(name)
    library = f"libsndfile {soundfile.__libsndfile_version__}, soxr {soxr.__version__}"
    if broken:
        status = "error" if "wav" in broken else "warning"
        fix = "run `pip install --force-reinstall soundfile`, whose wheel brings its own libsndfile"
        return status, f"{library} can't write and read {', '.join(broken)}", fix
    return "ok", f"{library}; wrote and read {', '.join(codecs)}"


def _check_hub_token() -> tuple[str, ...]:
    from huggingface_hub import get_token

    if get_token():
        return "ok", "present (not shown)"
    return "ok", "none: enough for public models; --push_to_hub and private ones need `hf auth login`"


def _start_hub_probe() -> Callable[[], str] | None:
    """Ask the Hub for its front page while the other checks run; the result waits and returns why it failed, or "".

    A daemon thread, because looking up a name can take longer than any timeout that the HTTP client knows. None where
    the Hub can't or mustn't be asked, which `_check_hub` then finds out itself.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return None
    outcome: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S).status_code
            outcome.put(f"HTTP status {status}" if status >= 500 else "")
        except httpx2.TransportError as error:
            outcome.put(str(error) or type(error).__name__)
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            outcome.put(type(error).__name__)  # its message may quote the address of the Hub or a proxy whole

    deadline = time.monotonic() + HUB_TIMEOUT_S
    threading.Thread(target=ask, daemon=True).start()

    def wait() -> str:
        try:
            return outcome.get(timeout=max(0.5, deadline - time.monotonic()))
        except queue.Empty:
            return f"no answer in {HUB_TIMEOUT_S} s"

    return wait


def _check_hub(wait: Callable[[], str] | None) -> tuple[str, ...]:
    from huggingface_hub import constants

    endpoint = _without_secrets(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        return "ok", "HF_HUB_OFFLINE is set: local models, what is already cached, and `tiny` work"
    if wait is None:
        return "ok", f"{endpoint} (not asked)"
    if failure := wait():
        fix = "check the network, HTTPS_PROXY and HF_ENDPOINT; local models and `tiny` work without the Hub"
        return "warning", f"{endpoint} can't be reached ({failure})", fix
    return "ok", f"{endpoint} answers"


def _check_s3(check_network: bool) -> tuple[str, ...]:
    names = ("ACESTEP_S3_ROOT", "AWS_ENDPOINT_URL")
    settings = "".join(f", {name} {_without_secrets(os.environ[name])}" for name in names if os.environ.get(name))
    wanted = bool(os.environ.get("ACESTEP_S3_ROOT"))
    if importlib.util.find_spec("boto3") is None:
        detail = f"S3 support isn't installed{settings}"
        return ("warning", detail, "run `pip install boto3`") if wanted else ("ok", detail)
    import botocore.exceptions
    import botocore.session

    session = botocore.session.Session()
    if not check_network:
        for provider in ("container-role", "iam-role"):  # the two that ask another machine
            session.get_component("credential_provider").remove(provider)
    fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`"
    try:
        credentials = session.get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        return "warning", f"the credentials can't be used: {error}{settings}", fix
    if credentials is None:
        detail = f"no credentials, which only s3:// addresses need{settings}"
        return ("warning", detail, fix) if wanted else ("ok", detail)
    return "ok", f"credentials present (from {credentials.method}, not shown){settings}"


def _without_secrets(address: str) -> str:
    """`address` without user name, password, query and fragment; all of it is hidden where those can't be told apart."""
    parts = re.fullmatch(r"(\w+://)?([^@/?#]*@)?([^@?#]*)([?#][^@]*)?", address)
    return (parts[1] or "") + parts[3] if parts else "(hidden: it may contain a password)"


def _check_trackers() -> tuple[str, ...]:
    # A folder named `wandb`, which wandb leaves behind, is a namespace package to Python: it has no origin.
    specs = {name: importlib.util.find_spec(name) for name in ("tensorboard", "wandb", "trackio")}
    installed = [name for name, spec in specs.items() if spec and spec.origin]
    if not installed:
        return "ok", "none installed: metrics go to metrics.jsonl only (`pip install tensorboard` for curves)"
    return "ok", f"{', '.join(installed)} for --report_to"


def _check_accelerate() -> tuple[str, ...]:
    import yaml
    from accelerate.commands.config import config_args

    if shutil.which("accelerate") is None and not Path(sys.executable).with_name("accelerate").exists():
        fix = "activate the virtual environment, or use `python -m accelerate.commands.launch`"
        return "warning", "the `accelerate` command isn't on PATH", fix
    file = config_args.default_config_file
    if not Path(file).is_file():
        return "ok", f"`accelerate launch` uses its defaults (no {file})"
    try:
        config = config_args.load_config_from_file(None)
    except (ValueError, AttributeError, TypeError, KeyError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        return "error", f"{file} can't be read: {reason}", "run `accelerate config` again, or delete the file"
    processes = getattr(config, "num_processes", "?")
    return "ok", f"{file}: {processes} process(es), mixed precision {config.mixed_precision}"


def _check_environment() -> tuple[str, ...]:
    unknown, fixes = [], []
    for name in sorted(name for name in os.environ if name.startswith("ACESTEP_") and name not in KNOWN_VARIABLES):
        unknown.append(name)
        close = difflib.get_close_matches(name, sorted(KNOWN_VARIABLES), n=1)
        fixes.append(f"rename {name} to {close[0]}" if close else f"unset {name}")
    if unknown:
        known = ", ".join(sorted(KNOWN_VARIABLES))
        return "warning", f"nothing reads {', '.join(unknown)} (known: {known})", "; ".join(fixes)
    present = sorted(KNOWN_VARIABLES & set(os.environ))
    return "ok", f"set: {', '.join(present)}" if present else "no ACESTEP_ variable is set"


def _check_model(model: str | None) -> tuple[str, ...]:
    from huggingface_hub import constants

    chosen = model or os.environ.get("ACESTEP_MODEL") or ("/model" if Path("/model").is_dir() else HUB_CHECKPOINT)
    source = "" if model else " (from ACESTEP_MODEL)" if os.environ.get("ACESTEP_MODEL") else " (the default)"
    if chosen == "tiny":
        return "ok", f"tiny{source}: built from a seed, without a download"
    if "://" in chosen:
        return "ok", f"{_without_secrets(chosen)}{source}: not looked at"
    if Path(chosen).expanduser().exists():
        return "ok", f"{chosen}{source} exists"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", chosen):
        fix = "correct the path, or name a Hub id (owner/name) or `tiny`"
        return "error", f"{chosen}{source} doesn't exist", fix
    if Path(constants.HF_HUB_CACHE, f"models--{chosen.replace('/', '--')}").is_dir():
        return "ok", f"{chosen}{source} is in the Hugging Face cache"
    if constants.HF_HUB_OFFLINE:
        fix = "download it while online (`hf download`), or train `tiny` or a local folder"
        return "warning", f"{chosen}{source} isn't cached, and HF_HUB_OFFLINE is set", fix
    return "ok", f"{chosen}{source} comes from the Hub at first use"


def _check_data(data: str | None) -> tuple[str, ...]:
    chosen = data or os.environ.get("ACESTEP_DATA")
    source = "" if data else " (from ACESTEP_DATA)" if chosen else " (the default)"
    if chosen is None:
        chosen = "/data" if Path("/data").is_dir() else "data"
    if "://" in chosen:
        return "ok", f"{_without_secrets(chosen)}{source}: not looked at"
    if Path(chosen).expanduser().exists():
        return "ok", f"{chosen}{source} exists"
    status = "warning" if source == " (the default)" else "error"
    fix = "give --train_data_dir a folder of audio files or a prepared dataset, or --dataset_name a Hub id"
    return status, f"{chosen}{source} doesn't exist", fix


def print_checks(checks: list[Check]) -> int:
    """Print one line a check, a line with the fix where there is one, and a summary; return 1 after any error, else 0."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    marks = {"ok": "✓", "warning": "!", "error": "✗"}
    try:
        "".join(marks.values()).encode(encoding)
    except UnicodeEncodeError:
        marks = {"ok": "ok", "warning": "!", "error": "!!"}
    mark_width = max(map(len, marks.values()))
    name_width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{marks[check.status]:<{mark_width}} {check.name:<{name_width}}  {check.detail}")
        if check.fix:
            lines.append(f"{'':{mark_width + name_width + 3}}fix: {check.fix}")
    count = {status: sum(check.status == status for check in checks) for status in marks}
    warnings = f"{count['warning']} warning{'s' * (count['warning'] != 1)}"
    errors = f"{count['error']} error{'s' * (count['error'] != 1)}"
    lines.append(f"{len(checks)} checks: {count['ok']} ok, {warnings}, {errors}")
    for line in lines:  # a path may hold characters that this terminal can't show
        print(line.encode(encoding, "replace").decode(encoding))
    return _exit_status(checks)


def _exit_status(checks: list[Check]) -> int:
    return int(any(check.status == "error" for check in checks))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `acestep-lora doctor`."""
    parser.add_argument("--output_dir", type=Path, default=Path("output"), help="where a run would write")
    parser.add_argument("--offline", action="store_true", help="ask no other machine")
    parser.add_argument("--json", action="store_true", help="print the checks as a JSON list")


def run(args: argparse.Namespace) -> int:
    """Run `acestep-lora doctor`; returns its exit status."""
    checks = run_checks(output_dir=args.output_dir, check_network=not args.offline)
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
        return _exit_status(checks)
    return print_checks(checks)
