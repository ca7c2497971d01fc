"""Hot-swaps: every kind of LoRA in the place of every other, exactly, and without a new compilation."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel
from torch._dynamo.utils import counters

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import save_lora
from acestep_pipeline.adapters.weights import adapter_layers
from acestep_pipeline.errors import UsageError
from tests.test_adapters import trained, velocity

ALL = ("to_q", "to_k", "to_v", "to_out.0", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SETTINGS = {
    "jazz": LoraSettings(r=4, lora_alpha=12.0),
    "small": LoraSettings(r=2, lora_alpha=3.0),
    "rs": LoraSettings(r=3, lora_alpha=3.0, use_rslora=True),
    "wide": LoraSettings(r=4, lora_alpha=5.0, target_modules=ALL),
    "narrow": LoraSettings(r=8, lora_alpha=12.0, target_modules=("cross_attn.to_q",)),
    "patterns": LoraSettings(r=4, lora_alpha=4.0, rank_pattern={"cross": 2}, alpha_pattern={"self": 16.0}),
    "dora": LoraSettings(r=2, use_dora=True),
    "lokr": LoraSettings(r=2, adapter_type="lokr"),
}
LORAS = [name for name in SETTINGS if name not in ("dora", "lokr")]


def with_one_block(model):
    """The same pipeline or DiT with the first of the DiT's blocks alone: quicker to compile."""
    transformer = getattr(model, "transformer", model)
    transformer.layers = transformer.layers[:1]
    transformer.layer_types = transformer.layer_types[:1]
    return model


@pytest.fixture
def pipeline(tiny_pipeline):
    return with_one_block(tiny_pipeline)


