"""`acestep-lora adapters convert | info | merge`, and the formats that a training leaves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AceStepTransformer1DModel
from safetensors.torch import load_file, save_file

from acestep_pipeline import cli
from acestep_pipeline.adapters.formats.locate import load_adapter
from acestep_pipeline.checkpoint_source import resolve_checkpoint
from acestep_pipeline.errors import UsageError
from tests.adapter_files import comfyui, differences, lora, lycoris, peft_folder
from tests.test_adapter_writing import assert_close, deltas, in_comfyui, in_peft
from tests.test_adapters import velocity
from tests.training_runs import train_here


@pytest.fixture(scope="module")
def transformer(tiny_dir) -> AceStepTransformer1DModel:
    """Without adapters. Read-only."""
    return AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer")


@pytest.fixture(scope="module")
def sources(transformer, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("sources")
    return {
        "jazz": peft_folder(transformer, root / "jazz", lora()),
        "lofi": comfyui(transformer, root / "lofi"),
        "dora": peft_folder(transformer, root / "dora", lora(use_dora=True)),
        "loha": lycoris(transformer, root / "loha", "loha"),
    }


def run(*command) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in command])
    return end.value.code


def test_convert_to_every_format(sources, transformer, tiny_dir, tmp_path, capsys):
    written = sources["jazz"]
    for to in ("diffusers", "peft", "comfyui"):
        assert run("adapters", "convert", written.source, "--to", to, "--output", tmp_path / to) == 0
        assert f"Read 32 layers of {written.source} (PEFT); wrote {tmp_path / to} ({to})." in capsys.readouterr().out
        assert_close(deltas(load_adapter(tmp_path / to), transformer), written.deltas)
    assert [path.name for path in (tmp_path / "comfyui").iterdir()] == ["jazz_comfyui.safetensors"]
    assert run("adapters", "convert", written.source, "--to", "merged", "--output", tmp_path / "merged",
               "--pretrained_model_name_or_path", "tiny") == 0  # fmt: skip
    assert "32 changed layers" in capsys.readouterr().out
    with pytest.raises(UsageError, match="one component of a checkpoint .*transformer/"):
        resolve_checkpoint(str(tmp_path / "merged"))
    merged = AceStepTransformer1DModel.from_pretrained(tmp_path / "merged")
    name = "layers.2.cross_attn.to_v"
    expected = transformer.get_submodule(name).weight + written.deltas[name]
    torch.testing.assert_close(merged.get_submodule(name).weight, expected)
    assert run("adapters", "convert", sources["loha"].source, "--to", "diffusers", "--output", tmp_path / "loha") == 0
    assert "Note: LoHa became a LoRA of rank 9 that makes the same differences." in capsys.readouterr().out
    assert run("adapters", "convert", sources["dora"].source, "--to", "comfyui", "--output", tmp_path / "x",
               "--name", "my dora") == 0  # fmt: skip
    assert "Note: ComfyUI divides a DoRA by the norms of the base weights" in capsys.readouterr().out
    assert (tmp_path / "x/my-dora_comfyui.safetensors").is_file()


def test_info(sources, tmp_path, capsys):
    assert run("adapters", "info", sources["jazz"].source, "--picture", tmp_path / "jazz.png") == 0
    said = capsys.readouterr().out
    for part in ("format       PEFT", "LoRA on 32 layers", "rank         4, scale 2", "cross_attn.to_k",
                 "blocks       0-3", "sha256", "||dW|| per layer", "base model   not said", "largest"):  # fmt: skip
        assert part in said, said
    assert (tmp_path / "jazz.png").read_bytes().startswith(b"\x89PNG")
    largest = max(sources["jazz"].deltas.values(), key=torch.linalg.norm)
    assert f"{torch.linalg.norm(largest):.4g}" in said, "the norm is that of the difference"

    assert run("adapters", "info", sources["dora"].source) == 0
    assert "DoRA on 32 layers" in (said := capsys.readouterr().out) and "32 layers depend on the base weights" in said
    assert run("adapters", "info", sources["dora"].source, "--pretrained_model_name_or_path", "tiny",
               "--picture", tmp_path / "dora.png") == 0  # fmt: skip
    assert "||dW|| / ||W|| per layer" in capsys.readouterr().out
    assert (tmp_path / "dora.png").stat().st_size > 5000


def test_merge(sources, transformer, tiny_dir, tiny_pipeline, tmp_path, capsys):
    jazz, lofi = sources["jazz"], sources["lofi"]
    assert run("adapters", "merge", f"{jazz.source}:0.8", f"{lofi.source}:-0.4", sources["loha"].source,
               "--output", tmp_path / "both") == 0  # fmt: skip
    assert "= 0.8 · jazz + -0.4 · jazz_comfyui.safetensors + 1 · loha, exactly" in capsys.readouterr().out
    expected = {
        name: 0.8 * jazz.deltas[name] - 0.4 * lofi.deltas[name] + sources["loha"].deltas[name] for name in jazz.deltas
    }
    tiny_pipeline.load_lora_weights(tmp_path / "both")
    assert_close(differences(tiny_pipeline.transformer), expected)
    assert_close(in_peft(tmp_path / "both/peft", tiny_dir, transformer), expected)
    assert_close(in_comfyui(tmp_path / "both/comfyui", tiny_dir, transformer), expected)
    record = json.loads((tmp_path / "both/merged_from.json").read_text())["adapters"]
    assert [entry["weight"] for entry in record] == [0.8, -0.4, 1.0] and all(len(e["sha256"]) == 64 for e in record)


def test_a_merge_of_more_ranks_than_a_layer_has(sources, tiny_pipeline, tmp_path):
    lofi = sources["lofi"]
    assert run("adapters", "merge", *[f"{lofi.source}:0.1"] * 25, "--output", tmp_path / "many") == 0  # rank 25 × 4
    tiny_pipeline.load_lora_weights(tmp_path / "many")
    expected = {name: 2.5 * delta for name, delta in lofi.deltas.items()}
    assert_close(differences(tiny_pipeline.transformer), expected)


def test_what_is_wrong_is_one_sentence(sources, tmp_path, capsys):
    jazz, dora = sources["jazz"].source, sources["dora"].source
    zero = {name: tensor * 0 for name, tensor in load_file(sources["lofi"].source).items()}
    save_file(zero, tmp_path / "zero.safetensors")
    with torch.device("meta"):
        wide = AceStepTransformer1DModel(num_hidden_layers=4, hidden_size=128, num_attention_heads=4, head_dim=32)
    other = peft_folder(wide.to_empty(device="cpu"), tmp_path / "other", lora()).source
    (tmp_path / "run").mkdir()
    (tmp_path / "run/training_args.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    out = ("--output", tmp_path / "out")
    wrong = {
        ("convert", tmp_path / "no", "--to", "peft", *out): "no does not exist",
        ("convert", tmp_path / "zero.safetensors", "--to", "peft", *out): "are zero",
        ("convert", dora, "--to", "merged", "--output", tmp_path / "full", "--pretrained_model_name_or_path", "tiny"):
            "exists and is not empty",
        ("convert", jazz, "--to", "peft", "--output", jazz): "is the folder of the adapter itself",
        ("convert", jazz, "--to", "peft", "--output", tmp_path / "full/file"): "is not a folder",
        ("convert", jazz, "--to", "diffusers", "--output", tmp_path / "run"): "holds a run, whose adapter would be",
        ("convert", jazz, "--to", "merged", *out, "--pretrained_model_name_or_path", tmp_path / "no"): "not a folder",
        ("merge", jazz, dora, *out): "DoRA is no sum",
        ("merge", f"{jazz}:loud", *out): "'loud' is no weight; write a number",
        ("merge", f"{jazz}:nan", *out): "the weight must be a finite number",
        ("convert", jazz, "--to", "peft", "--output", "/proc/out"): "/proc/out can't be written (",
        ("merge", jazz, "--output", "/proc/out"): "/proc/out can't be written (",
        ("merge", jazz, other, *out): "models of different sizes: layers.",
        ("merge", jazz, "--output", tmp_path / "full"): "exists and is not empty",
        ("info", jazz, "--picture", tmp_path / "x.jpeg"): "must be .png",
        ("info", dora, "--picture", tmp_path / "x.png"): "has nothing to show without",
    }  # fmt: skip
    for command, said in wrong.items():
        assert run("adapters", *command) == 2, command
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
    assert run("adapters", "convert", tmp_path / "zero.safetensors", "--to", "peft", *out, "--no-strict") == 0
    assert "warning: the adapter is doubtful: the weights of all its 32 layers are zero" in capsys.readouterr().out


def test_a_training_leaves_all_formats(demo_dir, transformer, tiny_dir, tmp_path, capsys):
    """The three files make the same differences; a new run in the same directory replaces them."""
    output = tmp_path / "my run"
    train_here(demo_dir, output, max_train_steps=2, max_duration_s=2, exp_name="my run")
    assert f"other formats  {output}/peft, {output}/comfyui/my-run_comfyui.safetensors" in capsys.readouterr().out
    expected = deltas(load_adapter(output), transformer)
    assert_close(in_peft(output / "peft", tiny_dir, transformer), expected)
    assert_close(in_comfyui(output / "comfyui", tiny_dir, transformer), expected)
    assert json.loads((output / "peft/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert run("adapters", "info", output) == 0
    said = capsys.readouterr().out
    assert "base model   tiny" in said and "trained with preset smoke, rank 4" in said
    (output / "comfyui/mine.txt").touch()
    (output / "comfyui/.partial-my-run_comfyui.safetensors-x").mkdir()
    shutil.move(output / "comfyui/my-run_comfyui.safetensors", output / "comfyui/other_comfyui.safetensors")
    train_here(demo_dir, output, max_train_steps=1, max_duration_s=2, exp_name="my run", overwrite_output_dir=True)
    left = {path.name for path in (output / "comfyui").iterdir()}
    assert left == {"mine.txt", "my-run_comfyui.safetensors"}


def test_what_was_converted_plays_as_what_it_was_made_from(sources, tiny_pipeline, tmp_path):
    tiny_pipeline.load_lora_weights(sources["dora"].source)
    expected = velocity(tiny_pipeline)
    tiny_pipeline.unload_lora_weights()
    assert run("adapters", "convert", sources["dora"].source, "--to", "diffusers", "--output", tmp_path / "d") == 0
    tiny_pipeline.load_lora_weights(Path(tmp_path / "d"))
    assert torch.equal(velocity(tiny_pipeline), expected)
