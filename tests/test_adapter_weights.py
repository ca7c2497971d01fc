"""Choosing adapters: for all layers, for some, by the step; what is refused leaves the pipeline as it was."""

import math
from pathlib import Path

import pytest
import torch
from peft import OFTConfig

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.weights import ActiveAdapters, adapter_layers
from acestep_pipeline.errors import UsageError
from tests.test_adapters import save_trained, velocity

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SETTINGS = {
    "jazz": LoraSettings(r=4, lora_alpha=12.0),
    "lofi": LoraSettings(r=2, lora_alpha=3.0, use_rslora=True, target_modules=TARGETS),
    "dora": LoraSettings(r=2, lora_alpha=4.0, use_dora=True),
}


@pytest.fixture(scope="module")
def adapters(tiny_dir, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_trained(tiny_dir, root / name, SETTINGS[name], len(name)) for name in SETTINGS}


@pytest.fixture(scope="module")
def shared_pipeline(tiny_dir, adapters):
    pipeline = ACEStepPipeline.from_pretrained(tiny_dir)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.base_velocity = velocity(pipeline)
    for name, path in adapters.items():
        pipeline.load_lora_weights(path, adapter_name=name)
    return pipeline


@pytest.fixture
def pipeline(shared_pipeline):
    """With three adapters, each test's own way of using them; none deletes one."""
    yield shared_pipeline
    assert list(shared_pipeline.transformer.peft_config) == list(SETTINGS)
    shared_pipeline.enable_lora()


def generate(pipeline, **kwargs) -> torch.Tensor:
    """Latents of one prompt; five steps."""
    options = {"audio_duration": 2, "num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return pipeline("calm piano", generator=generator, **(options | kwargs)).audios


def test_switching_there_and_back_is_exact_and_makes_no_tensors(pipeline):
    base = {name: layer.get_base_layer().weight.clone() for name, layer in adapter_layers(pipeline.transformer)}
    choices = [(["jazz"], [0.8]), (["lofi", "jazz"], [0.4, -2]), (["dora"], None), (["jazz", "lofi", "dora"], 0.5)]
    expected = []
    for names, weights in choices:
        pipeline.set_adapters(names, weights)
        assert pipeline.get_active_adapters() == names
        expected.append(velocity(pipeline))
    assert len({tensor.sum().item() for tensor in expected}) == len(choices)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for names, weights in choices * 5:
            pipeline.set_adapters(names, weights)
    assert not [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for (names, weights), wanted in zip(choices, expected, strict=True):
        pipeline.set_adapters(names, weights)
        assert torch.equal(velocity(pipeline), wanted)
    assert all(
        torch.equal(layer.get_base_layer().weight, base[name]) for name, layer in adapter_layers(pipeline.transformer)
    )


def test_weight_0_is_the_base_to_the_bit_doras_magnitudes_included(pipeline):
    pipeline.set_adapters(["jazz", "lofi", "dora"], [0, 0.0, 0.0])
    assert torch.equal(velocity(pipeline), pipeline.base_velocity)
    assert pipeline.get_active_adapters() == []
    pipeline.set_adapters("jazz")
    assert pipeline.get_active_adapters() == ["jazz"] and not torch.equal(velocity(pipeline), pipeline.base_velocity)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"cross": 0.5}, lambda name: 0.5 if "cross_attn" in name else 1.0),
        (
            {"self_attn": 0, "layers.1": -1},
            lambda name: 0.0 if "self_attn" in name else -1.0 if "s.1." in name else 1.0,
        ),
        ({"layers.0-2": 0.2, "layers": 0.3}, lambda name: 0.3 if "layers.3." in name else 0.2),
        ({"layers.1-3.mlp": 2, "gate_proj": 0.1}, lambda name: 1.0 if "mlp" not in name else None),
        ({"transformer": {"q_proj": 0.7}}, lambda name: 0.7 if name.endswith("to_q") else 1.0),
        ({"to_out": 0.7}, lambda name: 0.7 if name.endswith("to_out.0") else 1.0),
    ],
)
def test_weights_by_layer(pipeline, weights, expected):
    pipeline.set_adapters(["lofi", "jazz"], [weights, 1.0])
    scale = 3.0 / math.sqrt(2)
    found = {name: layer.scaling["lofi"] / scale for name, layer in adapter_layers(pipeline.transformer)}
    for name, layer in adapter_layers(pipeline.transformer):
        wanted = expected(name)
        if wanted is None:
            wanted = 0.1 if name == "layers.0.mlp.gate_proj" else 1.0 if "layers.0." in name else 2.0
        assert found[name] == pytest.approx(wanted), name
        assert ("lofi" in layer.active_adapters) == (wanted != 0)
        assert ("jazz" in layer.active_adapters) == ("mlp" not in name)


