"""The image, really built and run, without an engine: `make image-test` (root on Debian with buildah and debootstrap).

It is built twice on a base of debootstrap's, the CPU build of PyTorch in the place of CUDA's, and used as an engine
would use it: its entrypoint, user, volumes, health check. Some gigabytes and minutes; ACESTEP_IMAGE_DIR (default
/var/tmp/acestep-image) is where, and is kept for the next time.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from acestep_pipeline.data.demo_music import render_demo_dataset
from acestep_pipeline.tiny_checkpoint import tiny_checkpoint_path
from tests.lambda_runtime import running_runtime
from tests.runpod_queue import KEY as RUNPOD_KEY
from tests.runpod_queue import running_queue

ROOT = Path(__file__).resolve().parents[1]
WORK = Path(os.environ.get("ACESTEP_IMAGE_DIR", "/var/tmp/acestep-image"))
BASE, IMAGE = "localhost/acestep-base:1", "localhost/acestep-lora:test"
BUILDAH = ["buildah", "--root", str(WORK / "storage"), "--runroot", str(WORK / "run"), "--storage-driver", "vfs"]
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
VOLUMES = ("/model", "/data", "/output", "/lora-cfg", "/cache")
FOREIGN_USER = "12345:12345"
SHORT = {"NUM_GPUS": "0", "PRESET": "smoke", "RANK": "4", "ALPHA": "6", "SEED": "7", "MAX_DURATION_S": "2",
         "EXP_NAME": "night"}  # fmt: skip
JOB_ARGUMENTS = {"preset": "smoke", "max_train_steps": 2, "max_duration_s": 2, "rank": 4, "mixed_precision": "no",
                 "num_validation_samples": 0}  # fmt: skip
RUNPOD = {"MODE": "runpod", "NUM_GPUS": "0"}
FLAGS = ["--num_validation_samples", "0", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"]


def buildah(*arguments, check=True) -> str:
    result = subprocess.run([*BUILDAH, *map(str, arguments)], capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return result.stdout.strip()


def build(tag: str, *flags: str) -> None:
    """Build as an engine would; wheels may also come from where pip is told to look on this machine."""
    wheels = os.environ.get("PIP_FIND_LINKS")
    arguments = ["--build-arg", f"BASE={BASE}", "--build-arg", "LOCK=docker/requirements-cpu.lock"]
    arguments += ["--build-arg", f"PIP_CERT={CERTIFICATES}", "--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
    if wheels:
        arguments += ["--build-arg", f"PIP_FIND_LINKS={wheels}", "--volume", f"{wheels}:{wheels}:ro"]
    else:
        arguments += ["--build-arg", "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"]
    buildah("bud", "--isolation", "chroot", "--network", "host", "--format", "docker", *arguments, *flags,
            "--file", ROOT / "docker" / "Dockerfile.trainer", "--tag", tag, ROOT)  # fmt: skip


@pytest.fixture(scope="session")
def container():
    """A container of the image, without its declared volumes: `buildah run` 1.28 lays those over what is mounted."""
    WORK.mkdir(parents=True, exist_ok=True)
    if BASE not in buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
        if not (WORK / "rootfs").is_dir():
            packages = "python3,python3-venv,ca-certificates,tini"
            command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", WORK / "rootfs.new"]
            subprocess.run(command, check=True)
            (WORK / "rootfs.new").rename(WORK / "rootfs")
        scratch = buildah("from", "scratch")
        buildah("copy", "--quiet", scratch, WORK / "rootfs", "/")
        buildah("commit", "--quiet", scratch, BASE)
        buildah("rm", scratch)
    build(IMAGE)
    name = buildah("from", IMAGE)
    for volume in VOLUMES:
        buildah("config", "--volume", f"{volume}-", name)
    yield name
    buildah("rm", name)


@pytest.fixture(scope="session")
def config(container):
    return json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]


@pytest.fixture
def volumes(tmp_path):
    """Host folders, read-only but for output and cache, owned by root, whom the container's user is not."""
    render_demo_dataset(tmp_path / "data", num_clips=4, duration_s=12.0)
    shutil.copytree(tiny_checkpoint_path(), tmp_path / "model")
    for name in ("output", "cache", "lora-cfg"):
        (tmp_path / name).mkdir()
    for name in ("output", "cache"):
        (tmp_path / name).chmod(0o777)
    for file in (tmp_path / "model").rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    return tmp_path


