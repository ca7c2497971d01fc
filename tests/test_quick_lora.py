"""Quick loading makes what diffusers makes, attribute by attribute, and leaves to diffusers what it can't."""

from pathlib import Path

import pytest
import torch
from diffusers import AceStepTransformer1DModel
from peft.tuners.tuners_utils import BaseTunerLayer

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.adapters import quick_lora
from acestep_pipeline.adapters.formats.install import diffusers_state
from acestep_pipeline.adapters.formats.locate import load_adapter
from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.weights import adapter_layers
from acestep_pipeline.errors import UsageError
from tests.test_adapters import save_trained, velocity

SETTINGS = {
    "lora": LoraSettings(r=4, lora_alpha=12.0),
    "rslora": LoraSettings(r=2, lora_alpha=3.0, use_rslora=True, target_modules=("to_q", "mlp.up_proj")),
    "patterns": LoraSettings(r=4, lora_alpha=4.0, rank_pattern={"cross": 2}, alpha_pattern={"self": 16.0}),
    "dora": LoraSettings(r=2, use_dora=True),
}


@pytest.fixture(scope="module")
def adapters(tiny_dir, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_trained(tiny_dir, root / name, SETTINGS[name], seed) for seed, name in enumerate(SETTINGS)}


def transformer(tiny_dir, dtype: torch.dtype) -> AceStepTransformer1DModel:
    return AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer", dtype=dtype)


def attributes(layer: BaseTunerLayer) -> dict:
    """All that a layer knows, tensors by value."""
    plain = {name: value for name, value in vars(layer).items() if not name.startswith("_") and name != "kwargs"}
    tensors = {name: (tensor.dtype, tensor.tolist()) for name, tensor in layer.state_dict().items()}
    modules = {name: type(module) for name, module in layer.named_modules()}
    return plain | {"tensors": tensors, "modules": modules, "active": layer.active_adapters, "type": type(layer)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_attribute_is_what_diffusers_sets(tiny_dir, adapters, dtype):
    quick, slow = transformer(tiny_dir, dtype), transformer(tiny_dir, dtype)
    for name in ("lora", "rslora", "patterns"):
        state_dict, metadata = diffusers_state(load_adapter(adapters[name]))
        assert quick_lora.add_lora(quick, state_dict, metadata, name)
        slow.load_lora_adapter(dict(state_dict), metadata=metadata, adapter_name=name, low_cpu_mem_usage=True)
        layers, expected = dict(adapter_layers(quick)), dict(adapter_layers(slow))
        assert list(layers) == list(expected)
        for layer_name, layer in layers.items():
            assert attributes(layer) == attributes(expected[layer_name]), layer_name
        assert quick.active_adapters() == slow.active_adapters() == [name]
    assert list(quick.peft_config) == list(slow.peft_config)
    for name, config in quick.peft_config.items():
        ours, theirs = config.to_dict(), slow.peft_config[name].to_dict()
        assert {key: ours[key] for key in ("r", "lora_alpha", "use_rslora")} == {
            key: theirs[key] for key in ("r", "lora_alpha", "use_rslora")
        }
        assert ours["rank_pattern"] == theirs["rank_pattern"] and ours["alpha_pattern"] == theirs["alpha_pattern"]
    quick.delete_adapters(["lora", "patterns"])
    slow.delete_adapters(["lora", "patterns"])
    for model in (quick, slow):
        model.set_adapters("rslora", 0.5)
    if dtype == torch.float32:
        assert torch.equal(velocity(quick), velocity(slow))
    quick.unload_lora()
    assert [name for name, _ in quick.named_modules()] == [
        name for name, _ in transformer(tiny_dir, dtype).named_modules()
    ]


def test_a_loaded_adapter_does_not_change_with_its_file(tiny_pipeline, adapters, tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes((adapters["lora"] / "pytorch_lora_weights.safetensors").read_bytes())
    tiny_pipeline.load_lora_weights(path, adapter_name="lora")
    before = velocity(tiny_pipeline)
    with path.open("r+b") as file:
        file.seek(-4096, 2)
        file.write(bytes(4096))
    assert torch.equal(velocity(tiny_pipeline), before)


def test_what_it_can_not_do_is_diffusers_own(tiny_dir, adapters):
    model = transformer(tiny_dir, torch.float32)
    modules = [name for name, _ in model.named_modules()]
    state_dict, metadata = diffusers_state(load_adapter(adapters["dora"]))
    assert not quick_lora.add_lora(model, state_dict, metadata, "dora")
    state_dict, metadata = diffusers_state(load_adapter(adapters["lora"]))
    wider = {name: torch.cat([t, t], dim=int("lora_A" in name)) for name, t in state_dict.items()}
    deeper = state_dict | {name.replace("layers.3", "layers.4"): tensor for name, tensor in state_dict.items()}
    for wrong in (wider, deeper, {}):
        assert not quick_lora.add_lora(model, wrong, metadata, "lora")
    model._hf_hook = object()  # as offloading leaves
    assert not quick_lora.add_lora(model, state_dict, metadata, "lora")
    del model._hf_hook
    assert [name for name, _ in model.named_modules()] == modules and not hasattr(model, "peft_config")
    with torch.device("meta"):
        meta = AceStepTransformer1DModel.from_config(model.config)
    assert not quick_lora.add_lora(meta, state_dict, metadata, "lora")


@pytest.mark.parametrize("name", ["v1.5", "keys"])
def test_names_that_pytorch_does_not_take(tiny_dir, adapters, name):
    pipeline = ACEStepPipeline.from_pretrained(tiny_dir)
    with pytest.raises(UsageError, match=f"'{name}' can't be an adapter's name; take one without dots"):
        pipeline.load_lora_weights(adapters["lora"], adapter_name=name)
    with pytest.raises(UsageError, match=f"'{name}' can't be an adapter's name"):  # which diffusers loads
        pipeline.load_lora_weights(adapters["dora"], adapter_name=name)
    pipeline.load_lora_weights(adapters["lora"], adapter_name="good")
    assert pipeline.get_active_adapters() == ["good"]
