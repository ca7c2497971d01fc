"""Where adapters are found: folders of each trainer, the Hub, S3; nothing is fetched that is not needed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AceStepTransformer1DModel

from acestep_pipeline.adapters.formats.locate import load_adapter, locate
from acestep_pipeline.errors import UsageError
from tests.adapter_files import comfyui, diffsynth, lora, lycoris, peft_folder, simpletuner
from tests.hub_server import serve_hub
from tests.test_adapters import velocity

OURS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(tiny_dir, tmp_path_factory) -> Path:
    """Folders as the trainers leave them. Read-only."""
    transformer = AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer")
    root = tmp_path_factory.mktemp("folders")
    peft_folder(transformer, root / "official/adapter", lora())
    (root / "official/training_state.pt").write_bytes(b"PK")
    peft_folder(transformer, root / "side-step", lora())
    lycoris(transformer, root / "side-step lokr")
    lycoris(transformer, root / "side-step loha", "loha")
    diffsynth(transformer, root / "diffsynth")
    simpletuner(transformer, root / "simpletuner")
    (root / "simpletuner/random_states_0.pkl").write_bytes(b"")
    comfyui(transformer, root / "comfyui")
    comfyui(transformer, root / "ours/comfyui")
    peft_folder(transformer, root / "ours/peft", lora())
    shutil.copytree(root / "ours", root / "without ours")
    shutil.copy(root / "simpletuner" / OURS, root / "ours" / OURS)
    (root / "ours/checkpoint-9").mkdir()
    for name in ("model.safetensors", "optimizer.safetensors"):
        (root / "ours/checkpoint-9" / name).write_bytes(bytes(100))
    (root / "ours/training_args.json").write_text("{}")
    return root


FOUND = {
    "official": f"adapter/{PEFT}",
    "side-step": PEFT,
    "side-step lokr": "lokr_weights.safetensors",
    "side-step loha": "loha_weights.safetensors",
    "diffsynth": "epoch-0.safetensors",
    "simpletuner": OURS,
    "comfyui": "jazz_comfyui.safetensors",
    "ours": OURS,
    "without ours": f"peft/{PEFT}",
}


def test_the_file_in_each_trainers_folder(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    for name, file in FOUND.items():
        for source in (str(folders / name), f"./{name}", f"{folders / name}/"):
            assert locate(source).resolve() == folders / name / file
    ours = str(folders / "ours")
    assert locate(ours, weight_name=PEFT, subfolder="peft") == folders / "ours/peft" / PEFT
    assert locate(ours, subfolder="comfyui") == folders / "ours/comfyui/jazz_comfyui.safetensors"
    assert locate(ours, weight_name="comfyui/jazz_comfyui.safetensors").name == "jazz_comfyui.safetensors"
    shutil.copytree(folders / "diffsynth", tmp_path / "two")
    shutil.copy(tmp_path / "two/epoch-0.safetensors", tmp_path / "two/epoch-1.safetensors")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles/adapter_model.bin").write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    wrong = {
        "two": "several adapters (epoch-0.safetensors, epoch-1.safetensors); name the file itself",
        "pickles": "pickles/adapter_model.bin is a pickle",
        "nothing": "it is no adapter directory",
        "no.safetensors": "does not exist",
    }
    for name, said in wrong.items():
        with pytest.raises(UsageError) as caught:
            locate(str(tmp_path / name))
        assert said in str(caught.value)
    with pytest.raises(UsageError, match="holds no other.safetensors"):
        locate(ours, weight_name="other.safetensors")


def test_s3_adapters_load_and_nothing_else_is_fetched(folders, tiny_pipeline, s3_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path))
    s3_folder.put({
        f"lora/{path.relative_to(folders).as_posix()}": path.read_bytes()
        for path in folders.rglob("*") if path.is_file()
    })  # fmt: skip
    root = tmp_path / "s3" / s3_folder.server.bucket / s3_folder.name / "lora"
    for name in ("ours", "official", "side-step lokr"):
        tiny_pipeline.load_lora_weights(folders / name, adapter_name="here")
        expected = velocity(tiny_pipeline)
        tiny_pipeline.unload_lora_weights()
        for _ in range(2):  # the second time from the copy
            tiny_pipeline.load_lora_weights(f"{s3_folder.url}/lora/{name}", adapter_name="there")
            assert torch.equal(velocity(tiny_pipeline), expected), name
            tiny_pipeline.unload_lora_weights()
    tiny_pipeline.load_lora_weights(f"{s3_folder.url}/lora/comfyui/jazz_comfyui.safetensors")
    fetched = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert fetched == {
        f"ours/{OURS}",
        "ours/training_args.json",
        f"official/adapter/{PEFT}",
        "official/adapter/adapter_config.json",
        "side-step lokr/lokr_weights.safetensors",
        "comfyui/jazz_comfyui.safetensors",
    }
    wrong = {"nothing": "holds no files", "ours/checkpoint-9": "several adapters", "ours/x.safetensors": "holds no x"}
    for name, said in wrong.items():
        with pytest.raises(UsageError, match=said):
            tiny_pipeline.load_lora_weights(f"{s3_folder.url}/lora/{name}")
    # What is gone on S3 goes here, and what was fetched before and is not asked for now stays.
    s3_folder.delete(f"lora/official/adapter/{PEFT}")
    with pytest.raises(UsageError, match="pickle"):
        tiny_pipeline.load_lora_weights(f"{s3_folder.url}/lora/official")
    assert not (root / f"official/adapter/{PEFT}").exists() and (root / f"ours/{OURS}").exists()


LOCATE = """
import json, sys
from acestep_pipeline.adapters.formats.locate import locate
from acestep_pipeline.errors import UsageError
for name, options in json.loads(sys.argv[2]):
    try:
        print(json.dumps(str(locate(name, cache_dir=sys.argv[1], **options))))
    except UsageError as error:
        print(json.dumps(str(error)))
"""


def test_hub_adapters_are_found_online_and_then_offline(folders, tmp_path):
    repositories = {f"someone/{name.replace(' ', '-')}": {"main": folders / name} for name in FOUND}
    cases = [(repository, {}) for repository in repositories]
    cases += [("someone/ours", {"subfolder": "peft"}), ("someone/never", {}), ("someone/ours", {"revision": "v9"})]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with serve_hub(repositories) as hub:
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", LOCATE, str(tmp_path / "cache"), json.dumps(cases)]
        answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    *found, peft, missing, revision = [json.loads(line) for line in answer.stdout.splitlines()]
    for (repository, _), path, (name, file) in zip(cases, found, FOUND.items(), strict=False):
        assert path.endswith(f"/{file}") and Path(path).read_bytes() == (folders / name / file).read_bytes()
        offline = locate(repository, cache_dir=str(tmp_path / "cache"))
        assert offline == Path(path), "the cache serves while the Hub can't be reached"
    assert peft.endswith(f"/peft/{PEFT}")
    assert "no model 'someone/never'" in missing and "'v9'" in revision
    assert load_adapter("someone/official", cache_dir=str(tmp_path / "cache")).config["lora_alpha"] == 8
    fetched = [name for name in hub.downloads if name.startswith("someone/ours/")]
    assert not [name for name in fetched if "checkpoint-9" in name or "comfyui" in name], fetched
    with pytest.raises(UsageError, match="'someone/never'.* can't be reached"):
        locate("someone/never", cache_dir=str(tmp_path / "cache"))
