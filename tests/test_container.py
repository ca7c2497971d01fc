"""The image's entrypoint, run as it is but for the folders: one table, refusals, modes, the host script."""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from acestep_pipeline.container import checks, variables
from acestep_pipeline.container.command import SCRIPT, Folders, choose_command, train_arguments
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.training import arguments

ROOT = SCRIPT.parent
DOCKER = ROOT / "docker"
PLAIN = {"PATH": os.environ["PATH"], "NUM_GPUS": "0"}
# A value for each training variable that is not its default, and what it becomes.
VALUES = {"PRESET": "loo", "EXP_NAME": "night", "EPOCHS": "7", "MAX_TRAIN_STEPS": "9", "LEARNING_RATE": "0.003",
          "BATCH_SIZE": "2", "GRAD_ACCUM": "3", "GRAD_CLIP": "0.25", "RANK": "8", "ALPHA": "24.0", "DROPOUT": "0.2",
          "OPTIMIZER": "prodigy", "MIXED_PRECISION": "no", "MAX_DURATION_S": "33.0", "TRIGGER_WORD": "zxq",
          "VARIANT_DIR": "acestep-v15-sft", "VALIDATION_FRACTION": "0.1", "SEED": "5", "EVERY_N_TRAIN_STEPS": "11",
          "RESUME": "checkpoint-3", "REPORT_TO": "tensorboard", "PUSH_TO_S3": "night",
          "PUSH_TO_HUB": "yes", "HUB_MODEL_ID": "me/night", "HUB_PRIVATE_REPO": "yes", "HUB_TAG": "v1"}  # fmt: skip


@pytest.fixture
def folders(tmp_path):
    """Volumes as a container has them: the music is there, results and LoRA JSON are not yet."""
    for name in ("data", "output", "lora-cfg"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "song.ogg").write_bytes(b"")
    return Folders(tmp_path / "data", tmp_path / "output", tmp_path / "lora-cfg")


def train_args(environment, folders, *extra):
    return arguments.parse_args(train_arguments(environment, extra, folders))


def test_every_training_variable_sets_its_argument(folders):
    (folders.lora_config / "wide.json").write_text('{"r": 96}')
    environment = VALUES | {"LORA_CONFIG": "wide.json"}
    assert environment.keys() == {variable.name for variable in variables.TRAINING}
    args = train_args(environment, folders)
    for variable in variables.TRAINING:
        if variable.name != "LORA_CONFIG":
            becomes = {"yes": "True"}.get(environment[variable.name], environment[variable.name])
            assert str(getattr(args, variable.flag)) == becomes, variable
    assert args.lora_config == str(folders.lora_config / "wide.json")
    assert args.output_dir == str(folders.output / "night") and args.train_data_dir == str(folders.data)


def test_without_variables_it_is_recipe_c_and_a_restart_resumes(folders):
    args = train_args({}, folders)
    assert (args.preset, args.exp_name, args.resume_from_checkpoint) == ("c", "c-data", "latest")
    assert (args.rank, args.lora_config) == (64, None)
    assert train_args({"RESUME": "no", "RANK": ""}, folders).resume_from_checkpoint is None
    assert train_args({"RANK": "8"}, folders, "--rank", "16").rank == 16, "an argument of the command wins"
    (folders.lora_config / "only.json").write_text('{"r": 96}')
    assert train_args({}, folders).rank == 96
    (folders.lora_config / "other.json").write_text("{}")
    with pytest.raises(UsageError, match="has several files: only.json, other.json; choose one with LORA_CONFIG"):
        train_args({}, folders)
    with pytest.raises(UsageError, match="EXP_NAME=../x must be a plain name"):
        train_args({"EXP_NAME": "../x", "LORA_CONFIG": "only.json"}, folders)


