"""Every format out: what we write makes the same differences in diffusers, PEFT, ComfyUI's arithmetic and ours."""

import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel
from peft import PeftModel
from safetensors.torch import load_file

from acestep_pipeline.adapters.formats.bake import write_merged
from acestep_pipeline.adapters.formats.base_weights import BaseWeights
from acestep_pipeline.adapters.formats.combine import combine
from acestep_pipeline.adapters.formats.deltas import delta_weight
from acestep_pipeline.adapters.formats.locate import load_adapter
from acestep_pipeline.adapters.formats.record import Adapter
from acestep_pipeline.adapters.formats.write import write_comfyui, write_diffusers, write_peft
from acestep_pipeline.errors import UsageError
from tests.adapter_files import FAMILIES, Names, comfyui, differences, linears, lora, original_decoder, peft_folder
from tests.original_layout import write_original_checkpoint
from tests.test_adapters import velocity

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

WRITERS = {
    "diffusers": write_diffusers,
    "peft": write_peft,
    "comfyui": lambda adapter, directory: write_comfyui(adapter, directory / "it_comfyui.safetensors"),
}
# Which families can't be written as what, for the reason that is said.
IMPOSSIBLE = {
    ("PEFT, oft", "diffusers"): "depends on the base weight",
    ("PEFT, oft", "comfyui"): "rotates the inputs",
    ("PEFT, oft exact and shared", "diffusers"): "depends on the base weight",
    ("PEFT, oft exact and shared", "comfyui"): "rotates the inputs",
    **{
        (f"LyCORIS, {algo}", to): "depends on the base weight"
        for algo in ("diag-oft", "diag-oft constraint", "lokr dora", "loha dora")
        for to in ("diffusers", "peft")
    },
}
# Of each kind one, which goes on from every format to every other.
CHAINED = ("PEFT, official trainer", "PEFT, rslora", "PEFT, dora", "PEFT, loha", "PEFT, lokr", "PEFT, oft",
           "LyCORIS, lokr both", "LyCORIS, lokr full", "LyCORIS, loha dora", "LyCORIS, diag-oft", "LyCORIS, full",
           "ai-toolkit, lokr")  # fmt: skip
BECOME_LORA = {
    "diffusers": {"PEFT, loha", "LyCORIS, loha", "LyCORIS, full", "LyCORIS, lokr full both"},
    "peft": {"LyCORIS, full", "LyCORIS, lokr full both"},
}


@pytest.fixture(scope="module")
def transformer(tiny_dir) -> AceStepTransformer1DModel:
    """Without adapters. Read-only."""
    return AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-4, atol=1e-5)


