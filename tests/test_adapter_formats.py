"""Adapters of every trainer in our pipeline: each layer changes by exactly what that trainer's formula says."""

import warnings

import pytest
import torch
from diffusers import AceStepTransformer1DModel
from peft import LoKrConfig, inject_adapter_in_model

from acestep_pipeline import ACEStepPipeline
from tests.adapter_files import FAMILIES, comfyui, differences, lycoris
from tests.test_adapters import velocity


@pytest.fixture(scope="module")
def transformer(tiny_dir) -> AceStepTransformer1DModel:
    return AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer")


@pytest.fixture(scope="module")
def base_velocity(tiny_dir) -> torch.Tensor:
    return velocity(AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer"))


@pytest.fixture(scope="module")
def shared_pipeline(tiny_dir):
    return ACEStepPipeline.from_pretrained(tiny_dir)


@pytest.fixture
def pipeline(shared_pipeline):
    """One for all tests, without adapters when a test begins."""
    yield shared_pipeline
    shared_pipeline.unload_lora_weights()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_changes_as_its_trainer_says(family, transformer, pipeline, base_velocity, tmp_path):
    written = FAMILIES[family](transformer, tmp_path / "adapter")
    names = [name for name, _ in pipeline.transformer.named_modules()]
    pipeline.load_lora_weights(written.source, adapter_name="it")
    found = differences(pipeline.transformer)
    assert found.keys() == written.deltas.keys()
    for name, delta in found.items():
        torch.testing.assert_close(
            delta, written.deltas[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    adapted = velocity(pipeline)
    assert (adapted - base_velocity).abs().max() > 1e-3

    # It can be scaled, disabled and removed like any other.
    pipeline.set_adapters(["it"], [0.0])
    assert torch.equal(velocity(pipeline), base_velocity)
    pipeline.set_adapters(["it"], [1.0])
    assert torch.equal(velocity(pipeline), adapted)
    pipeline.disable_lora()
    assert torch.equal(velocity(pipeline), base_velocity)
    pipeline.enable_lora()
    pipeline.unload_lora_weights()
    assert torch.equal(velocity(pipeline), base_velocity)
    assert [name for name, _ in pipeline.transformer.named_modules()] == names


@pytest.mark.parametrize("first", ["LyCORIS, lokr", "ComfyUI, generic"])
def test_kinds_beside_each_other_add_up(first, transformer, pipeline, tmp_path):
    written = [comfyui(transformer, tmp_path / "lora", "generic"), lycoris(transformer, tmp_path / "lokr"),
               lycoris(transformer, tmp_path / "loha", "loha")]  # fmt: skip
    if first == "LyCORIS, lokr":
        written[:2] = written[1::-1]
    for name, one in zip(("first", "second", None), written, strict=True):
        with warnings.catch_warnings():  # PEFT's about a second adapter
            warnings.simplefilter("error")
            pipeline.load_lora_weights(one.source, adapter_name=name)
        assert pipeline.get_active_adapters() == [name or "default_2"]
        found = differences(pipeline.transformer)
        for name, delta in one.deltas.items():
            torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-5)
    pipeline.set_adapters(["first", "second", "default_2"], [0.5, -1.0, 2.0])
    for name, delta in differences(pipeline.transformer).items():
        expected = 0.5 * written[0].deltas[name] - written[1].deltas[name] + 2 * written[2].deltas[name]
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-4)


def test_any_kind_takes_the_place_of_any_other(transformer, pipeline, tmp_path):
    kinds = ("ComfyUI, generic", "LyCORIS, lokr", "LyCORIS, diag-oft", "LyCORIS, loha", "ComfyUI, dora")
    for index, family in enumerate((*kinds, kinds[0])):
        written = FAMILIES[family](transformer, tmp_path / str(index))
        pipeline.load_lora_weights(written.source, adapter_name="slot", hotswap=index > 0)
        assert pipeline.get_active_adapters() == ["slot"]
        for name, delta in differences(pipeline.transformer).items():
            torch.testing.assert_close(delta, written.deltas[name], rtol=1e-4, atol=1e-5)


def test_peft_still_warns_of_a_second_adapter(transformer):
    """`progress.quiet_loading` silences it; once PEFT is silent of itself, that line can go."""
    model = AceStepTransformer1DModel.from_config(transformer.config)
    inject_adapter_in_model(LoKrConfig(target_modules=["to_q"]), model, adapter_name="first")
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
        inject_adapter_in_model(LoKrConfig(target_modules=["to_q"]), model, adapter_name="second")