def test_the_hub_is_published_to_by_variables_and_its_token_stays_in_the_environment(folders):
    environment = PLAIN | {"PUSH_TO_HUB": "yes", "HUB_MODEL_ID": "me/night", "HF_TOKEN": "hf_hush"}
    command = choose_command(environment, folders=folders)
    assert "--push_to_hub" in command.arguments and command.environment["HF_TOKEN"] == "hf_hush"
    assert not any("hf_hush" in argument for argument in command.arguments)
    smoke = choose_command(environment | {"MODE": "smoke"}, folders=folders)
    assert not any(argument.startswith(("--push", "--hub")) for argument in smoke.arguments)
    off = train_args({"PUSH_TO_HUB": "no"}, folders, "--push_to_hub")
    assert off.push_to_hub, "an argument of the command wins"
    assert refusal({"PUSH_TO_HUB": "true"}, folders) == "PUSH_TO_HUB must be yes or no, not 'true'."


def test_help_and_the_host_script_have_the_table():
    text = arguments.build_parser().format_help()
    for variable in variables.TRAINING:
        assert f"[container: {variable.name}]" in " ".join(text.split())
    script = (DOCKER / "train.sh").read_text()
    with_table = runpy.run_path(str(DOCKER / "write_variables.py"))["with_table"]
    assert with_table(script) == script, "run `make image-variables`"
    assert len(set(variables.NAMES)) == len(variables.NAMES)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("EPOCH", "EPOCH is not read; did you mean EPOCHS?"),
        ("LEARNING_RATES", "did you mean LEARNING_RATE?"),
        ("GRAD_ACUM", "did you mean GRAD_ACCUM?"),
        ("NUM_GPU", "did you mean NUM_GPUS?"),
        ("LORA_ALPHA", "LORA_ALPHA is not read; the variable's name is ALPHA."),
        ("NUM_TRAIN_EPOCHS", "the variable's name is EPOCHS."),
        ("WEIGHTING_SCHEME", "add --weighting_scheme VALUE to the command instead"),
        ("ACESTEP_MODLE", "did you mean ACESTEP_MODEL?"),
        ("ACESTEP_WHATEVER", "ACESTEP_WHATEVER is not read (known: ACESTEP_MODEL, "),
        ("ACESTEP_JOB_OUTPUT", "did you mean ACESTEP_JOBS_OUTPUT?"),
    ],
)
def test_a_misspelt_variable_is_an_error(folders, name, said):
    for environment in ({name: "1"}, {variables.HOST_NAMES: f"HOME {name}"}):
        with pytest.raises(UsageError) as error:
            choose_command(PLAIN | environment, folders=folders)
        assert said in str(error.value)


def test_others_variables_are_left_alone():
    """What shells, desktops, clouds, CUDA images and launchers set."""
    names = """HOME PATH USER LOGNAME SHELL TERM LANG LC_ALL LANGUAGE PWD OLDPWD SHLVL MAIL EDITOR PAGER LESS
        DISPLAY TZ HOSTNAME NAME HOST MODEL DATA OUTPUT IMAGE CACHE SPEED DEBUG LOG_LEVEL LOG_FILE
        LOGGING_DIR CACHE_DIR REVISION STRICT OFFLOAD LOCAL_RANK WORLD_SIZE NODE_RANK GROUP_RANK
        MASTER_ADDR MASTER_PORT OMP_NUM_THREADS CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES
        NVIDIA_DRIVER_CAPABILITIES CUDA_VERSION NV_CUDA_LIB_VERSION RUNPOD_POD_ID RUNPOD_GPU_COUNT
        RUNPOD_API_KEY MODAL_TASK_ID AWS_ENDPOINT_URL_S3 AWS_PROFILE AWS_LAMBDA_FUNCTION_NAME HF_HOME
        HF_HUB_CACHE HTTP_PROXY http_proxy KUBERNETES_SERVICE_HOST SSH_AUTH_SOCK XDG_SESSION_ID
        PYTHONUNBUFFERED VIRTUAL_ENV PIP_NO_CACHE_DIR SKYPILOT_NUM_GPUS_PER_NODE GIT_DIR NUM_CPUS
        SLURM_JOB_ID PRETTY_NAME TRANSFORMERS_CACHE WANDB_MODE SECONDS RANDOM""".split()
    flags = vars(arguments.build_parser().parse_args([]))
    variables.check_names(names, flags=flags)
    variables.check_names(variables.NAMES, flags=flags)
    handlers = "".join(path.read_text() for path in (ROOT / "serverless").glob("*.py"))
    handlers += "".join(path.read_text() for path in (ROOT / "acestep_pipeline" / "jobs").glob("*.py"))
    read = set(re.findall(r"\bACESTEP_[A-Z0-9_]*[A-Z0-9]", handlers))
    assert "ACESTEP_JOBS_DATA" in read
    variables.check_names(read, flags=flags)