@pytest.mark.parametrize(
    ("names", "weights", "said"),
    [
        ("rock", None, "no adapter 'rock' is loaded; loaded are: jazz, lofi, dora"),
        (["jazz", "rock"], [0.8, 0.4], "no adapter 'rock' is loaded; loaded are: jazz, lofi, dora"),
        ("jazz", -3, "the weight of 'jazz' must be a number from -2 to 2, not -3"),
        (["jazz", "lofi"], [0.1, math.nan], "the weight of 'lofi' must be a number from -2 to 2, not nan"),
        ("jazz", "0.8", "not '0.8'"),
        ("jazz", [True], "not True"),
        (["jazz", "lofi"], [0.8], "2 names, 1 weights"),
        (["jazz", "jazz"], [0.8, 0.4], "each adapter once"),
        ("jazz", {"mlp": 0.5}, "'mlp' matches none of the layers of the adapter 'jazz'"),
        ("lofi", {"layers.7": 0.5}, "'layers.7' matches none"),
        ("lofi", {"mlp": math.inf}, "the weight of 'lofi on mlp' must be a number from -2 to 2, not inf"),
    ],
)
def test_what_is_refused_leaves_the_adapters_as_they_were(pipeline, names, weights, said):
    pipeline.set_adapters(["lofi", "dora"], [{"mlp": 0.3}, -0.5])
    before = velocity(pipeline)
    with pytest.raises(UsageError) as caught:
        pipeline.set_adapters(names, weights)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(velocity(pipeline), before)
    assert pipeline.get_active_adapters() == ["lofi", "dora"]


def test_fused_adapters_have_to_be_unfused_first(tiny_pipeline, adapters):
    pipeline = tiny_pipeline
    for name in ("lofi", "jazz"):
        pipeline.load_lora_weights(adapters[name], adapter_name=name)
    pipeline.set_adapters("jazz")
    pipeline.fuse_lora()
    for call in (
        lambda: pipeline.set_adapters("lofi"),
        lambda: pipeline.delete_adapters("lofi"),
        lambda: pipeline.load_lora_weights(adapters["dora"], adapter_name="dora"),
    ):
        with pytest.raises(UsageError, match="unfuse_lora"):
            call()
    assert list(pipeline.transformer.peft_config) == ["lofi", "jazz"]
    pipeline.unfuse_lora()
    pipeline.set_adapters("lofi")


def test_an_oft_has_no_strengths(tiny_pipeline):
    tiny_pipeline.transformer.add_adapter(OFTConfig(r=0, oft_block_size=8, target_modules=["to_q"]), "turn")
    tiny_pipeline.set_adapters("turn")
    tiny_pipeline.set_adapters("turn", 0)
    with pytest.raises(UsageError, match="'turn' is an OFT"):
        tiny_pipeline.set_adapters("turn", 0.5)


def test_disabled_adapters_stay_so_until_they_are_enabled(pipeline):
    pipeline.disable_lora()
    pipeline.set_adapters("jazz")
    assert torch.equal(velocity(pipeline), pipeline.base_velocity)
    pipeline.enable_lora()
    assert not torch.equal(velocity(pipeline), pipeline.base_velocity)
    assert pipeline.get_active_adapters() == ["jazz"]


def test_a_deleted_adapter_is_gone_and_no_other_takes_its_place(tiny_pipeline, adapters, recwarn):
    pipeline, base_velocity = tiny_pipeline, velocity(tiny_pipeline)
    for name, path in adapters.items():
        pipeline.load_lora_weights(path, adapter_name=name)
    pipeline.set_adapters(["lofi", "dora"])
    with pytest.raises(UsageError, match="loaded are: jazz, lofi, dora"):
        pipeline.delete_adapters(["dora", "rock"])
    pipeline.delete_adapters("dora")
    assert pipeline.get_active_adapters() == ["lofi"]
    pipeline.delete_adapters(["lofi"])
    assert pipeline.get_active_adapters() == [] and torch.equal(velocity(pipeline), base_velocity)
    pipeline.delete_adapters("jazz")
    assert not [name for name, _ in pipeline.transformer.named_parameters() if "lora" in name]
    assert not [warning for warning in recwarn if "active" in str(warning.message)]
    pipeline.load_lora_weights(adapters["jazz"], adapter_name="jazz")
    assert pipeline.get_active_adapters() == ["jazz"]


