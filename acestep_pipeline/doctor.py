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
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from . import paths
from .container.variables import OUR_NAMES

DISTRIBUTION = "ace-step-lora"
KNOWN_VARIABLES = OUR_NAMES
HUB_TIMEOUT_S = 5
# A module of each optional extra of setup.cfg.
EXTRAS = {"av": "av", "auto-tag": "librosa", "ray": "ray", "s3": "boto3", "tensorboard": "tensorboard",
          "trackio": "trackio", "wandb": "wandb", "8bit": "bitsandbytes", "prodigy": "prodigyopt",
          "schedulefree": "schedulefree", "quantization": "torchao", "style-distance": "librosa",
          "deepspeed": "deepspeed", "serverless": "pydantic", "runpod": "runpod", "modal": "modal",
          "lambda": "awslambdaric"}  # fmt: skip


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
        _run("extras", _check_extras),
        _run("device", _check_hardware, "check_device"),
        _run("bfloat16", _check_hardware, "check_bf16"),
        _run("memory", _check_hardware, "check_memory"),
        _run("output directory", _check_output_dir, output_dir),
        _run("Hugging Face cache", _check_hub_cache),
        _run("project cache", _check_project_cache),
        _run("shared memory", paths.check_shared_memory),
        _run("audio", _check_audio),
        _run("Hub token", _check_hub_token),
        _run("Hub", _check_hub, from_hub),
        _run("S3", _check_s3, check_network),
        _run("trackers", _check_trackers),
        _run("Accelerate", _check_accelerate),
        _run("environment", _check_environment),
        _run("model", paths.check_model, model),
        _run("data", paths.check_data, data),
    ]


def _run(name: str, check: Callable[..., tuple[str, ...]], *arguments) -> Check:
    """Make a `Check` of what `check` returns: the status, the detail and, unless all is well, the fix.

    A broken installation or driver shows as one of the first three exceptions, an address that a library can't parse
    as a `ValueError`, whose message is left out because it may quote that address with its password.
    """
    try:
        return Check(name, *check(*arguments))
    except ValueError as error:
        origin = traceback.extract_tb(error.__traceback__)[-1]
        fix = "correct or unset HF_ENDPOINT, HTTPS_PROXY and HTTP_PROXY, whichever isn't an address"
        return Check(name, "error", f"a setting can't be read (ValueError in {origin.filename}:{origin.lineno})", fix)
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        fix = "reinstall the packages with `pip install -r requirements.txt`; if it stays, report this line"
        return Check(name, "error", f"the check itself failed: {type(error).__name__}: {reason}", fix)


def _check_python() -> tuple[str, ...]:
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 (run from a checkout, nothing else has looked)
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


def _check_extras() -> tuple[str, ...]:
    found = {extra for extra, module in EXTRAS.items() if importlib.util.find_spec(module)}
    missing = [extra for extra in EXTRAS if extra not in found]
    detail = f"installed: {', '.join(sorted(found)) or 'none'}"
    return "ok", detail + (f"; `pip install 'ace-step-lora[{','.join(missing)}]'` adds the others" if missing else "")


def _check_hardware(name: str) -> tuple[str, ...]:
    from . import hardware  # which imports torch

    return getattr(hardware, name)()


def _check_output_dir(output_dir: Path) -> tuple[str, ...]:
    return paths.check_directory(output_dir, 5, "give another --output_dir", unwritable="error")


def _check_hub_cache() -> tuple[str, ...]:
    from huggingface_hub import constants

    return paths.check_directory(Path(constants.HF_HUB_CACHE), 10, "set HF_HOME to another directory")


def _check_project_cache() -> tuple[str, ...]:
    return paths.check_directory(paths.cache_dir(), 5, "set ACESTEP_CACHE_DIR to another directory")


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
    return "ok", "none: enough for public models; private ones need `hf auth login`"


def _start_hub_probe() -> Callable[[], str] | None:
    """Ask the Hub for its front page while the other checks run; the result waits and returns why it failed, or "".

    A daemon thread, because looking up a name can take longer than any timeout that the HTTP client knows. None where
    the Hub mustn't be asked.
    """
    try:
        import httpx2
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session
    except (ImportError, ValueError) as error:  # ValueError: HF_ENDPOINT isn't an address
        reason = f"{type(error).__name__} while huggingface_hub was imported"
        return lambda: reason

    if constants.HF_HUB_OFFLINE:
        return None
    outcome: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S).status_code
            # Any other status is an answer: a mirror need not have a front page.
            outcome.put(f"HTTP status {status}" if status in (403, 407, 500, 502, 503, 504) else "")
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

    endpoint = paths.without_secrets(constants.ENDPOINT)
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
    settings = "".join(f", {name} {paths.without_secrets(os.environ[name])}" for name in names if os.environ.get(name))
    wanted = bool(os.environ.get("ACESTEP_S3_ROOT"))
    if importlib.util.find_spec("boto3") is None:
        detail = f"S3 support isn't installed{settings}"
        return ("warning", detail, "run `pip install 'ace-step-lora[s3]'`") if wanted else ("ok", detail)
    import botocore.exceptions
    import botocore.session

    session = botocore.session.Session()
    fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`"
    try:
        if not check_network:
            for provider in ("container-role", "iam-role"):  # the two that ask another machine
                session.get_component("credential_provider").remove(provider)
        credentials = session.get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        return "warning", f"the credentials can't be used: {error}{settings}", fix
    if credentials is None:
        detail = f"no credentials, which only s3:// addresses need{settings}"
        return ("warning", detail, fix) if wanted else ("ok", detail)
    return "ok", f"credentials present (from {credentials.method}, not shown){settings}"


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


def print_checks(checks: list[Check]) -> int:
    """Print a line for each check, one more where there is a fix, and a summary; return 1 after any error, else 0."""
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