def test_the_command_has_none_of_the_variables_it_was_made_of(folders):
    command = choose_command(PLAIN | {"RANK": "8", "AWS_REGION": "x", variables.HOST_NAMES: "HOME"}, folders=folders)
    assert command.arguments[:2] == [sys.executable, str(SCRIPT)] and command.directory == folders.output
    assert command.arguments[command.arguments.index("--rank") + 1] == "8"
    assert "RANK" not in command.environment, "it would be the process's number to torch"
    assert variables.HOST_NAMES not in command.environment and command.environment["AWS_REGION"] == "x"


def refusal(environment, folders, *extra):
    with pytest.raises((UsageError, RunError)) as error:
        choose_command(PLAIN | environment, extra, folders=folders)
    assert str(error.value).count("\n") == 0
    return str(error.value)


def test_what_cannot_work_is_refused_in_a_sentence(folders, tmp_path):
    assert (
        refusal({"MODE": "trian"}, folders)
        == "MODE must be one of train, smoke, generate, dataset, runpod, lambda, shell, not 'trian'."
    )
    assert "LOG_FORMAT must be plain or json" in refusal({"LOG_FORMAT": "xml"}, folders)
    assert "NUM_GPUS must be a number of GPUs" in refusal({"NUM_GPUS": "all"}, folders)
    (tmp_path / "file").write_text("")
    not_a_folder = Folders(folders.data, tmp_path / "file", folders.lora_config)
    assert "can't be written by user" in refusal({}, not_a_folder)
    empty = Folders(folders.lora_config, folders.output, folders.lora_config)
    assert f"{folders.lora_config} is empty: mount a folder of music" in refusal({}, empty)
    assert "is empty: mount a folder of music" in refusal({"MODE": "dataset"}, empty)
    assert choose_command(PLAIN | {"ACESTEP_DATA": "s3://bucket/music"}, folders=empty)
    assert choose_command(PLAIN, ["--dataset_name", "someone/music"], folders=empty)
    with pytest.raises(RunError, match=r"/dev/shm has 0\.06 GiB free and 2 GPUs need 0\.25; start .* --shm-size 4g"):
        checks.check_shared_memory(2, free_bytes=64 * 1024**2)
    checks.check_shared_memory(1, free_bytes=0)


def test_without_a_gpu_the_cpu_has_to_be_asked_for(folders):
    """In a process of its own, to which no GPU is visible."""
    code = "import sys; from acestep_pipeline.container.checks import choose_num_processes as c; print(c({}))"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SCRIPT.parent)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "RunError: no GPU can be used: " in result.stderr
    assert result.stderr.endswith("or set NUM_GPUS=0 to train on the CPU.\n")