def mounts(volumes: Path, *names: str) -> list[str]:
    """Flags for these volumes, as docs/container.md mounts them."""
    writable = ("output", "cache")
    return [f"--volume={volumes / name}:/{name}:{'rw' if name in writable else 'ro'}" for name in names]


def command_of(container, config, flags, arguments, environment, entrypoint=True) -> list[str]:
    words = config["Entrypoint"] if entrypoint else []
    settings = [f"--env={name}={value}" for name, value in environment.items()]
    return [*BUILDAH, "run", "--isolation", "chroot", *flags, *settings, container, "--", *words, *arguments]


def run(container, config, *arguments, flags=(), entrypoint=True, **environment) -> subprocess.CompletedProcess:
    """The image's entrypoint, as its user unless `flags` say otherwise."""
    command = command_of(container, config, flags, arguments, environment, entrypoint)
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)


def file_hashes(container) -> dict[str, str]:
    """What every file of the image is: content, or target of a link."""
    root = Path(buildah("mount", container))
    hashes = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            hashes[str(path.relative_to(root))] = hashlib.sha256(content).hexdigest()
    return hashes


def test_what_the_image_says_of_itself(container, config):
    image = json.loads(buildah("inspect", "--type", "image", IMAGE))
    assert config["User"] == "10001:10001" and config["Entrypoint"] == ["tini", "-s", "--", "/opt/entrypoint.sh"]
    assert set(config["Volumes"]) == set(VOLUMES)
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert config["Healthcheck"]["Test"][:3] == ["CMD", "acestep-lora", "doctor"]
    history = [step.get("created_by", "") for step in image["OCIv1"]["history"]]
    words = " ".join([*config["Env"], *config["Labels"].values(), *history]).upper()
    assert history and not any(secret in words for secret in ("TOKEN", "SECRET", "PASSWORD", "ACCESS_KEY", "PIP_"))


def test_there_is_no_compiler_no_installer_and_a_list_of_what_there_is(container, config):
    tools = "for tool in cc gcc g++ clang ld make pip pip3 uv; do command -v $tool && exit 1; done; exit 0"
    result = run(container, config, "sh", "-c", tools, entrypoint=False)
    assert result.returncode == 0, result.stdout
    sbom = json.loads(run(container, config, "cat", "/opt/sbom.cdx.json", entrypoint=False).stdout)
    versions = {component["purl"].partition("@")[0]: component["version"] for component in sbom["components"]}
    assert versions["pkg:pypi/torch"] == "2.13.0+cpu" and "pkg:deb/tini" in versions
    assert "pkg:pypi/ace-step-lora" in versions and "pkg:pypi/pytest" not in versions


def test_two_builds_differ_in_no_file(container):
    again = f"{IMAGE}-again"
    build(again, "--no-cache")
    other = buildah("from", again)
    fresh = buildah("from", IMAGE)
    first, second = file_hashes(fresh), file_hashes(other)
    buildah("rm", fresh, other)
    assert len(first) > 5000
    assert {path for path in first.keys() | second.keys() if first.get(path) != second.get(path)} == set()
    buildah("rmi", again)


def test_the_health_check_passes(container, config):
    result = run(container, config, *config["Healthcheck"]["Test"][1:], entrypoint=False)
    assert result.returncode == 0, result.stdout


def test_smoke_with_nothing_mounted(container, config):
    result = run(container, config, MODE="smoke", NUM_GPUS="0")
    assert result.returncode == 0, result.stdout[-5000:]
    summary = result.stdout[result.stdout.index("Smoke test passed:") :].splitlines()[1:6]
    assert [line.split()[1] for line in summary] == ["device:", "audio:", "loop:", "checkpoint:", "adapter:"]
    print("\n".join(summary))


