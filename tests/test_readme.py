"""README.md and docs/ are true: their commands parse or run, links lead somewhere, the table is the presets', the
map is the tree."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from accelerate.commands.launch import launch_command_parser

from acestep_pipeline import cli
from acestep_pipeline.adapters import trainable as adapters
from acestep_pipeline.container.variables import NAMES
from acestep_pipeline.presets import load_preset, preset_names
from acestep_pipeline.training import arguments

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
# The other pages' commands are those of engines and clouds.
PAGES = (README, *(ROOT / "docs" / f"{name}.md" for name in ("data", "training", "adapters", "storage")))
SCRIPTS = ("examples/fetch_free_music.sh", "./docker/train.sh")
VENV = Path(sys.executable).parents[1]


def blocks(language: str) -> list[str]:
    """The contents of the pages' code blocks in `language` ("" for those without one)."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [content for name, content in found if name == language]


def shell_commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) and line for line in lines if line.strip()]


def make(*targets: str) -> subprocess.CompletedProcess:
    """`make` with this interpreter's environment taken as set up."""
    command = ["make", "--no-print-directory", f"VENV={VENV}", "-o", f"{VENV}/.installed", *targets]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


def test_every_command_is_one_that_exists():
    kinds = set()
    for command in shell_commands():
        words = shlex.split(command, comments=True)
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            assert words.pop(0).partition("=")[0] in (*NAMES, "DATA")
        if words[0] == "make":
            result = make("--dry-run", *words[1:])
            assert result.returncode == 0, result.stderr
        elif words[:2] == ["accelerate", "launch"]:
            launch = launch_command_parser().parse_args(words[2:])
            assert launch.training_script == "train_ace_step_lora.py"
            assert launch.config_file is None or (ROOT / launch.config_file).is_file()
            assert arguments.parse_args(launch.training_script_args).preset in preset_names()
        elif words[:2] == ["python", "scripts/build_multi_style_dataset.py"]:
            cli.build_parser().parse_args(["dataset", "build", *words[2:]])
        elif words[0] == "python":
            runpy.run_path(str(ROOT / words[1]))["parse_args"](words[2:])
        elif words[0] == "acestep-lora":
            cli.build_parser().parse_args(words[1:])
        elif words[:3] == ["docker", "build", "-f"]:
            assert (ROOT / words[3]).is_file()
        else:
            assert os.access(ROOT / words[0], os.X_OK), command
        kinds.add(words[0])
    assert kinds == {"make", "accelerate", "acestep-lora", "python", "docker", *SCRIPTS}


def test_the_python_examples_run(tmp_path, tiny_pipeline, monkeypatch):
    parameters = adapters.add_lora(tiny_pipeline.transformer, adapters.LoraSettings(r=2), seed=0)
    for parameter in parameters:
        parameter.data.fill_(0.01)  # as if trained: it starts as zero
    adapters.save_lora(tiny_pipeline.transformer, tmp_path / "jazz")
    code = "\n".join(blocks("python"))  # the later ones use the first one's pipeline
    for ours, theirs in (
        ('"ACE-Step/Ace-Step1.5", variant_dir="acestep-v15-base"', '"tiny"'),
        ("output/c-my_music", str(tmp_path / "jazz")),
        ("s3://bucket/lora", str(tmp_path)),
        ("audio_duration=60", "audio_duration=2, num_inference_steps=1"),
    ):
        assert ours in code
        code = code.replace(ours, theirs)
    names: dict = {}
    exec(code, names)
    assert names["audio"].shape == (1, 2, 96000)


def test_the_presets_table_is_the_presets():
    lines = README.read_text(encoding="utf-8").splitlines()
    for name, column in (("c", 1), ("loo", 2)):
        preset = load_preset(name)
        rows = {row.split("|")[1].strip(): row.split("|")[column + 1].strip() for row in lines
                if row.startswith("| ") and row.count("|") == 5}  # fmt: skip
        assert (
            rows["rank / alpha / dropout"] == f"{preset['rank']} / {preset['lora_alpha']} / {preset['lora_dropout']}"
        )
        assert float(rows["learning rate"].split(",")[0]) == preset["learning_rate"]
        assert rows["length"] == f"{preset['num_train_epochs']} epochs"
        assert rows["windows in an update"] == str(preset["effective_batch_size"])
        assert float(rows["gradient clip"]) == preset["max_grad_norm"]
    smoke = load_preset("smoke")
    assert (smoke["max_train_steps"], smoke["max_train_samples"], smoke["max_duration_s"]) == (5, 5, 30)
    assert [smoke[name] for name in ("rank", "lora_alpha", "lora_dropout", "learning_rate")] == [
        load_preset("c")[name] for name in ("rank", "lora_alpha", "lora_dropout", "learning_rate")
    ]


def test_every_preset_sets_only_flags_that_exist():
    known = vars(arguments.parse_args([]))
    for name in preset_names():
        assert load_preset(name).keys() <= known.keys(), name


def test_the_map_is_the_tree():
    tree = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    modules = {path.stem for path in (ROOT / "acestep_pipeline").rglob("*.py")} - {"__init__", "version"}
    missing = {module for module in modules if not re.search(rf"\b{module}\b", tree)}
    assert not missing, f"not in docs/map.md: {missing}"
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]  # no environments
    there = {path.name for folder in folders for path in folder.rglob("*.py")} | {
        path.name for path in ROOT.glob("*.py")
    }
    assert not set(re.findall(r"\b(\w+\.py)\b", tree)) - there, "in docs/map.md but not in the tree"


def test_every_link_leads_somewhere():
    def anchors(page: Path) -> set[str]:  # as GitHub makes them
        heads = re.findall(
            r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.M
        )
        return {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}

    links = [
        (page, target, anchor)
        for page in (README, *(ROOT / "docs").glob("*.md"))
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 15
    for page, target, anchor in links:
        path = page.parent / target if target else page
        assert path.exists() and (not anchor or anchor in anchors(path)), f"{page.name}: {target}#{anchor}"


def test_make_train_trains_and_writes_what_it_names(tmp_path):
    output = tmp_path / "run"
    result = make("train", f"OUTPUT={output}")
    assert result.returncode == 0, result.stderr[-3000:]
    with_adapter, without = (output / "samples" / f"sample-0_{kind}_adapter.wav" for kind in ("with", "without"))
    for named in (output / adapters.LORA_WEIGHTS_NAME, with_adapter, without, output / "README.md"):
        assert str(named) in result.stdout and named.is_file()
    heard = [soundfile.read(path)[0] for path in (with_adapter, without)]
    assert heard[0].shape == heard[1].shape and abs(heard[0] - heard[1]).max() > 0.01, "the adapter is heard"
    assert "--preset c" in result.stdout.splitlines()[-1], "it ends with the command for real weights"


@pytest.mark.slow
def test_both_commands_work_in_a_fresh_clone(tmp_path):
    """Clone, `make train`, look at the style check: as a newcomer would, downloads included."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {**os.environ, "ACESTEP_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(["make", "train"], cwd=clone, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert list((clone / "output").glob("*/samples/*_with_adapter.wav"))
    again = subprocess.run(["make", "quality"], cwd=clone, capture_output=True, text=True, timeout=60, env=environment)
    assert again.returncode == 0 and "pip" not in again.stdout, "set-up is not repeated"