def test_audio_needs_neither_torchcodec_nor_torchaudio(tmp_path):
    """Reading music and writing it, which the smoke test tries first, with both out of reach."""
    code = (
        "import sys, pathlib; sys.modules |= dict.fromkeys(('torchcodec', 'torchaudio'))\n"
        "from acestep_pipeline.container.smoke import SmokeTest\n"
        "print(SmokeTest(0, pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1], 'none'), []).audio())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.startswith("6 tracks in ") and result.stdout.endswith(", wrote wav, flac, ogg\n"), (
        result.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_modes_of_the_command_line_tool(folders, capsys):
    command = choose_command(PLAIN | {"MODE": "generate", "EPOCHS": "3"}, ["--prompt", "x"], folders=folders)
    assert command.arguments[1:] == ["-m", "acestep_pipeline.cli", "generate", "--prompt", "x"]
    assert "warning: EPOCHS does nothing with MODE=generate." in capsys.readouterr().err
    command = choose_command(PLAIN | {"MODE": "dataset"}, ["--balance"], folders=folders)
    flags = ["--data-dir", str(folders.data), "--output-dir", str(folders.output / "dataset"), "--validate-audio"]
    assert command.arguments[1:] == ["-m", "acestep_pipeline.cli", "dataset", "build", *flags, "--balance"]
    assert choose_command({"MODE": "shell", "RANK": "1"}, ["-c", "true"], folders=folders).arguments == [
        "/bin/sh", "-c", "true",
    ]  # fmt: skip


def test_modes_of_the_serverless_vendors(folders, tmp_path, capsys):
    handlers = ROOT / "serverless"
    command = choose_command(PLAIN | {"MODE": "runpod", "RANK": "8"}, ["--rp_serve_api"], folders=folders)
    assert command.arguments[1:] == [str(handlers / "runpod_handler.py"), "--rp_serve_api"]
    assert "warning: RANK does nothing with MODE=runpod." in capsys.readouterr().err
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "", "NUM_GPUS is 0"
    assert checks.wants_gpu({}, devices=[tmp_path / "none", tmp_path])
    with pytest.raises(RunError, match=f"no GPU can be used: there is no {tmp_path}/none; .* or set NUM_GPUS=0"):
        checks.wants_gpu({}, devices=[tmp_path / "none"])
    assert Path(command.arguments[1]).is_file() and (handlers / "lambda_handler.py").is_file()
    (tmp_path / "file").write_text("")
    assert "can't be written" in refusal({"MODE": "runpod", "ACESTEP_JOBS_OUTPUT": f"{tmp_path}/file"}, folders)

    cache = {"HOME": str(folders.cache), "ACESTEP_CACHE_DIR": f"{folders.cache}/acestep-lora", "X": "/cached"}
    settings = PLAIN | cache | {"MODE": "lambda", "AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9001"}
    unwritable = Folders(folders.data, tmp_path / "file", folders.lora_config)
    command = choose_command(settings, folders=unwritable)
    assert command.arguments[1:] == ["-m", "awslambdaric", "lambda_handler.handler"] and command.directory == handlers
    temporary = tempfile.gettempdir()
    moved = {"HOME": f"{temporary}/cache", "ACESTEP_CACHE_DIR": f"{temporary}/cache/acestep-lora", "X": "/cached"}
    assert {name: command.environment[name] for name in moved} == moved
    assert "takes no arguments; leave out x.handler" in refusal(settings, folders, "x.handler")
    assert "runs in AWS Lambda, which sets AWS_LAMBDA_RUNTIME_API" in refusal({"MODE": "lambda"}, folders)


def host_script(tmp_path, *extra, **environment):
    """`train.sh` in an empty folder, with `echo` in the engine's place: what it would run."""
    settings = {"PATH": os.environ["PATH"], "ENGINE": "echo"} | {
        name: str(value) for name, value in environment.items()
    }
    return subprocess.run(
        [DOCKER / "train.sh", *extra], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=60
    )


def test_the_host_script_mounts_folders_and_passes_variables_by_name(tmp_path):
    for name in ("music", "base", "cfg"):
        (tmp_path / name).mkdir()
    (tmp_path / "cfg" / "wide.json").write_text("{}")
    result = host_script(
        tmp_path, "--rank", "4", DATA="music", MODEL="base", LORA_CONFIG="cfg/wide.json", EPOCHS=3, CACHE="c/d",
        AWS_SECRET_ACCESS_KEY="hush", EPOCHSS=3, ACESTEP_CACHE_DIR="/host",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    words = result.stdout.split()
    assert words[:3] == ["run", "--rm", "--init"] and words[-3:] == ["acestep-lora", "--rank", "4"]
    for mount in (f"{tmp_path}/music:/data:ro", f"{tmp_path}/base:/model:ro", f"{tmp_path}/cfg:/lora-cfg:ro",
                  f"{tmp_path}/output:/output:rw", f"{tmp_path}/c/d:/cache:rw"):  # fmt: skip
        assert words[words.index(mount) - 1] == "--volume"
    passed = {words[index + 1] for index, word in enumerate(words) if word == "--env"}
    assert passed == {"EPOCHS", "LORA_CONFIG", "AWS_SECRET_ACCESS_KEY", "ACESTEP_HOST_NAMES"}
    assert "hush" not in result.stdout and "--shm-size" in words and "--stop-timeout" in words


def test_the_host_script_says_what_is_wrong(tmp_path):
    assert host_script(tmp_path, DATA="nowhere").stderr == "error: nowhere, for /data, is no folder.\n"
    assert host_script(tmp_path, LORA_CONFIG="x.json").stderr == "error: LORA_CONFIG=x.json is no file.\n"
    address = host_script(tmp_path, DATA="s3://bucket/music", MODEL="tiny").stdout.split()
    assert "ACESTEP_DATA" in address and "ACESTEP_MODEL" in address and not any(":/data" in word for word in address)


def test_the_linters_have_nothing_to_say():
    for linter, files in (("shellcheck", DOCKER.glob("*.sh")), ("hadolint", DOCKER.glob("Dockerfile.*"))):
        result = subprocess.run([Path(sys.executable).with_name(linter), *files], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


AUDIT = DOCKER / "audit.py"
LOCKS = (DOCKER / "requirements.lock", DOCKER / "requirements-cpu.lock")


def test_the_image_has_what_the_requirements_pin():
    """The locks are of the present requirements, the CPU's without CUDA."""
    read_lock = runpy.run_path(str(AUDIT))["read_lock"]
    pinned = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    for lock, local in zip(LOCKS, ("", "+cpu"), strict=True):
        versions, _ = read_lock(lock)
        missing = [
            name
            for name, version in pinned
            if not versions[name.lower().replace("_", "-")] & {version, f"{version}{local}"}
        ]
        assert not missing, f"run `make image-locks`: {missing} are not in {lock}"
        assert {"boto3", "pydantic", "runpod", "awslambdaric"} <= versions.keys()
        assert any(name.startswith("nvidia-") for name in versions) == (not local)


def audit(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, AUDIT, *arguments], capture_output=True, text=True)


def test_an_audit_passes_locks_with_hashes_and_images_of_what_they_pin(tmp_path):
    sbom = tmp_path / "sbom.json"
    sbom.write_text(json.dumps({"components": [component("numpy", "2.4.6"), component("ace-step-lora", "9")]}))
    result = audit(*LOCKS, "--sbom", sbom)
    assert result.returncode == 0 and "each pinned with the hashes" in result.stdout, result.stderr
    sbom.write_text(json.dumps({"components": [component("numpy", "2.4.5"), component("evil", "1")]}))
    result = audit(*LOCKS, "--sbom", sbom)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"error: {sbom}: evil 1 is installed; locked: none.",
        f"error: {sbom}: numpy 2.4.5 is installed; locked: 2.4.6.",
    ]
    assert audit(tmp_path / "no.lock").stderr.endswith("no.lock is no file.\n")


def component(name: str, version: str) -> dict:
    return {"name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a>=2 --hash=sha256:" + 64 * "0", "a is not pinned with ==."),
        ("a==2.* --hash=sha256:" + 64 * "0", "a is not pinned with ==."),
        ("a @ https://example.com/a.whl --hash=sha256:" + 64 * "0", "a is not pinned with ==."),
        ("a==2", "a has no SHA-256 of its files."),
        ("a==2 --hash=md5:00", "a has no SHA-256 of its files."),
        ("--extra-index-url https://example.com", "'--extra-index-url https://example.com' is no requirement"),
        ("# nothing", "pins nothing."),
    ],
)
def test_an_audit_refuses_what_pins_no_files(line, said, tmp_path):
    (tmp_path / "x.lock").write_text(f"{line}\n")
    problems = runpy.run_path(str(AUDIT))["read_lock"](tmp_path / "x.lock")[1]
    assert len(problems) == 1 and said in problems[0]
