"""The model card: what it says of a real run, and that the code in it runs as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from huggingface_hub import ModelCard

from acestep_pipeline.data.dataset_summary import summarise_tracks
from acestep_pipeline.data.tracks import load_tracks
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.model_card import CardFacts, card_in_repository, describe_base, held_out_results, render_card
from acestep_pipeline.storage.hub_address import parse_hub_address
from acestep_pipeline.storage.hub_push import push_to_hub
from acestep_pipeline.training.run_costs import ask_power_limit_w
from tests.test_hub import hub  # noqa: F401 - a fixture
from tests.training_runs import ROOT, train_here

XL = "ACE-Step/acestep-v15-xl-base-diffusers"
SOUND = {"num_validation_samples": 1, "validation_duration_s": 2, "validation_inference_steps": 2}


def card_facts(**changes) -> CardFacts:
    values = {
        "name": "jazz",
        "version": "1.0",
        "base": describe_base(XL, variant_dir=None, revision=None, is_original=False),
        "kind": "LoRA",
        "rows": [("preset", "c")],
        "samples": [{"prompt": "a | b\nc", "with_adapter": "samples/a.wav", "without_adapter": "samples/b.wav"}],
        "effect": "**Learned**.",
        "plot": "loss.png",
        "prompt": "it's \"jazz\" $HOME",
        "duration_s": 30.0,
        "num_inference_steps": None,
        "comfyui_name": "jazz_comfyui.safetensors",
        "trigger_words": [{"trigger_word": "zxq `x`", "trigger_position": "prepend", "tracks": 4}],
        "dataset": {"tracks": 4, "minutes": 2.5, "with_lyrics": 1, "genres": {"jazz|x": 4}, "languages": {"de": 1},
                    "licenses": {"CC0": 3, "not stated": 1}, "machine_made": {}},
        "dataset_name": "my_music",
    }  # fmt: skip
    return CardFacts(**(values | changes))


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_metadata_say_what_the_facts_say():
    results = held_out_results(dataset_name="my music", dataset_id=None, loss_with=1.23456789, loss_without=2.0)
    card = render_card(card_facts(license="cc-by-4.0", results=results, dataset_id="tester/music"))
    again = ModelCard(str(card)).data  # read back from its YAML
    assert again.base_model == XL and again.base_model_relation == "adapter"
    assert again.license == "cc-by-4.0" and again.datasets == ["tester/music"] and again.library_name == "diffusers"
    assert again.pipeline_tag == "text-to-audio" and "lora" in again.tags and again.language == ["de"]
    assert again.instance_prompt == "zxq `x`"
    assert again.widget == [{"text": "a | b\nc", "output": {"url": "samples/a.wav"}}]
    assert [(r.metric_type, r.metric_value, r.dataset_type) for r in again.eval_results] == [
        ("loss", 1.234568, "my-music"),
        ("loss", 2.0, "my-music"),
    ]
    bare = render_card(card_facts(samples=[], trigger_words=[], base=describe_base(
        "tiny", variant_dir=None, revision=None, is_original=False)))  # fmt: skip
    for name in (
        "base_model",
        "base_model_relation",
        "license",
        "datasets",
        "widget",
        "model-index",
        "instance_prompt",
    ):
        assert name not in bare.data.to_dict(), name
    assert "The official app" not in bare.text and "## Listen" not in bare.text
    assert "a \\| b c" in card.text and "jazz\\|x (4)" in card.text and "CC0 (3), not stated (1)" in card.text


def test_the_hub_takes_the_metadata(hub, monkeypatch):  # noqa: F811
    render_card(card_facts(license="cc-by-4.0")).validate()
    with pytest.raises(ValueError, match="license"):
        render_card(card_facts(license="nonsense")).validate()


@pytest.mark.parametrize(
    ("name", "options", "prepare", "source", "app"),
    [
        ("tiny", {}, "acestep-lora tiny-checkpoint ace-step-tiny", '"ace-step-tiny"', None),
        ("hf://a/acestep-v15-xl-base-diffusers@v1", {}, None, '"a/acestep-v15-xl-base-diffusers", revision="v1"',
         "acestep-v15-xl-base"),
        ("ACE-Step/Ace-Step1.5", {"variant_dir": "acestep-v15-sft", "is_original": True},
         "acestep-lora convert-checkpoint ACE-Step/Ace-Step1.5 acestep-v15-sft-diffusers "
         "--variant_dir acestep-v15-sft",
         '"acestep-v15-sft-diffusers"', "acestep-v15-sft"),
        ("/root", {}, None, '"root"', None),
    ],
)  # fmt: skip
def test_how_the_base_model_is_got(name, options, prepare, source, app):
    base = describe_base(name, **{"variant_dir": None, "revision": None, "is_original": False} | options)
    assert (base.prepare, base.source, base.official_name) == (prepare, source, app)
    assert base.hub_id == (None if name in ("tiny", "/root") else name.removeprefix("hf://").partition("@")[0])


def test_code_of_every_card_compiles():
    bases = ("ACE-Step/acestep-v15-base", {"is_original": True}), ("tiny", {"is_original": False})
    for name, options in bases:
        base = describe_base(name, variant_dir=None, revision=None, **options)
        for kind in ("LoRA", "LoKr"):
            text = str(render_card(card_facts(base=base, kind=kind)))
            for version in (text, card_in_repository(text, "tester/jazz")):
                blocks = code_blocks(version, "python")
                assert len(blocks) == 1 + ("official" in version)
                for block in blocks:
                    compile(block, "card", "exec")
                for block in code_blocks(version, "bash"):
                    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
            assert card_in_repository(version, "other/name") == version, "only what is this folder's is replaced"


@pytest.fixture(scope="module")
def run(demo_dir, tmp_path_factory) -> Path:
    """A run with a tenth held out, samples and a licence."""
    output = tmp_path_factory.mktemp("card") / "my run"
    train_here(
        demo_dir,
        output,
        max_train_steps=6,
        max_train_samples=None,
        validation_fraction=0.2,
        license="cc0-1.0",
        trigger_word="zxqmood",
        **SOUND,
    )
    return output


def environment(home: Path, **more: str) -> dict[str, str]:
    """For programs that a card's code starts: `acestep-lora` is this checkout's."""
    (home / "bin").mkdir(parents=True, exist_ok=True)
    program = home / "bin/acestep-lora"
    program.write_text(f"#!{sys.executable}\nfrom acestep_pipeline.cli import main\nmain()\n")
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    path = os.pathsep.join([str(home / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT), "HF_HOME": str(home / "hf")}
    return kept | own | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def test_the_card_of_a_run_and_its_code(run, demo_dir, tmp_path):
    text = (run / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "cc0-1.0" and card.data.instance_prompt == "zxqmood"
    assert card.data.widget[0]["output"]["url"] == "samples/sample-0_with_adapter.wav"
    recorded = json.loads((run / "training_args.json").read_text())["dataset"]
    for said in ("| preset | smoke |", f"| tracks | {recorded['tracks']} (", "| hardware | CPU (", "| time | "):
        assert said in text, said
    assert "energy" not in text, "of a CPU nothing bounds it"
    assert str(demo_dir) not in text and str(run.parent) not in text, "no paths of this machine"
    settings = environment(tmp_path)
    (tmp_path / "ComfyUI/models/loras").mkdir(parents=True)
    prepare, generate, copy = code_blocks(text, "bash")
    assert generate.startswith("ADAPTER=.  # this folder\nacestep-lora generate")  # run by the slow test below
    for block in (prepare, copy):
        done = subprocess.run(["bash", "-e"], input=block, text=True, cwd=run, env=settings, capture_output=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in (tmp_path / "ComfyUI/models/loras").iterdir()] == ["smoke-clips_comfyui.safetensors"]
    (block,) = code_blocks(text, "python")
    done = subprocess.run([sys.executable, "-c", block], cwd=run, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert soundfile.info(run / "out.wav").duration == pytest.approx(2, abs=0.1)


def test_summary_of_tracks(demo_dir):
    tracks, _ = load_tracks(demo_dir)
    summary = summarise_tracks(tracks)
    assert (
        summary["tracks"] == 6
        and summary["with_lyrics"] == 0
        and not summary["languages"]
        and summary["minutes"] == pytest.approx(0.4)
    )
    assert sum(summary["licenses"].values()) == 6 and json.loads(json.dumps(summary)) == summary


def test_a_gpus_power_limit_is_asked_of_the_driver(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for answer, expected in (("700.00", 700.0), ("[N/A]", None), ("", None)):
        program.write_text(f'#!/bin/sh\ntest "$1" = "--id=GPU-12ab" && echo "{answer}"\n')
        program.chmod(0o755)
        assert ask_power_limit_w("GPU-12ab") == expected
    assert ask_power_limit_w("GPU-other") is None


def test_a_run_is_published(hub, demo_dir, tmp_path, monkeypatch, capsys):  # noqa: F811
    output = tmp_path / "jazz"
    flags = {"max_train_steps": 2, "push_to_hub": True, "hub_private_repo": True, "hub_tag": "v1"}
    flags |= {"exp_name": "jazz", "resume_from_checkpoint": "latest"}
    hub.faults += [(r"POST .*/commit/", 503)] * 9
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(RunError, match="not published .*busy or broken") as failed:
        train_here(demo_dir, output, **flags)
    assert f"storage push {output} --to hf://tester/jazz --private --tag v1" in str(failed.value)
    assert (output / "README.md").is_file()
    hub.faults.clear()
    capsys.readouterr()
    train_here(demo_dir, output, **flags)
    said = capsys.readouterr().out
    assert "nothing is left to do" in said and "published" in said and "tag v1" in said
    train_here(demo_dir, output, **flags)
    assert "nothing was sent" in capsys.readouterr().out
    repository, files = hub.repositories["tester/jazz"], hub.files("tester/jazz", "v1")
    assert repository.private and len(repository.log) == 2
    expected = {"pytorch_lora_weights.safetensors", "peft/adapter_model.safetensors", "peft/adapter_config.json"}
    expected |= {"comfyui/jazz_comfyui.safetensors", "README.md", "metrics.jsonl", "training_args.json", "effect.json"}
    assert files.keys() - {".gitattributes", "loss.png", "update_norms.png"} == expected
    left = [path.read_bytes() for path in output.rglob("*") if path.is_file()]
    assert not [content for content in (*files.values(), *left) if b"hf_write" in content], "the token"


@pytest.mark.slow
def test_the_code_of_a_published_card(hub, run, tmp_path):  # noqa: F811
    push_to_hub(run, parse_hub_address("hf://tester/jazz"), private=True)
    card = hub.files("tester/jazz")["README.md"].decode()
    settings = environment(tmp_path / "home", HF_ENDPOINT=hub.url, HF_TOKEN="hf_write", NO_PROXY="127.0.0.1")
    settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    (tmp_path / "home/ComfyUI/models/loras").mkdir(parents=True)
    for block in code_blocks(card, "bash"):
        done = subprocess.run(["bash", "-e"], input=block, text=True, cwd=tmp_path, env=settings, capture_output=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "home/ComfyUI/models/loras").iterdir())
    (tmp_path / "out.wav").unlink()
    (block,) = code_blocks(card, "python")
    assert 'adapter = "tester/jazz"' in block
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert soundfile.info(tmp_path / "out.wav").duration == pytest.approx(2, abs=0.1)


def test_publishing_is_refused_before_anything_is_loaded(hub, demo_dir, tmp_path, monkeypatch):  # noqa: F811
    refused = [
        ({"hub_model_id": "a/b/c"}, "hf_write", "--hub_model_id 'a/b/c' is no name"),
        ({}, "hf_read", "--push_to_hub: .*the token may not write"),
        ({"hub_model_id": "somebody/x"}, "hf_write", "it is of tester, band"),
        ({"hub_tag": "a b"}, "hf_write", "is no tag"),
        ({"license": "mine"}, "hf_write", "--license 'mine' is no licence"),
        ({"resume_from_checkpoint": "hf://a/b"}, "hf_write", "checkpoints are not kept on the Hub"),
        ({"push_to_hub": False, "hub_tag": "v1"}, "hf_write", "--hub_tag does nothing without --push_to_hub"),
    ]
    for changes, token, said in refused:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UsageError, match=said):
            train_here(demo_dir, tmp_path / "out", **({"push_to_hub": True} | changes))
        assert not (tmp_path / "out").exists()