def deltas(adapter: Adapter, transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    layers = linears(transformer)
    return {
        name: delta_weight(weights, layers[name].weight.detach(), config=adapter.config)
        for name, weights in adapter.modules.items()
    }


@functools.cache
def plain_pipeline(tiny_dir: Path) -> AceStepPipeline:
    return AceStepPipeline.from_pretrained(tiny_dir)


def in_plain_diffusers(directory: Path, tiny_dir: Path, transformer) -> dict[str, torch.Tensor]:
    pipeline = plain_pipeline(tiny_dir)
    if any(".lokr_" in key for key in load_file(directory / "pytorch_lora_weights.safetensors")):
        pipeline.transformer.load_lora_adapter(str(directory), weight_name="pytorch_lora_weights.safetensors")
    else:
        pipeline.load_lora_weights(directory)
    found = differences(pipeline.transformer.eval())
    pipeline.unload_lora_weights()
    return found


def in_peft(directory: Path, tiny_dir: Path, transformer) -> dict[str, torch.Tensor]:
    """As the official trainer and app load it, into the original decoder."""
    model = PeftModel.from_pretrained(original_decoder(transformer), directory).eval()
    names = Names(transformer)
    return {names[name.removeprefix("base_model.model.")]: d for name, d in differences(model).items()}


def in_comfyui(directory: Path, tiny_dir: Path, transformer) -> dict[str, torch.Tensor]:
    """ComfyUI's arithmetic (comfy/weight_adapter): alpha / rank, no scale for a LoKr of whole factors; a DoRA's norms
    are those of the updated weight, as LyCORIS has them. Every key must be one that it reads."""
    (path,) = directory.glob("*_comfyui.safetensors")
    tensors, found = load_file(path), {}
    names, layers = Names(transformer), linears(transformer)
    ends = [key for key in tensors if key.endswith((".alpha", ".diff"))]
    for module in {key.removesuffix(".alpha").removesuffix(".diff") for key in ends}:
        keys = [key for key in tensors if key.startswith(f"{module}.")]
        own = {key.removeprefix(f"{module}."): tensors.pop(key).float() for key in keys}
        name = names[module.removeprefix("diffusion_model.decoder.")]
        weight = layers[name].weight.detach()
        if "oft_blocks" in own:
            blocks = own["oft_blocks"]
            skew = blocks - blocks.transpose(1, 2)
            if own["alpha"] and skew.norm() > own["alpha"] * weight.shape[0]:
                skew = skew * own["alpha"] * weight.shape[0] / skew.norm()
            eye = torch.eye(blocks.shape[1])
            r = (eye + skew) @ (eye - skew).inverse()
            rotated = torch.einsum("knm,kni->kmi", r, weight.view(*blocks.shape[:2], -1)).reshape(weight.shape)
            found[name] = own["rescale"] * rotated - weight
            continue
        if "diff" in own:
            found[name] = own["diff"]
            continue
        if "lora_up.weight" in own:
            delta, dim = own["lora_up.weight"] @ own["lora_down.weight"], own["lora_down.weight"].shape[0]
        elif "hada_w1_a" in own:
            delta = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
            dim = own["hada_w1_b"].shape[0]
        else:
            dim = None
            factors = []
            for factor in ("lokr_w1", "lokr_w2"):
                if factor not in own:
                    dim = own[f"{factor}_b"].shape[0]
                    own[factor] = own[f"{factor}_a"] @ own[f"{factor}_b"]
                factors.append(own[factor])
            delta = torch.kron(*factors)
        delta = delta * (own["alpha"] / dim if dim else 1.0)
        if "dora_scale" in own:
            assert own["dora_scale"].shape == (weight.shape[0], 1), "broadcast over rows"
            updated = weight + delta
            delta = own["dora_scale"] * updated / updated.norm(dim=1, keepdim=True) - weight
        found[name] = delta
    assert not tensors, f"unread: {list(tensors)[:3]}"
    return found


READERS = {"diffusers": in_plain_diffusers, "peft": in_peft, "comfyui": in_comfyui}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_write_does_the_same_where_it_is_meant_for(family, transformer, tiny_dir, tmp_path):
    written = FAMILIES[family](transformer, tmp_path / "source")
    adapter = load_adapter(written.source)
    for to, write in WRITERS.items():
        if (family, to) in IMPOSSIBLE:
            with pytest.raises(ValueError, match=IMPOSSIBLE[family, to]):
                write(adapter, tmp_path / to)
            continue
        note = write(adapter, tmp_path / to)
        assert ("became a LoRA" in (note or "")) == (family in BECOME_LORA.get(to, ())), (to, note)
        assert_close(READERS[to](tmp_path / to, tiny_dir, transformer), written.deltas)
        # And it comes back, from there into every other format, as the same.
        back = load_adapter(tmp_path / to)
        assert_close(deltas(back, transformer), written.deltas)
        for then, rewrite in WRITERS.items():
            if family in CHAINED and then != to and (family, then) not in IMPOSSIBLE:
                rewrite(back, tmp_path / f"{to} {then}")
                again = load_adapter(tmp_path / f"{to} {then}")
                assert_close(deltas(again, transformer), written.deltas)


@pytest.mark.parametrize("family", ["PEFT, patterns", "PEFT, rslora", "PEFT, dora", "SimpleTuner", "ai-toolkit, dora"])
def test_round_trips_of_loras_are_exact_to_the_bit(family, transformer, tmp_path):
    written = FAMILIES[family](transformer, tmp_path / "source")
    first = load_adapter(written.source)
    for index, order in enumerate((("diffusers", "peft", "comfyui"), ("comfyui", "diffusers", "peft"))):
        adapter = first
        for to in order:
            WRITERS[to](adapter, tmp_path / f"{index} {to}")
            adapter = load_adapter(tmp_path / f"{index} {to}")
        for name, weights in first.modules.items():
            other = adapter.modules[name]
            assert other.scale == pytest.approx(weights.scale, rel=1e-7)
            for part, tensor in weights.tensors.items():
                assert other.tensors[part].dtype == tensor.dtype
                assert torch.equal(other.tensors[part].flatten(), tensor.flatten()), (to, name, part)
        WRITERS["diffusers"](adapter, tmp_path / "again")
        WRITERS["diffusers"](adapter, tmp_path / "and again")
        files = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("again", "and again")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_peft_files_have_what_the_official_trainer_writes(transformer, tmp_path):
    """The same keys, and a configuration with the same meaning, as PEFT itself saves for it."""
    official = peft_folder(transformer, tmp_path / "official", lora(lora_dropout=0.0))
    write_peft(load_adapter(official.source), tmp_path / "ours", base_model="ACE-Step/acestep-v15-base")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("official", "ours"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    theirs, ours = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("official", "ours"))
    assert ours["base_model_name_or_path"] == "ACE-Step/acestep-v15-base"
    differing = {"target_modules", "task_type", "base_model_name_or_path"}
    assert {k: v for k, v in ours.items() if k not in differing} == {
        k: v for k, v in theirs.items() if k not in differing
    }
    assert len(ours["target_modules"]) == 4 * 8 and "layers.0.self_attn.q_proj" in ours["target_modules"]


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("family", ["PEFT, dora", "PEFT, oft", "LyCORIS, lokr dora", "ComfyUI, generic"])
def test_baked_in(family, layout, transformer, tiny_dir, tiny_pipeline, tmp_path):
    written = FAMILIES[family](transformer, tmp_path / "source")
    checkpoint = tiny_dir
    if layout == "original":
        from acestep_pipeline.checkpoint_source import resolve_checkpoint

        write_original_checkpoint(tiny_pipeline, tmp_path / "original")
        checkpoint = resolve_checkpoint(str(tmp_path / "original"))
    base = BaseWeights(checkpoint)
    write_merged(load_adapter(written.source), base, tmp_path / "merged")
    merged = AceStepTransformer1DModel.from_pretrained(tmp_path / "merged")
    for name, parameter in merged.state_dict().items():
        expected = transformer.state_dict()[name]
        layer = name.removesuffix(".weight")
        if layer in written.deltas:
            torch.testing.assert_close(parameter, expected + written.deltas[layer], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(parameter, expected)
    tiny_pipeline.load_lora_weights(written.source)
    torch.testing.assert_close(velocity(merged), velocity(tiny_pipeline), rtol=1e-3, atol=1e-4)
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_merged(load_adapter(written.source), base, tmp_path / "merged")


def test_baked_in_by_shards_in_the_base_dtype(transformer, tiny_dir, tmp_path, monkeypatch):
    from acestep_pipeline.adapters.formats import bake

    written = comfyui(transformer, tmp_path / "source")
    transformer = AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer").to(torch.bfloat16)
    transformer.save_pretrained(tmp_path / "base/transformer", max_shard_size="100KB")
    monkeypatch.setattr(bake, "SHARD_SIZE", "50KB")
    write_merged(load_adapter(written.source), BaseWeights(tmp_path / "base"), tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 5
    merged = AceStepTransformer1DModel.from_pretrained(tmp_path / "merged", torch_dtype=torch.bfloat16)
    for name, layer in linears(merged).items():
        expected = linears(transformer)[name].weight.float() + written.deltas.get(name, 0)
        assert torch.equal(layer.weight, expected.to(torch.bfloat16)), name


def test_weighted_sums(transformer, tmp_path):
    """Adapters of other ranks, layers and kinds add up exactly; what is no sum is refused."""
    sources = ["PEFT, patterns", "PEFT, only mlp", "PEFT, rslora", "LyCORIS, lokr both", "PEFT, loha"]
    written = [FAMILIES[name](transformer, tmp_path / name) for name in sources]
    weights = [0.8, -1.5, 0.4, 1.0, 2.0]
    combined = combine([load_adapter(one.source) for one in written], weights)
    expected: dict[str, torch.Tensor] = {}
    for one, weight in zip(written, weights, strict=True):
        for name, delta in one.deltas.items():
            expected[name] = expected.get(name, 0) + weight * delta
    assert_close(deltas(combined, transformer), expected)
    assert combined.modules["layers.0.mlp.up_proj"].rank == 4, "no room for what is not there"
    for family, said in (("PEFT, dora", "DoRA is no sum"), ("PEFT, oft", "OFT is no"), ("LyCORIS, loha dora", "LoHa")):
        source = FAMILIES[family](transformer, tmp_path / family).source
        with pytest.raises(ValueError, match=said):
            combine([load_adapter(written[0].source), load_adapter(source)], [1.0, 1.0])