def test_smoke_on_mounted_model_and_music_as_a_foreign_user(container, config, volumes):
    flags = [*mounts(volumes, "data", "model", "output", "cache"), "--user", FOREIGN_USER]
    result = run(container, config, flags=flags, MODE="smoke", NUM_GPUS="0")
    assert result.returncode == 0, result.stdout[-5000:]
    assert "4 tracks in /data" in result.stdout and "updates of /model" in result.stdout
    owner = (volumes / "output" / "smoke" / "pytorch_lora_weights.safetensors").stat().st_uid
    assert owner == int(FOREIGN_USER.partition(":")[0])


def test_overrides_reach_the_run_and_mounts_are_read_only(container, config, volumes):
    (volumes / "lora-cfg" / "cfg.json").write_text('{"target_modules": ["to_q"], "r": 16}')
    flags = [*mounts(volumes, "data", "model", "output", "cache", "lora-cfg"), "--user", FOREIGN_USER]
    before = sorted(path for path in volumes.joinpath("data").rglob("*"))
    result = run(container, config, *FLAGS, flags=flags, **SHORT, MAX_TRAIN_STEPS="2", LEARNING_RATE="0.002")
    assert result.returncode == 0, result.stdout[-5000:]
    written = json.loads((volumes / "output" / "night" / "training_args.json").read_text())
    args = written["arguments"]
    assert [args[name] for name in ("rank", "lora_alpha", "seed", "learning_rate", "max_train_steps")] == [
        4, 6.0, 7, 0.002, 2,
    ]  # fmt: skip
    assert args["lora_layers"] == "to_q"
    assert sorted(path for path in volumes.joinpath("data").rglob("*")) == before
    for folder in ("data", "model", "lora-cfg"):
        root = [flag if flag != FOREIGN_USER else "0:0" for flag in flags]
        refused = run(container, config, "touch", f"/{folder}/x", flags=root, entrypoint=False)
        assert refused.returncode != 0 and "Read-only file system" in refused.stdout


def test_sigterm_gives_143_and_the_same_command_resumes(container, config, volumes):
    flags = [*mounts(volumes, "data", "model", "output", "cache"), "--user", FOREIGN_USER]
    output = volumes / "output" / "night"
    command = command_of(container, config, flags, FLAGS, SHORT | {"MAX_TRAIN_STEPS": "5000"})

    def until_updates(number: int, log: Path) -> subprocess.Popen:
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)
        deadline = time.monotonic() + 300
        metrics = output / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < number:
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.1)
        return process

    def stop(process: subprocess.Popen) -> int:
        """As an engine: SIGTERM to the container's first process."""
        (first,) = (child for child in psutil.Process(process.pid).children(recursive=True) if child.name() == "tini")
        first.send_signal(signal.SIGTERM)
        return process.wait(timeout=120)

    assert stop(until_updates(2, volumes / "log")) == 143
    done = len((output / "metrics.jsonl").read_text().splitlines())
    assert (output / f"checkpoint-{done}").is_dir()
    assert f"stopped by SIGTERM after update {done} of 5000." in (volumes / "log").read_text()
    assert stop(until_updates(done + 1, volumes / "log")) == 143
    assert f"{done} of 5000 updates are done." in (volumes / "log").read_text()


def test_what_is_installed_is_what_the_lock_pins(container, config, tmp_path):
    sbom = tmp_path / "sbom.json"
    sbom.write_text(run(container, config, "cat", "/opt/sbom.cdx.json", entrypoint=False).stdout)
    command = [sys.executable, ROOT / "docker" / "audit.py", ROOT / "docker" / "requirements-cpu.lock", "--sbom", sbom]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@contextlib.contextmanager
