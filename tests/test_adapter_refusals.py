"""Adapter files that can't be used, or are doubtful: one sentence each, and the pipeline plays on as before."""

import json
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AceStepTransformer1DModel
from safetensors.torch import load_file, save_file

from acestep_pipeline.errors import UsageError
from tests.adapter_files import ai_toolkit, comfyui, lora, lycoris, peft_folder
from tests.test_adapters import velocity


def header(tensors: dict, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: the header's length, the header, the data."""
    text = json.dumps(tensors).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


TO_Q = "transformer.layers.0.self_attn.to_q"
DOWN, UP = f"{TO_Q}.lora_A.weight", f"{TO_Q}.lora_B.weight"
F32 = {"dtype": "F32"}


def sparse(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A file of zeros of any size, which takes no room on the disk."""
    tensors, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape[0] * shape[1]
        tensors[name] = {**F32, "shape": shape, "data_offsets": [start, end]}
    content = header(tensors)
    with path.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + end)
    return path


TWENTY_GB = 20 * 10**9


def bad_files(folder: Path, good: Path) -> dict[str, tuple[Path, str]]:
    """Label -> a file that is no adapter, and what is said of it."""

    def write(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    class Evil:
        def __reduce__(self):
            return Path.touch, (folder / "code was run",)

    content = good.read_bytes()
    pickled = pickle.dumps({"layers.0.self_attn.to_q.lora_A.weight": Evil()})
    torch.save({TO_Q: torch.zeros(1)}, folder / "zip.safetensors")
    one = {DOWN: {**F32, "shape": [2, 64], "data_offsets": [0, 512]}}
    rows = TWENTY_GB // 4 // 64
    return {
        **{
            f"pickle {suffix}": (write(f"adapter{suffix}", pickled), "weights_only=True")
            for suffix in (".pt", ".bin", ".ckpt", ".pth")
        },
        "pickle by another name": (write("pickle.safetensors", pickled), "is a pickle"),
        "torch.save by another name": (folder / "zip.safetensors", "is a pickle"),
        "empty": (write("empty.safetensors", b""), "no safetensors file, or a damaged one"),
        "text": (write("text.safetensors", b"<html>not found</html>" * 9), "no safetensors file, or a damaged one"),
        "LFS pointer": (write("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        "truncated header": (write("header.safetensors", content[:100]), "damaged"),
        "truncated data": (write("data.safetensors", content[:-100]), "damaged"),
        "too long": (write("long.safetensors", content + b"more"), "damaged"),
        "header of an exabyte": (write("exa.safetensors", header(one, bytes(512), length=2**60)), "damaged"),
        "no JSON": (write("json.safetensors", (9).to_bytes(8, "little") + b"{not json" + bytes(512)), "damaged"),
        "lies about its data": (write("lie.safetensors", header(one, bytes(100))), "damaged"),
        "lies about a shape": (
            write("shape.safetensors", header({"a": {**one[DOWN], "shape": [3, 64]}}, bytes(512))),
            "damaged",
        ),
        "20 GB in one layer": (
            sparse(folder / "layer.safetensors", {DOWN: [rows, 64], UP: [64, rows]}),
            "rank 78125000",
        ),
        "20 GB for another model": (sparse(folder / "other.safetensors", {"unet.lora_A.weight": [rows, 64]}), "UNet"),
        "whole numbers": (
            write("int.safetensors", header({key: {"dtype": "I32", "shape": shape, "data_offsets": place}
                for key, shape, place in ((DOWN, [2, 64], [0, 512]), (UP, [64, 2], [512, 1024]))}, bytes(1024))),
            "torch.int32",
        ),
    }  # fmt: skip


def changed(tensors: dict[str, torch.Tensor], change) -> dict[str, torch.Tensor]:
    return {name: change(name, tensor) for name, tensor in tensors.items()}


def bad_state_dicts(good: dict[str, torch.Tensor]) -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    """Label -> tensors of a file that isn't damaged, and what is said of them."""
    first = next(iter(good))
    xl = {f"layers.0.self_attn.q_proj.lora_{m}.weight": torch.ones(s) for m, s in (("A", (4, 2560)), ("B", (4096, 4)))}
    v1 = {f"transformer_blocks.0.cross_attn.to_q.lora_{m}.weight": torch.ones(4, 4) for m in "AB"}
    llm = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{m}.weight": torch.ones(4, 4) for m in "AB"}
    sdxl = {f"lora_unet_down_blocks_1_attentions_0_proj_in.lora_{m}.weight": torch.ones(4, 4) for m in ("up", "down")}
    flux = {f"transformer.single_transformer_blocks.0.attn.to_q.lora_{m}.weight": torch.ones(4, 4) for m in "AB"}
    return {
        "NaN": (good | {first: good[first] * torch.nan}, "has NaN or infinite values"),
        "infinite": (good | {first: good[first] / 0}, "has NaN or infinite values"),
        "all zero": (changed(good, lambda n, t: t * 0 if "lora_B" in n else t), "layers are zero"),
        "half a layer": ({n: t for n, t in good.items() if n != first}, "without its lora_A: the file is incomplete"),
        "ranks that differ": (good | {first: good[first][:2]}, "don't belong together"),
        "XL": (xl, "self_attn.to_q has 4096 outputs and 2560 inputs, this checkpoint's 64 outputs and 64 inputs"),
        "v1": (v1, "it is for ACE-Step v1, whose adapters don't fit 1.5"),
        "SDXL": (sdxl, "it is for Stable Diffusion (a UNet)"),
        "Flux": (flux, "it is for Flux"),
        "a language model": (llm, "it is for a language model"),
        "nothing": ({}, "found are no tensors"),
        "partly": (good | {"transformer.layers.0.self_attn.to_w.lora_A.weight": torch.ones(2, 2)}, "are for no layer"),
        "deeper": (good | {n.replace("layers.3.", "layers.9."): t.clone() for n, t in good.items()},
                   "8 of its 40 layers are missing from this checkpoint: it has weights for layers.9.cross_attn.to_k"),
        "condition encoder": (good | {"encoder.lyric_encoder.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 2)},
                              "but for the condition encoder"),
        "bias": (good | {f"{TO_Q}.lora_B.bias": torch.ones(64)}, "lora_B.bias, are for no layer"),
        "several in one": (good | {first.replace(".weight", ".b.weight"): good[first].clone()}, "several adapters"),
        "two kinds at once": (good | {f"{TO_Q}.lokr_w1": torch.ones(8, 8)}, "no update of one kind"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def good(tiny_dir, tmp_path_factory) -> Path:
    """The file of an adapter that loads."""
    from acestep_pipeline.adapters.settings import LoraSettings
    from tests.test_adapters import save_trained

    directory = save_trained(tiny_dir, tmp_path_factory.mktemp("good"), LoraSettings(r=4, lora_alpha=12.0), seed=1)
    return directory / "pytorch_lora_weights.safetensors"


def check_refused(pipeline, source, said: str, before: torch.Tensor, **options) -> None:
    names = [name for name, _ in pipeline.transformer.named_modules()]
    with pytest.raises(UsageError) as caught:
        pipeline.load_lora_weights(source, adapter_name="bad", **options)
    message = str(caught.value)
    assert said in message and "\n" not in message and len(message) < 700, message
    assert [name for name, _ in pipeline.transformer.named_modules()] == names
    assert pipeline.get_active_adapters() == ["good"]
    assert torch.equal(velocity(pipeline), before)


def test_damaged_files_are_refused_and_the_pipeline_plays_on(tiny_pipeline, good, tmp_path):
    tiny_pipeline.load_lora_weights(good, adapter_name="good")
    before = velocity(tiny_pipeline)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for label, (path, said) in bad_files(tmp_path, good).items():
        try:
            check_refused(tiny_pipeline, path, said, before)
        except BaseException as error:
            error.add_note(label)
            raise
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000, "kB: nothing large is ever read"
    assert not (tmp_path / "code was run").exists()


def test_wrong_content_is_refused_and_the_pipeline_plays_on(tiny_pipeline, good, tmp_path):
    tiny_pipeline.load_lora_weights(good, adapter_name="good")
    before = velocity(tiny_pipeline)
    for label, (tensors, said) in bad_state_dicts(load_file(good)).items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "bad.safetensors")
        for source in (tensors, tmp_path / "bad.safetensors"):
            try:
                check_refused(tiny_pipeline, source, said, before)
            except BaseException as error:
                error.add_note(label)
                raise
    check_refused(tiny_pipeline, {"state_dict": tensors}, "'state_dict' is no tensor but dict", before)


def test_the_command_for_a_pickle_converts_it(tiny_pipeline, good, tmp_path):
    torch.save(load_file(good), tmp_path / "adapter.pt")
    with pytest.raises(UsageError) as caught:
        tiny_pipeline.load_lora_weights(tmp_path / "adapter.pt")
    command = re.search("`(.*)`", str(caught.value))[1].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True, capture_output=True)
    tiny_pipeline.load_lora_weights(tmp_path / "adapter.safetensors")


def test_a_file_larger_than_the_memory_is_refused(tiny_pipeline, good, monkeypatch):
    from acestep_pipeline.adapters.formats import read

    monkeypatch.setattr(read, "memory_available_bytes", lambda: 50_000)
    with pytest.raises(UsageError, match="it holds 0.0 GB of tensors, more than the memory that is free"):
        tiny_pipeline.load_lora_weights(good)


def test_doubtful_adapters_load_if_told_to(tiny_pipeline, good, recwarn):
    tensors = load_file(good)
    doubtful = bad_state_dicts(tensors)
    for index, label in enumerate(["all zero", "partly", "deeper", "condition encoder", "bias"]):
        recwarn.clear()
        tiny_pipeline.load_lora_weights(doubtful[label][0], adapter_name=f"with {index}", strict=False)
        assert any(doubtful[label][1] in str(warning.message) for warning in recwarn), label
    recwarn.clear()
    tiny_pipeline.load_lora_weights(doubtful["SDXL"][0], adapter_name="nothing", strict=False)
    assert any("Stable Diffusion" in str(warning.message) for warning in recwarn)
    assert "nothing" not in tiny_pipeline.transformer.peft_config
    for label in ("NaN", "XL", "half a layer"):
        with pytest.raises(UsageError):
            tiny_pipeline.load_lora_weights(doubtful[label][0], adapter_name="no", strict=False)
    # What is left of it works.
    tiny_pipeline.load_lora_weights(tensors, adapter_name="all")
    expected = velocity(tiny_pipeline)
    tiny_pipeline.set_adapters(["with 1"])
    assert torch.equal(velocity(tiny_pipeline), expected)


def test_peft_configurations_that_can_not_be_meant(tiny_pipeline, tmp_path, recwarn):
    written = peft_folder(tiny_pipeline.transformer, tmp_path / "peft", lora())
    path = tmp_path / "peft" / "adapter_config.json"
    good = json.loads(path.read_text())
    wrong = {
        "{": "can't be read as JSON",
        "[]": "holds no JSON object",
        json.dumps(good | {"lora_alpha": "16"}): "'16'",
        json.dumps(good | {"lora_alpha": float("nan")}): "nan",
        json.dumps(good | {"alpha_pattern": {"q_proj": -1}}): "-1",
        json.dumps(good | {"peft_type": "BOFT"}): "it is PEFT's BOFT, and only LORA",
        json.dumps(good | {"init_lora_weights": "pissa_niter_16"}): "it began as pissa_niter_16",
    }
    for content, said in wrong.items():
        path.write_text(content)
        with pytest.raises(UsageError) as caught:
            tiny_pipeline.load_lora_weights(written.source)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UsageError, match="no adapter_config.json beside it, without which its alpha"):
        tiny_pipeline.load_lora_weights(written.source)
    tiny_pipeline.load_lora_weights(written.source, strict=False)
    assert any("adapter_config.json" in str(warning.message) for warning in recwarn)


def test_other_kinds_of_another_size(tiny_pipeline, tmp_path):
    """The shapes of every kind are checked, not of LoRAs alone."""
    sources = {
        "loha": lycoris(tiny_pipeline.transformer, tmp_path / "loha", "loha"),
        "lokr": lycoris(tiny_pipeline.transformer, tmp_path / "lokr", "lokr both"),
        "diag-oft": lycoris(tiny_pipeline.transformer, tmp_path / "oft", "diag-oft"),
        "dora": comfyui(tiny_pipeline.transformer, tmp_path / "dora", "dora"),
        "ai-toolkit": ai_toolkit(tiny_pipeline.transformer, tmp_path / "ai", "lokr"),
    }
    widened = ("hada_w1_b", "hada_w2_b", "lokr_w1_b", "oft_blocks", "dora_scale", "lokr_w1")
    for kind, written in sources.items():
        path = next(iter(written.source.glob("*.safetensors"))) if written.source.is_dir() else written.source
        tensors = {
            name: torch.cat([t, t], dim=-1 if name.endswith(("_b", "w1")) else 0) if name.endswith(widened) else t
            for name, t in load_file(path).items()
        }
        with pytest.raises(UsageError, match="inputs|outputs|magnitudes") as caught:
            tiny_pipeline.load_lora_weights(tensors)
        assert "\n" not in str(caught.value), kind


def test_an_adapter_for_xl_on_the_2b_model_and_the_other_way_round():
    """By their real shapes (no weights are needed for that)."""
    from acestep_pipeline.adapters.formats.install import layer_shapes
    from acestep_pipeline.adapters.formats.locate import load_adapter

    with torch.device("meta"):
        base = layer_shapes(AceStepTransformer1DModel())
        xl = layer_shapes(AceStepTransformer1DModel(hidden_size=2560, num_attention_heads=32, num_hidden_layers=32))
    for own, other, said in (
        (xl, base, "an adapter for XL on a 2 B"),
        (base, xl, "an adapter for the 2 B model on XL"),
    ):
        name = "layers.0.self_attn.to_k"
        (outputs, inputs), key = own[name], f"transformer.{name}.lora"
        tensors = {f"{key}_A.weight": torch.ones(2, inputs), f"{key}_B.weight": torch.ones(outputs, 2)}
        assert load_adapter(tensors, layer_shapes=own).modules.keys() == {name}
        with pytest.raises(ValueError, match=said) as caught:
            load_adapter(tensors, layer_shapes=other)
        assert f"{outputs} outputs and {inputs} inputs" in str(caught.value)


def test_a_base_in_4_bits_takes_loras_alone(tiny_pipeline, tmp_path):
    from acestep_pipeline.quantization import quantize_base

    lokr = lycoris(tiny_pipeline.transformer, tmp_path / "lokr")
    plain = comfyui(tiny_pipeline.transformer, tmp_path / "lora")
    quantize_base(tiny_pipeline.transformer, "nf4", device=torch.device("cpu"))
    before = velocity(tiny_pipeline)
    with pytest.raises(UsageError, match="packed in 4 bits, to which only a LoRA or DoRA can be added"):
        tiny_pipeline.load_lora_weights(lokr.source)
    assert torch.equal(velocity(tiny_pipeline), before)
    tiny_pipeline.load_lora_weights(plain.source)
    assert not torch.equal(velocity(tiny_pipeline), before)