@pytest.fixture(scope="module")
def adapters(tiny_dir, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    transformer = with_one_block(AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer"))
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        save_lora(trained(copy.deepcopy(transformer), settings, seed), root / name)
    return {name: root / name for name in SETTINGS}


@pytest.fixture(scope="module")
def expected(tiny_dir, adapters) -> dict[str, list[torch.Tensor]]:
    """What each adapter alone predicts, at weight 1 and at 0.4."""
    pipeline, expected = with_one_block(ACEStepPipeline.from_pretrained(tiny_dir)), {}
    for name, path in adapters.items():
        pipeline.load_lora_weights(path, adapter_name="alone")
        expected[name] = [velocity(pipeline)]
        pipeline.set_adapters("alone", 0.4)
        expected[name].append(velocity(pipeline))
        pipeline.delete_adapters("alone")
    return expected


def assert_is(pipeline, expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(velocity(pipeline), expected[0], rtol=0, atol=2e-5)
    pipeline.set_adapters("slot", 0.4)
    torch.testing.assert_close(velocity(pipeline), expected[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_is_compiled_once_whatever_comes(pipeline, adapters, expected, backend):
    """Other ranks, scales, layers and weights."""
    pipeline.enable_lora_hotswap(target_rank=8)
    pipeline.load_lora_weights(adapters["jazz"], adapter_name="slot")
    tensors = [parameter.data_ptr() for parameter in pipeline.transformer.parameters()]
    torch.compiler.reset()
    counters.clear()
    pipeline.transformer.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        velocity(pipeline)
        assert counters["stats"]["unique_graphs"] == 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_is(pipeline, expected["jazz"])
            for name in [*LORAS[::-1], "wide", "narrow"]:
                pipeline.load_lora_weights(adapters[name], adapter_name="slot", hotswap=True)
                assert_is(pipeline, expected[name])
            pipeline.set_adapters("slot", 0)
            before = velocity(pipeline)
            pipeline.set_adapters("slot", {"cross": -0.5, "self": 2})
            assert not torch.equal(velocity(pipeline), before)
            for name, said in (("dora", "of another kind"), ("lokr", "")):
                with pytest.raises(UsageError, match=said):
                    pipeline.load_lora_weights(adapters[name], adapter_name="slot", hotswap=True)
            pipeline.load_lora_weights(adapters["jazz"], adapter_name="slot", hotswap=True)
            assert_is(pipeline, expected["jazz"])
    assert counters["stats"]["unique_graphs"] == 1
    assert [parameter.data_ptr() for parameter in pipeline.transformer.parameters()] == tensors


def test_blocks_that_are_compiled_one_by_one_are_not_compiled_again(tiny_pipeline, adapters, expected):
    """One graph for each kind of block, sliding and full; and the same sound as without."""
    tiny_pipeline.enable_lora_hotswap(target_rank=8)
    tiny_pipeline.load_lora_weights(adapters["jazz"], adapter_name="slot")
    plain = {}
    for name in ("jazz", "rs"):
        tiny_pipeline.load_lora_weights(adapters[name], adapter_name="slot", hotswap=True)
        plain[name] = velocity(tiny_pipeline)
    torch.compiler.reset()
    counters.clear()
    tiny_pipeline.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(velocity(tiny_pipeline), plain["rs"], rtol=0, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 2
        with torch._dynamo.config.patch(error_on_recompile=True):
            tiny_pipeline.load_lora_weights(adapters["jazz"], adapter_name="slot", hotswap=True)
            torch.testing.assert_close(velocity(tiny_pipeline), plain["jazz"], rtol=0, atol=1e-5)
            with pytest.raises(UsageError, match="call enable_lora_hotswap"):
                tiny_pipeline.load_lora_weights(adapters["lokr"], adapter_name="slot", hotswap=True)


def test_compiled_blocks_without_room_refuse_what_has_none(pipeline, adapters, expected):
    pipeline.load_lora_weights(adapters["small"], adapter_name="slot")
    pipeline.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with pytest.raises(UsageError, match="its rank is 4, and 'slot' has room for 2; call enable_lora_hotswap"):
        pipeline.load_lora_weights(adapters["jazz"], adapter_name="slot", hotswap=True)
    assert_is(pipeline, expected["small"])


def test_diffusers_still_names_no_repeated_blocks():
    """Once it does, `ACEStepPipeline.__init__` need not."""
    assert not AceStepTransformer1DModel._repeated_blocks


def test_every_lora_in_the_place_of_every_other_without_any_preparation(pipeline, adapters, expected):
    pipeline.load_lora_weights(adapters["small"], adapter_name="beside")
    pipeline.load_lora_weights(adapters["jazz"], adapter_name="slot")
    for name in [*LORAS, "dora", *LORAS[::-1]]:
        pipeline.load_lora_weights(adapters[name], adapter_name="slot", hotswap=True)
        assert pipeline.get_active_adapters() == ["slot"]
        assert_is(pipeline, expected[name])
    pipeline.set_adapters("beside")
    pipeline.load_lora_weights(adapters["wide"], adapter_name="slot", hotswap=True)
    assert pipeline.get_active_adapters() == ["beside"]
    torch.testing.assert_close(velocity(pipeline), expected["small"][0], rtol=0, atol=2e-5)


def test_two_slots_of_a_compiled_model_are_mixed_without_a_new_compilation(pipeline, adapters, expected):
    pipeline.enable_lora_hotswap(target_rank=8, target_modules=["attention"])
    for name in ("jazz", "small"):
        pipeline.load_lora_weights(adapters[name], adapter_name=name)
    pipeline.set_adapters(["jazz", "small"], [1, 0])
    torch.compiler.reset()
    pipeline.transformer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(velocity(pipeline), expected["jazz"][0], rtol=0, atol=2e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipeline.set_adapters(["jazz", "small"], [0, 0.4])
        torch.testing.assert_close(velocity(pipeline), expected["small"][1], rtol=0, atol=2e-5)
        with pytest.raises(UsageError, match="no room there; call enable_lora_hotswap"):
            pipeline.load_lora_weights(adapters["wide"], adapter_name="small", hotswap=True)
        torch.testing.assert_close(velocity(pipeline), expected["small"][1], rtol=0, atol=2e-5)


def test_what_can_not_be_swapped_is_said_and_changes_nothing(pipeline, adapters, expected):
    with pytest.raises(UsageError, match="no adapter 'slot' is loaded that it could replace; loaded are: none"):
        pipeline.load_lora_weights(adapters["jazz"], adapter_name="slot", hotswap=True)
    for rank in (0, -1, 2.5):
        with pytest.raises(UsageError, match="target_rank must be a positive number"):
            pipeline.enable_lora_hotswap(target_rank=rank)
    with pytest.raises(UsageError, match="matches no linear layer"):
        pipeline.enable_lora_hotswap(target_modules=["to_x"])
    pipeline.enable_lora_hotswap(target_rank=2)
    pipeline.load_lora_weights(adapters["small"], adapter_name="slot")
    with pytest.raises(UsageError, match="before the first adapter is loaded"):
        pipeline.enable_lora_hotswap(target_rank=4)
    with pytest.raises(UsageError, match="its rank is 4, and 'slot' has room for 2"):
        pipeline.load_lora_weights(adapters["jazz"], adapter_name="slot", hotswap=True)
    assert_is(pipeline, expected["small"])
    # A higher rank than was reckoned with has its own room; another kind has none, but loads.
    pipeline.load_lora_weights(adapters["jazz"], adapter_name="more")
    pipeline.load_lora_weights(adapters["dora"], adapter_name="dora")
    pipeline.set_adapters("more")
    torch.testing.assert_close(velocity(pipeline), expected["jazz"][0], rtol=0, atol=2e-5)
    pipeline.set_adapters("dora")
    torch.testing.assert_close(velocity(pipeline), expected["dora"][0], rtol=0, atol=2e-5)


def test_diffusers_still_has_the_gaps(tiny_dir, adapters):
    def swap(name: str, first: str = "jazz") -> AceStepPipeline:
        plain = with_one_block(AceStepPipeline.from_pretrained(tiny_dir))
        plain.transformer.enable_lora_hotswap(target_rank=8)
        plain.load_lora_weights(adapters[first], adapter_name="slot")
        plain.load_lora_weights(adapters[name], adapter_name="slot", hotswap=True)
        return plain

    for name in ("rs", "wide", "patterns"):
        with pytest.raises((ValueError, RuntimeError), match="ncompatible|unexpected keys"):
            swap(name)
    plain = swap("small")
    layer = next(layer for _, layer in adapter_layers(plain.transformer))
    assert layer.scaling["slot"].item() == 3 / 2
    plain.set_adapters("slot")
    assert layer.scaling["slot"] == 12 / 4