def serving(container, config, volumes, environment: dict[str, str], *arguments):
    """The image's entrypoint at work; what it printed is in `log`, and SIGTERM ends it."""
    flags = [*mounts(volumes, "data", "model", "output", "cache"), "--user", FOREIGN_USER]
    command = command_of(container, config, flags, arguments, environment)
    with (volumes / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate() if child.name() == "tini" else None
        process.wait(timeout=120)


def test_mode_runpod_takes_jobs_of_runpods_queue(container, config, volumes):
    job = {"task": "generate", "prompt": "piano", "duration_s": 1, "num_inference_steps": 2, "format": "ogg"}
    training = {"task": "train", "name": "jazz", "data": ".", "arguments": JOB_ARGUMENTS}
    with running_queue() as jobs, serving(container, config, volumes, jobs.environment | RUNPOD):
        jobs.put("music", job)
        assert jobs.wait(lambda: jobs.results.get("music"), 600)["output"][-1]["status"] == "done", jobs.results
        jobs.put("training", training)
        result = jobs.wait(lambda: jobs.results.get("training"), 600)["output"][-1]
        assert result["status"] == "done" and result["update"] == 2, result
    assert (volumes / "output" / "jazz" / "pytorch_lora_weights.safetensors").is_file()
    assert RUNPOD_KEY not in (volumes / "log").read_text()


def test_modes_dataset_and_generate_with_a_log_of_json(container, config, volumes):
    flags = [*mounts(volumes, "data", "model", "output", "cache"), "--user", FOREIGN_USER]
    result = run(container, config, flags=flags, MODE="dataset", LOG_FORMAT="json")
    assert result.returncode == 0, result.stdout[-5000:]
    assert all(
        {"time", "stream", "level", "message"} == json.loads(line).keys() for line in result.stdout.splitlines()
    )
    assert (volumes / "output" / "dataset" / "report.html").is_file()
    arguments = ["--prompt", "piano", "--duration", "1", "--num_inference_steps", "2", "--output", "night.wav"]
    result = run(container, config, *arguments, flags=flags, MODE="generate")
    assert result.returncode == 0 and (volumes / "output" / "night.wav").is_file(), result.stdout[-5000:]


def test_mode_lambda_answers_and_writes_below_tmp_alone(container, config, volumes):
    for name in ("output", "cache"):
        (volumes / name).chmod(0o755)  # on Lambda nobody may write there
    job = {"task": "validate_dataset", "data": "."}
    with running_runtime() as runtime:
        environment = {"MODE": "lambda", "AWS_LAMBDA_RUNTIME_API": runtime.address}
        with serving(container, config, volumes, environment):
            result = runtime.invoke(job)
            refused = runtime.invoke(job | {"data": "/etc"})
    assert result["status"] == "done" and result["tracks"] == 4, result
    assert {file["file"] for file in result["results"]["files"]} == {"dataset_card.md", "report.html", "report.json"}
    assert refused["status"] == "refused" and "lies outside /data" in refused["error"]


def test_modal_finds_python_and_the_package_and_the_entrypoint_is_not_needed(container, config):
    """Its functions are started by Modal's own program, as root, with `python` of the PATH."""
    code = "import acestep_pipeline.jobs.worker as w, train_ace_step_lora, sys; w.Worker(); print(sys.executable)"
    result = run(container, config, "python", "-c", code, flags=["--user", "0:0"], entrypoint=False)
    assert result.stdout == "/opt/venv/bin/python\n", result.stdout


@pytest.mark.parametrize(
    ("names", "environment", "said"),
    [
        (("output",), {"MODE": "runpod", "NUM_GPUS": ""}, "error: no GPU can be used: there is no /dev/nvidiactl"),
        (("output",), {"MODE": "lambda"}, "error: MODE=lambda runs in AWS Lambda"),
        (("data",), {"EPOCH": "1"}, "error: EPOCH is not read; did you mean EPOCHS?"),
        (("output",), {}, "error: /data is empty: mount a folder of music"),
        (("data", "output"), {"NUM_GPUS": ""}, "error: no GPU can be used: "),
        (("data", "cache"), {"READ_ONLY": "1"}, "error: /output can't be written by user 12345 (Permission denied)"),
    ],
)
def test_refusals_are_one_sentence_and_a_status(container, config, volumes, names, environment, said):
    flags = [*mounts(volumes, *names), "--user", FOREIGN_USER]
    if environment.pop("READ_ONLY", None):
        (volumes / "locked").mkdir(mode=0o755)
        flags.append(f"--volume={volumes / 'locked'}:/output:rw")
    result = run(container, config, flags=flags, **{"NUM_GPUS": "0"} | environment)
    assert result.returncode == (1 if "GPU" in said else 2)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("error: "))
    assert line.startswith(said) and "Traceback" not in result.stdout