def test_a_moment_is_restored_without_what_was_loaded_since(pipeline, adapters):
    pipeline.set_adapters(["jazz", "dora"], [0.3, {"cross": 0.0}])
    before, moment = velocity(pipeline), ActiveAdapters(pipeline.transformer)
    pipeline.load_lora_weights(adapters["lofi"], adapter_name="later")
    pipeline.set_adapters("later")
    moment.restore()
    assert torch.equal(velocity(pipeline), before)
    pipeline.delete_adapters("later")
    assert torch.equal(velocity(pipeline), before)


# ---------------------------------------------------------------------------------------------------------------------
# By the step


def test_a_style_enters_at_40_percent_of_the_steps(pipeline):
    """Exactly: the base's first two of five steps, then the adapter's from the latents that these left."""
    pipeline.set_adapters(["lofi"], [0.7])
    before, seen = velocity(pipeline), []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, tensors["latents"].clone(), pipe.get_active_adapters()))
        return {}

    scheduled = generate(
        pipeline, adapter_schedule={"jazz": [(0.0, 0.0), (0.4, 0.8)], "dora": [(0.4, 0.3)]}, callback_on_step_end=watch
    )
    assert [active for _, _, active in seen] == [[], [], *[["jazz", "dora"]] * 3]
    assert torch.equal(velocity(pipeline), before) and pipeline.get_active_adapters() == ["lofi"]

    pipeline.set_adapters("jazz", 0)
    by_hand = []

    def enter(pipe, step, timestep, tensors):
        by_hand.append(tensors["latents"].clone())
        if step == 1:
            pipe.set_adapters(["jazz", "dora"], [0.8, 0.3])

    expected = generate(pipeline, callback_on_step_end=enter)
    assert torch.equal(scheduled, expected)
    assert all(torch.equal(latents, mine) for (_, latents, _), mine in zip(seen, by_hand, strict=True))


def test_a_schedule_that_never_changes_is_set_adapters(pipeline):
    pipeline.set_adapters(["jazz", "lofi"], [{"cross": 0.5}, 0.2])
    expected = generate(pipeline)
    pipeline.set_adapters("dora")
    schedule = {"jazz": {"cross": 0.5}, "lofi": [(0.0, 0.2)]}
    assert torch.equal(generate(pipeline, adapter_schedule=schedule), expected)
    assert torch.equal(generate(pipeline, adapter_schedule={}), generate(pipeline, adapter_schedule={"jazz": 0}))


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"rock": 1.0}, "loaded are: jazz, lofi, dora"),
        ({"jazz": [(0.0, 1.0), (0.4, 3.0)]}, "from -2 to 2, not 3.0"),
        ({"jazz": [(0.4, 1.0), (0.2, 0.5)]}, "must ascend"),
        ({"jazz": [(40, 1.0)]}, "from 0 to below 1"),
        ({"jazz": [(math.nan, 1.0)]}, "from 0 to below 1"),
        ({"jazz": [0.4, 0.8]}, "a list of (share of the steps, weight)"),
        ({"jazz": []}, "a list of (share of the steps, weight)"),
        ({"jazz": "0.8"}, "a list of (share of the steps, weight)"),
    ],
)
def test_wrong_schedules(pipeline, schedule, said):
    pipeline.set_adapters("lofi", 0.7)
    before = velocity(pipeline)
    with pytest.raises(UsageError) as caught:
        generate(pipeline, adapter_schedule=schedule)
    assert said in str(caught.value)
    assert torch.equal(velocity(pipeline), before) and pipeline.get_active_adapters() == ["lofi"]


def test_a_generation_that_fails_leaves_the_adapters_as_they_were(pipeline):
    pipeline.set_adapters("lofi", 0.7)
    before = velocity(pipeline)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, adapter_schedule={"jazz": [(0.2, 1.0)]}, callback_on_step_end=fail)
    assert torch.equal(velocity(pipeline), before)
