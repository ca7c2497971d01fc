"""Whatever names data takes a folder (or file) of this machine, `s3://` and `hf://`; what can't is refused at once."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import load_from_disk

from acestep_pipeline import storage
from acestep_pipeline.cli import main
from acestep_pipeline.data.held_out import load_train_and_held_out
from acestep_pipeline.errors import UsageError
from acestep_pipeline.storage.copies import local_file
from acestep_pipeline.training import arguments, settings
from tests.original_layout import write_original_checkpoint
from tests.test_hub import hub  # noqa: F401 - a fixture
from tests.test_publishing import write
from tests.test_storage import content
from tests.training_runs import train_here


@pytest.fixture(params=["folder", "s3", "hf"])
def place(request, s3_folder, hub, tmp_path):  # noqa: F811
    """Puts a folder somewhere, and gives its address."""

    def put(folder: Path, kind: str = "model") -> str:
        if request.param == "folder":
            return str(folder)
        if request.param == "s3":
            address = f"{s3_folder.url}/{folder.name}"
        else:
            address = f"hf://{'datasets/' if kind == 'dataset' else ''}tester/{folder.name}"
        storage.sync(folder, address, show_progress=False)
        return address

    return put


def run(*command) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(part) for part in command])
    return ended.value.code


def test_music_to_build_a_dataset_of(place, demo_dir, tmp_path):
    music = shutil.copytree(demo_dir, tmp_path / "music")
    out = tmp_path / "built"
    assert run("dataset", "build", "--data-dir", place(music, "dataset"), "--output-dir", out) == 0
    assert len(load_from_disk(str(out))) == 6


def test_music_to_train_and_validate_on(place, demo_dir, tmp_path):
    music = shutil.copytree(demo_dir, tmp_path / "music")
    held = tmp_path / "held"
    held.mkdir()
    shutil.move(sorted(music.glob("*.wav"))[0], held)
    train, held_out, _ = load_train_and_held_out(
        place(music, "dataset"), dataset_name=None, validation_data_dir=place(held, "dataset"),
        validation_fraction=0.0, max_validation_samples=32, validation_seed=0, min_duration_s=1.0,
        max_train_samples=None, seed=0, show_progress=False,
    )  # fmt: skip
    assert (len(train), len(held_out)) == (5, 1)


def test_checkpoints_to_convert(place, tiny_pipeline, tmp_path, capsys):
    write_original_checkpoint(tiny_pipeline, tmp_path / "original")
    command = (
        "convert-checkpoint",
        place(tmp_path / "original"),
        tmp_path / "converted",
        "--variant_dir",
        "acestep-v15-base",
    )
    assert run(*command) == 0, capsys.readouterr().err
    assert (tmp_path / "converted" / "model_index.json").is_file()


def test_adapters_to_look_at_convert_and_merge(place, adapter_dir, tmp_path, capsys):
    address = place(shutil.copytree(adapter_dir, tmp_path / "jazz"))
    assert run("adapters", "info", address) == 0
    assert run("adapters", "convert", address, "--to", "comfyui", "--output", tmp_path / "comfyui") == 0
    assert run("adapters", "merge", f"{address}:0.5", address, "--output", tmp_path / "merged") == 0
    assert list((tmp_path / "comfyui").rglob("*_comfyui.safetensors")) and content(tmp_path / "merged")


def test_files(place, tmp_path):
    """A LoRA config, lyrics, source and reference audio are read as `local_file` brings them."""
    address = place(write(tmp_path / "files", {"lora.json": b'{"r": 3, "lora_alpha": 7}', "deep/words.txt": b"la"}))
    assert local_file(f"{address}/deep/words.txt").read_bytes() == b"la"
    args = arguments.parse_args(["--lora_config", f"{address}/lora.json"])
    assert (args.rank, args.lora_alpha) == (3, 7)
    if "://" in address:
        with pytest.raises(UsageError, match="no file that is there"):
            local_file(f"{address}/other.txt")


@pytest.mark.slow
def test_what_to_generate_from(place, tiny_dir, demo_dir, tmp_path):
    clip = sorted(demo_dir.glob("*.wav"))[0]
    address = place(write(tmp_path / "files", {"clip.wav": clip.read_bytes(), "words.txt": b"[verse]\nla"}))
    command = ["generate", "--pretrained_model_name_or_path", tiny_dir, "--prompt", "techno", "--steps", "1"]
    command += ["--task", "cover", "--src_audio", f"{address}/clip.wav", "--lyrics", f"{address}/words.txt"]
    assert run(*command, "--reference_audio", f"{address}/clip.wav", "--output", tmp_path / "out.wav") == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["lyrics"] == "[verse]\nla" and record["task"]["src_audio"] == f"{address}/clip.wav"


# --- where runs go ---------------------------------------------------------------------------------------------------


def chosen(*flags):
    args = arguments.parse_args([*map(str, flags), "--pretrained_model_name_or_path", "tiny"])
    return args, settings.choose_sources(args)


def test_a_run_on_the_hub_is_in_the_cache_and_published_at_the_end(demo_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path))
    args, said = chosen("--train_data_dir", demo_dir, "--output_dir", "hf://tester/jazz")
    assert args.output_dir == tmp_path / "runs" / "hf" / "tester" / "jazz" and said["Published"] == "hf://tester/jazz"
    assert (args.push_to_hub, args.hub_model_id) == (True, "tester/jazz")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--output_dir", "hf://tester/jazz@v1"), "write hf://tester/jazz"),
        (("--output_dir", "hf://datasets/tester/jazz"), "is a dataset"),
        (("--output_dir", "hf://tester/jazz", "--hub_model_id", "tester/other"), "both say where to publish"),
        (("--push_to_s3", "hf://tester/jazz"), "--push_to_hub"),
        (("--cache_dir", "s3://bucket/cache"), "--cache_dir s3://bucket/cache: only a folder of this machine"),
        (("--logging_dir", "hf://tester/logs"), "--logging_dir hf://tester/logs: only a folder of this machine"),
        (("--latent_cache_dir", "s3://bucket/latents"), "only a folder or file of this machine will do"),
    ],
)
def test_where_only_some_places_will_do(flags, said, demo_dir):
    with pytest.raises(UsageError, match=said):
        chosen("--train_data_dir", demo_dir, *flags)


def test_a_dataset_is_built_on_this_machine(demo_dir, capsys):
    for address in ("s3://bucket/built", "hf://datasets/tester/built"):
        assert run("dataset", "build", "--data-dir", demo_dir, "--output-dir", address) == 2
        assert f"{address}: only a folder or file of this machine will do there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_from_the_hub_to_the_hub(demo_dir, hub, tmp_path, monkeypatch):  # noqa: F811
    storage.sync(demo_dir, "hf://datasets/tester/demo", show_progress=False)
    train_here(
        "hf://datasets/tester/demo", "hf://tester/jazz", max_train_steps=1, max_duration_s=2, max_train_samples=1,
        overwrite_output_dir=True,
    )  # fmt: skip
    assert "pytorch_lora_weights.safetensors" in hub.files("tester/jazz")
