"""Several adapters in one batch are what they are one by one."""

from pathlib import Path

import pytest
import torch
from peft import OFTConfig

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.adapters.mixed_batch import adapters_by_item, check_choices
from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.weights import adapter_layers, check_weights
from acestep_pipeline.errors import UsageError
from tests.test_adapters import save_trained, velocity

SETTINGS = {
    "jazz": LoraSettings(r=4, lora_alpha=12.0),
    "wide": LoraSettings(r=3, lora_alpha=3.0, use_rslora=True, target_modules=("to_q", "to_v", "mlp.up_proj")),
    "dora": LoraSettings(r=2, lora_alpha=4.0, use_dora=True),
    "lokr": LoraSettings(r=2, adapter_type="lokr", lora_alpha=1.0),
}
PROMPTS = [
    "calm piano",
    "a very long description of a slow waltz for strings, warm pads and a distant choir",
    "techno",
]
LYRICS = ["[verse]\nla la la la la la la la", "", "[Instrumental]"]


@pytest.fixture(scope="module")
def adapters(tiny_dir, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_trained(tiny_dir, root / name, SETTINGS[name], len(root.parts)) for name in SETTINGS}


def load(tiny_dir, adapters, *names) -> ACEStepPipeline:
    pipeline = ACEStepPipeline.from_pretrained(tiny_dir)
    pipeline.set_progress_bar_config(disable=True)
    for name in names:
        pipeline.load_lora_weights(adapters[name], adapter_name=name)
    return pipeline


@pytest.fixture(scope="module")
def loras(tiny_dir, adapters) -> ACEStepPipeline:
    return load(tiny_dir, adapters, "jazz", "wide", "dora")


@pytest.fixture(scope="module")
def lokr(tiny_dir, adapters) -> ACEStepPipeline:
    return load(tiny_dir, adapters, "lokr")


def generate(pipeline, prompts: list[str], lyrics: list[str], seeds: list[int], **kwargs) -> torch.Tensor:
    return pipeline(
        prompts,
        lyrics=lyrics,
        audio_duration=2,
        num_inference_steps=4,
        guidance_scale=kwargs.pop("guidance_scale", 4.0),
        cfg_interval_end=kwargs.pop("cfg_interval_end", 0.6),
        output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **kwargs,
    ).audios


@pytest.mark.parametrize(
    "choices",
    [
        ["jazz", None, ("wide", 0.5)],
        [{"wide": -0.7, "jazz": 0.4}, "jazz", {"jazz": 0.4, "wide": -0.7}],
        ["dora", ("jazz", {"cross": 0.2}), ("dora", 0.5)],
        [{"jazz": 0.5, "dora": 0.5}, {"dora": 0.5, "jazz": 0.5}, "wide"],
        [None, {}, ("jazz", 0)],
        ["jazz", "jazz", "jazz"],
    ],
)
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_a_mixed_batch_is_its_items_one_by_one(loras, choices, guidance_scale):
    """Prompts of unequal lengths, with steps that are guided (the batch twice) and others that are not."""
    loras.set_adapters("wide", 0.3)
    before = velocity(loras)
    mixed = generate(loras, PROMPTS, LYRICS, [5, 6, 7], adapters=choices, guidance_scale=guidance_scale)
    assert torch.equal(velocity(loras), before) and loras.get_active_adapters() == ["wide"]
    for item, choice in enumerate(choices):
        of_item = dict(
            [(choice, 1.0)] if isinstance(choice, str) else [choice] if isinstance(choice, tuple) else choice or {}
        )
        loras.set_adapters(list(of_item), list(of_item.values()))
        alone = generate(loras, [PROMPTS[item]], [LYRICS[item]], [5 + item], guidance_scale=guidance_scale)
        torch.testing.assert_close(mixed[item : item + 1], alone, rtol=0, atol=1e-5)
    if len({str(choice) for choice in choices if choice and choice != ("jazz", 0)}) > 1:
        loras.set_adapters([])
        without = generate(loras, PROMPTS, LYRICS, [5, 6, 7], guidance_scale=guidance_scale)
        assert (mixed - without).abs().amax(dim=(1, 2)).gt(1e-3).tolist() == [choice is not None for choice in choices]


