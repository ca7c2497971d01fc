"""The doctor, run for real: conditions are provoked in the environment and on disk, not by replacing its functions."""

import configparser
import http.server
import importlib.metadata
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from acestep_pipeline import doctor, hardware, paths
from tests.loopback import serving

COMMAND = (
    "import argparse, sys; from acestep_pipeline import doctor; parser = argparse.ArgumentParser(); "
    "doctor.add_arguments(parser); sys.exit(doctor.run(parser.parse_args()))"
)
SECRETS = {
    "HF_TOKEN": "hf_SECRETSECRETSECRET",
    "AWS_ACCESS_KEY_ID": "AKIASECRET",
    "AWS_SECRET_ACCESS_KEY": "aws/SECRET+key",
}


def run_doctor(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """`acestep-lora doctor` in its own process, in `folder`, with no settings but those given."""
    prefixes = ("ACESTEP_", "AWS_", "HF_", "TRANSFORMERS_", "PYTHONIOENCODING")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    package = str(Path(doctor.__file__).parents[1])
    settings = {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "PYTHONPATH": package, "PYTHONUTF8": "1"}
    settings |= {"NO_PROXY": "127.0.0.1", "AWS_EC2_METADATA_DISABLED": "true"}
    command = [sys.executable, "-c", COMMAND, *flags]
    return subprocess.run(
        command, cwd=folder, env=inherited | settings | environment, capture_output=True, text=True, timeout=120
    )


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def hub():
    """A local web server in the Hub's place, and the paths and headers it was asked with."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append((self.path, dict(self.headers)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with serving(Handler) as server:
        yield f"http://127.0.0.1:{server.server_port}", requests


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """The doctor on a machine where much is wrong: (the process, its checks by name)."""
    folder = tmp_path_factory.mktemp("troubled")
    (folder / "file").write_text("in the way")
    (folder / "hf/accelerate").mkdir(parents=True)
    (folder / "hf/accelerate/default_config.yaml").write_text("distributed_type: 'NO'\nno_such_setting: 1\n")
    process = run_doctor(
        folder,
        "--json",
        "--output_dir",
        "file/output",
        HF_ENDPOINT=f"http://someone:SECRET@127.0.0.1:{closed_port()}",
        ACESTEP_S3_ROOT="s3://SECRET@bucket/root",
        AWS_ENDPOINT_URL="https://user:SECRET@objects.example/path?signature=SECRET",
        ACESTEP_CACHE_DIR=str(folder / "file"),
        ACESTEP_MODLE="SECRET",
        ACESTEP_MODEL="./no-such-model",
        ACESTEP_DATA="no-such-data",
        **SECRETS,
    )
    checks = {check["name"]: check for check in json.loads(process.stdout)}
    return process, checks


def test_troubled_machine_exits_1_with_a_fix_for_everything(troubled):
    process, checks = troubled
    assert process.returncode == 1
    for check in checks.values():
        assert set(check) == {"name", "status", "detail", "fix"}
        assert check["detail"]
        assert bool(check["fix"]) == (check["status"] != "ok"), check


@pytest.mark.parametrize(
    ("name", "status", "detail", "fix"),
    [
        ("output directory", "error", "file is not a directory", "--output_dir"),
        ("project cache", "warning", "file is not a directory", "ACESTEP_CACHE_DIR"),
        ("Hub", "warning", "can't be reached", "`tiny` work without"),
        ("Hub token", "ok", "present", ""),
        ("S3", "ok", "credentials present", ""),
        ("S3", "ok", "ACESTEP_S3_ROOT s3://bucket/root, AWS_ENDPOINT_URL https://objects.example/path", ""),
        ("Accelerate", "error", "no_such_setting", "accelerate config"),
        ("environment", "warning", "ACESTEP_MODLE", "rename ACESTEP_MODLE to ACESTEP_MODEL"),
        ("model", "error", "./no-such-model (ACESTEP_MODEL) doesn't exist", "`tiny`"),
        ("data", "error", "no-such-data (ACESTEP_DATA) doesn't exist", "--train_data_dir"),
    ],
)
def test_troubled_machine(troubled, name, status, detail, fix):
    check = troubled[1][name]
    assert check["status"] == status
    assert detail in check["detail"]
    assert fix in check["fix"]


def test_no_secret_is_printed(troubled):
    process = troubled[0]
    assert "SECRET" not in process.stdout + process.stderr


def test_healthy_machine_exits_0_and_is_left_as_it_was(tmp_path, hub):
    endpoint, requests = hub
    (tmp_path / "songs").mkdir()
    (tmp_path / "model").mkdir()
    before = sorted(tmp_path.rglob("*"))
    process = run_doctor(
        tmp_path,
        "--output_dir",
        "new/output",
        HF_ENDPOINT=endpoint,
        ACESTEP_DATA="songs",
        ACESTEP_MODEL="model",
        HF_TOKEN=SECRETS["HF_TOKEN"],
    )
    lines = process.stdout.splitlines()
    if not torch.cuda.is_available() and not hardware.nvidia_gpu_present():  # such a machine is never all well
        assert process.returncode == 0, process.stdout + process.stderr
    assert any(line.startswith("✓ Hub ") and line.endswith(f"{endpoint} answers") for line in lines)
    assert any(line.startswith("✓ data ") and line.endswith("songs (ACESTEP_DATA) exists") for line in lines)
    assert any(line.startswith("✓ audio ") and line.endswith("wav, flac, ogg, opus, mp3") for line in lines)
    version = importlib.metadata.version("torch")  # torch's own may be longer: 2.13.0+cu130
    assert any(line.startswith("✓ packages ") and f"torch {version}" in line for line in lines)
    assert lines[-1].startswith("19 checks: ") and lines[-1].endswith(", 0 errors")
    assert sorted(tmp_path.rglob("*")) == before
    assert len(requests) == 1 and "authorization" not in {name.lower() for name in requests[0][1]}


def test_offline_asks_nobody(tmp_path, hub):
    endpoint, requests = hub
    process = run_doctor(tmp_path, "--offline", "--json", HF_ENDPOINT=endpoint)
    checks = {check["name"]: check for check in json.loads(process.stdout)}
    assert checks["Hub"]["detail"] == f"{endpoint} (not asked)"
    assert checks["S3"]["detail"].startswith("no credentials")
    assert checks["Hub token"]["detail"].startswith("none")
    assert requests == []


def test_hub_address_that_cannot_be_parsed(tmp_path):
    process = run_doctor(tmp_path, "--json", HF_ENDPOINT="http://someone:SECRET@127.0.0.1:SECRET")
    checks = {check["name"]: check for check in json.loads(process.stdout)}
    assert process.returncode == 1
    assert checks["Hub"]["status"] == "warning" and "HF_ENDPOINT" in checks["Hub"]["fix"]
    assert checks["Hub token"]["status"] == "error" and "HF_ENDPOINT" in checks["Hub token"]["fix"]
    assert "SECRET" not in process.stdout + process.stderr


def test_hub_that_never_answers(monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(doctor, "HUB_TIMEOUT_S", 1)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        started = time.monotonic()
        status, detail, fix = doctor._check_hub(doctor._start_hub_probe())
    assert time.monotonic() - started < 5
    assert status == "warning" and fix


def test_hub_that_must_not_be_asked(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert doctor._start_hub_probe() is None
    assert doctor._check_hub(None)[0] == "ok"
    status, detail, _ = paths.check_model("someone/not-cached")
    assert status == "warning" and "HF_HUB_OFFLINE" in detail


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("diffusers==0.1.0", "diffusers==0.1.0 is required but"),
        ("no-such-package>=2", "no-such-package>=2 isn't installed"),
    ],
)
def test_wrong_package_versions(tmp_path, monkeypatch, requirement, expected):
    metadata = tmp_path / "ace_step_lora-0.1.0.dist-info"
    metadata.mkdir()
    text = f"Metadata-Version: 2.1\nName: ace-step-lora\nVersion: 0.1.0\nRequires-Dist: {requirement}\n"
    (metadata / "METADATA").write_text(text + 'Requires-Dist: not-asked-for; extra == "more"\n')
    monkeypatch.syspath_prepend(tmp_path)
    status, detail, fix = doctor._check_packages()
    assert status == "error" and detail.startswith(expected) and "requirements.txt" in fix
    assert "not-asked-for" not in detail


def test_the_extras_are_those_of_the_package(monkeypatch):
    config = configparser.ConfigParser()
    config.read(Path(__file__).resolve().parents[1] / "setup.cfg")
    assert set(config["options.extras_require"]) == set(doctor.EXTRAS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module == "av" or None)
    status, detail = doctor._check_extras()
    assert status == "ok" and detail.startswith("installed: av;") and "ace-step-lora[auto-tag,ray,s3" in detail


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")
    status, detail, fix = doctor._check_packages()
    assert status == "error" and "pip install -e ." in fix


def test_broken_import_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)  # what Python itself does to forbid an import
    check = doctor._run("audio", doctor._check_audio)
    assert check.status == "error" and "soundfile" in check.detail and "pip install" in check.fix


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built with CUDA")
def test_nvidia_gpu_with_a_cpu_build_of_torch(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    status, detail, fix = hardware.check_device()
    assert status == "error" and "built without CUDA" in detail and "pip install" in fix


def test_s3_without_boto3(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delenv("ACESTEP_S3_ROOT", raising=False)
    assert doctor._check_s3(False)[:2] == ("ok", "S3 support isn't installed")
    monkeypatch.setenv("ACESTEP_S3_ROOT", "s3://bucket")
    assert doctor._check_s3(False)[0] == "warning"


def test_s3_credentials_that_cannot_be_used(monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRET")
    status, detail, fix = doctor._check_s3(False)
    assert (
        status == "warning" and "AWS_SECRET_ACCESS_KEY" in detail and "SECRET" not in detail.replace("AWS_SECRET", "")
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    assert "no-such-profile" in doctor._check_s3(False)[1]


def test_tracker_folder_is_not_a_tracker(tmp_path, monkeypatch):
    installed = importlib.util.find_spec("wandb") is not None
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert ("wandb" in doctor._check_trackers()[1]) == installed


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://bucket/root", "s3://bucket/root"),
        ("https://user:pass@host:9000/a", "https://host:9000/a"),
        ("https://host/a?X-Amz-Signature=1#f", "https://host/a"),
        ("user:pass@host", "host"),
        ("http://[::1]:9000/a:b", "http://[::1]:9000/a:b"),
        ("https://key:secret", "(hidden: it may contain a password)"),
        ("https://key:se/cret@host", "(hidden: it may contain a password)"),
        ("https://key:se?cret@host", "(hidden: it may contain a password)"),
    ],
)
def test_addresses_lose_their_secrets(address, shown):
    assert paths.without_secrets(address) == shown


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ACESTEP_CACHE_DIR", raising=False)
    assert paths.cache_dir() == tmp_path / ".cache/acestep-lora"
    monkeypatch.setenv("ACESTEP_CACHE_DIR", "~/elsewhere")
    assert paths.cache_dir() == tmp_path / "elsewhere"


def test_full_directory(tmp_path):
    status, detail, fix = paths.check_directory(tmp_path / "new", 10**6, "move")
    assert status == "warning" and "less than 1000000 GiB" in detail and fix == "make room there, or move"
    assert list(tmp_path.iterdir()) == []


def test_model_and_data_that_were_named(tmp_path):
    assert paths.check_model("tiny")[0] == "ok"
    assert paths.check_model(str(tmp_path)) == ("ok", f"{tmp_path} (--pretrained_model_name_or_path) exists")
    assert paths.check_model("s3://user:pass@bucket/model")[1].startswith("s3://bucket/model (--")
    assert paths.check_data(str(tmp_path / "none"))[0] == "error"


def test_bf16_is_fast_agrees_with_the_kernel_and_the_clock():
    cpu = torch.device("cpu")
    fast = hardware.bf16_is_fast(cpu)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = set(cpuinfo.read_text().split())
        assert fast == bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})
    threads = torch.get_num_threads()
    started = time.monotonic()
    ratio = hardware.measure_bf16_ratio(cpu)
    assert time.monotonic() - started < 1 + 2  # 2 more for a busy machine
    assert torch.get_num_threads() == threads
    if not fast:
        assert ratio > 2  # 43 to 70 where this was written
    assert hardware.describe_device(cpu).startswith("CPU (")
    assert not hardware.bf16_is_fast(torch.device("mps"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_device():
    device = torch.device("cuda", 0)
    assert hardware.bf16_is_fast(device) == (torch.cuda.get_device_capability(device)[0] >= 8)
    assert hardware.measure_bf16_ratio(device) > 0
    assert torch.cuda.get_device_name(device) in hardware.describe_device(device)


CHECKS = [
    doctor.Check("one", "ok", "fine"),
    doctor.Check("two", "warning", "so so", "mend it"),
    doctor.Check("three", "error", "Müll ✗", "renew it"),
]


def test_printed_lines(capsys):
    assert doctor.print_checks(CHECKS) == 1
    assert capsys.readouterr().out.splitlines() == [
        "✓ one    fine",
        "! two    so so",
        "         fix: mend it",
        "✗ three  Müll ✗",
        "         fix: renew it",
        "3 checks: 1 ok, 1 warning, 1 error",
    ]
    assert doctor.print_checks(CHECKS[:2]) == 0


def test_printed_lines_where_only_ascii_can_be_shown(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert doctor.print_checks(CHECKS) == 1
    stdout.flush()
    lines = stdout.buffer.getvalue().decode("ascii").splitlines()
    assert lines[0] == "ok one    fine" and lines[3] == "!! three  M?ll ?"