def test_a_lokr_in_a_mixed_batch(lokr):
    mixed = generate(lokr, PROMPTS, LYRICS, [5, 6, 7], adapters=["lokr", None, ("lokr", 0.5)])
    for item, weight in enumerate((1.0, 0.0, 0.5)):
        lokr.set_adapters("lokr", weight)
        alone = generate(lokr, [PROMPTS[item]], [LYRICS[item]], [5 + item])
        torch.testing.assert_close(mixed[item : item + 1], alone, rtol=0, atol=1e-5)
        assert (
            weight == 0
            or (alone - generate(lokr, [PROMPTS[item]], [LYRICS[item]], [5 + item], adapters=[None])).abs().max()
            > 1e-3
        )


def test_the_model_itself_and_one_prompt(loras):
    """Without the pipeline, as a service that batches by itself would; and a prompt that is no list."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(4, 50, 16, generator=generator),
        "timestep": torch.rand(4, generator=generator),
        "encoder_hidden_states": torch.randn(4, 20, 64, generator=generator),
        "context_latents": torch.randn(4, 50, 32, generator=generator),
    }
    inputs["timestep_r"] = inputs["timestep"]
    choices = check_choices(loras.transformer, ["jazz", "dora", "jazz", None], num_items=4)
    with torch.no_grad():
        with adapters_by_item(loras.transformer, choices):
            mixed = loras.transformer(**inputs).sample
        for item, weights in enumerate(choices):
            loras.set_adapters(list(weights))
            alone = loras.transformer(**{name: tensor[item : item + 1] for name, tensor in inputs.items()}).sample
            torch.testing.assert_close(mixed[item : item + 1], alone, rtol=0, atol=1e-5)
    options = {"audio_duration": 1, "num_inference_steps": 2, "output_type": "latent"}
    one = loras("calm", adapters=["jazz"], generator=torch.Generator().manual_seed(0), **options).audios
    loras.set_adapters("jazz")
    alone = loras("calm", generator=torch.Generator().manual_seed(0), **options).audios
    torch.testing.assert_close(one, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (["jazz", "rock", None], "no adapter 'rock' is loaded; loaded are: jazz, wide, dora"),
        (["jazz", None], "an entry for each of the 3 prompts"),
        ("jazz", "an entry for each of the 3 prompts"),
        (["jazz", None, ("wide", 3)], "the weight of 'wide' must be a number from -2 to 2, not 3"),
        (["jazz", None, 0.5], "not 0.5"),
        (["jazz", None, ["wide"]], "None, a name, (name, weight)"),
    ],
)
def test_what_is_refused_leaves_the_pipeline_as_it_was(loras, choices, said):
    loras.set_adapters("wide", 0.3)
    before = velocity(loras)
    with pytest.raises(UsageError) as caught:
        generate(loras, PROMPTS, LYRICS, [1, 2, 3], adapters=choices)
    assert said in str(caught.value)
    assert torch.equal(velocity(loras), before)


def test_what_does_not_go_together_is_said(loras):
    for options in ({"adapter_schedule": {"jazz": 0.5}}, {"attention_kwargs": {"scale": 0.5}}):
        with pytest.raises(UsageError, match="go with neither"):
            generate(loras, PROMPTS, LYRICS, [1, 2, 3], adapters=[None] * 3, **options)


def test_an_oft_is_refused_and_a_fused_adapter_too(tiny_pipeline, adapters):
    tiny_pipeline.transformer.add_adapter(OFTConfig(r=0, oft_block_size=8, target_modules=["to_q"]), "turn")
    with pytest.raises(UsageError, match=r"'turn' \(oft\) can't be mixed in a batch"):
        tiny_pipeline("calm", adapters=["turn"])
    tiny_pipeline.delete_adapters("turn")
    tiny_pipeline.load_lora_weights(adapters["jazz"], adapter_name="jazz")
    tiny_pipeline.fuse_lora()
    with pytest.raises(UsageError, match="unfuse_lora"):
        tiny_pipeline("calm", adapters=["jazz"])


def test_a_failure_inside_leaves_no_hooks(loras):
    loras.set_adapters("wide", 0.3)
    before = velocity(loras)
    with pytest.raises(KeyboardInterrupt):
        with adapters_by_item(loras.transformer, [check_weights(loras.transformer, "jazz", 0.5)]):
            raise KeyboardInterrupt
    assert torch.equal(velocity(loras), before)
    assert not any(layer._forward_hooks for _, layer in adapter_layers(loras.transformer))
