"""Every kind of adapter, trained by the script: it all learns, the base stays, and the file is what was trained."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel
from huggingface_hub import ModelCard
from peft.tuners.tuners_utils import BaseTunerLayer

from acestep_pipeline.data.encoders import fingerprint
from acestep_pipeline.errors import UsageError
from acestep_pipeline.training import base_model, setup
from tests.test_adapters import velocity
from tests.training_runs import train_here

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

WEIGHTS = "pytorch_lora_weights.safetensors"
# The order of the keys counts: the first that matches a layer. Sorted, as a file's metadata is, it would be another.
PATTERNS = {
    "rank_pattern": {"v_proj": 3, "cross": 2, r"layers\.0\.self_attn\..*": 6},
    "alpha_pattern": {"layers.1.cross_attn.o_proj": 32, "cross_attn.linear_k": 16},
}
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lokr": {"adapter_type": "lokr"},
    "lokr of two products": {"adapter_type": "lokr", "lokr_factor": 16, "lokr_decompose_both": True, "rank": 2},
    "patterns": {"lora_config": PATTERNS},
    "lokr patterns": {"adapter_type": "lokr", "lora_config": PATTERNS, "lokr_factor": 2},
    "attention+mlp of two blocks": {"lora_layers": "attention+mlp", "lora_blocks": "0,3"},
}


def adapted_layers(transformer: torch.nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and scale of each adapted layer."""
    return {
        name: (next(iter(module.r.values())), next(iter(module.scaling.values())))
        for name, module in transformer.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


@pytest.fixture(scope="module")
def base_velocity(tiny_dir) -> torch.Tensor:
    return velocity(AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer"))


@pytest.fixture(scope="module", params=KINDS)
def run(request, demo_dir, tmp_path_factory):
    """A run of four updates of one kind: its kind, directory, flags, trained transformer, and what that was before."""
    output = tmp_path_factory.mktemp("kind") / "adapter"
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "lora_dropout": 0.1, "max_duration_s": 2}
    flags |= KINDS[request.param]
    if "lora_config" in flags:
        config = output.with_name("config.json")
        config.write_text(json.dumps(flags["lora_config"]))
        flags["lora_config"] = config
    seen: dict = {}
    add_lora, prepare_inputs = base_model.add_lora, setup.prepare_inputs

    def add(transformer, *args, **kwargs):
        seen["base"] = fingerprint(transformer)
        parameters = add_lora(transformer, *args, **kwargs)
        seen["before"] = {n: p.detach().clone() for n, p in transformer.named_parameters() if p.requires_grad}
        return parameters

    def prepare(*args, **kwargs):
        seen["inputs"] = prepare_inputs(*args, **kwargs)
        return seen["inputs"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "add_lora", add)
        patch.setattr(setup, "prepare_inputs", prepare)
        train_here(demo_dir, output, **flags)
    seen["inputs"].condition_mask.set(None)
    return request.param, output, flags, seen["inputs"].transformer.eval(), seen


def test_it_all_learns_and_loads_as_it_was_trained(run, tiny_dir, tiny_pipeline, base_velocity):
    kind, output, _, transformer, seen = run
    after = dict(transformer.named_parameters())
    assert not [name for name, tensor in seen["before"].items() if torch.equal(tensor, after[name])]
    trained = velocity(transformer)
    assert not torch.equal(trained, base_velocity)

    plain = AceStepPipeline.from_pretrained(tiny_dir)
    if "lokr" in kind:  # as the card says
        plain.transformer.load_lora_adapter(str(output), weight_name=WEIGHTS)
    else:
        plain.load_lora_weights(output)
    tiny_pipeline.load_lora_weights(output)
    for pipeline in (plain, tiny_pipeline):
        assert adapted_layers(pipeline.transformer) == adapted_layers(transformer)
        assert torch.equal(velocity(pipeline), trained)
        pipeline.disable_lora()
        assert torch.equal(velocity(pipeline), base_velocity)
        pipeline.enable_lora()
    name = tiny_pipeline.get_active_adapters()[0]
    tiny_pipeline.set_adapters([name], [0.0])
    assert torch.equal(velocity(tiny_pipeline), base_velocity)
    tiny_pipeline.set_adapters([name], [1.0])
    assert torch.equal(velocity(tiny_pipeline), trained)
    tiny_pipeline.unload_lora_weights()
    assert fingerprint(tiny_pipeline.transformer) == seen["base"]


def test_it_resumes_to_the_bit(run, demo_dir):
    _, output, flags, _, _ = run
    before = (output / WEIGHTS).read_bytes()
    train_here(demo_dir, output, resume_from_checkpoint=output / "checkpoint-2", **flags)
    assert (output / WEIGHTS).read_bytes() == before


def test_its_card_says_what_it_is_and_how_it_loads(run):
    kind, output, _, _, _ = run
    card = ModelCard.load(output / "README.md")
    assert "\n\n## Training\n" in card.text
    name = "LoKr" if "lokr" in kind else "DoRA" if kind == "dora" else "LoRA"
    assert f"A {name} for [ACE-Step" in card.text and f"| {name} | rank" in card.text
    assert ("lokr" in card.data.tags) == ("pipe.transformer.load_lora_adapter(" in card.text) == ("lokr" in kind)
    assert ("rank 2 in cross" in card.text) == ("patterns" in kind)


def test_ranks_and_scales_are_those_that_were_asked_for(run):
    kind, _, flags, transformer, _ = run
    for name, (rank, scale) in adapted_layers(transformer).items():
        expected, alpha = flags.get("rank", 4), 8
        if "patterns" in kind:
            expected = 3 if "to_v" in name else 2 if "cross" in name else 6 if "layers.0." in name else 4
            alpha = 32 if name == "layers.1.cross_attn.to_out.0" else 16 if "cross_attn.to_k" in name else 8
        assert (rank, scale) == (expected, alpha / (expected**0.5 if kind == "rslora" else expected)), name


def test_only_the_chosen_blocks_and_layers_are_adapted(run):
    kind, _, _, transformer, _ = run
    blocks = {name.split(".")[1] for name in adapted_layers(transformer)}
    assert blocks == ({"0", "3"} if "two blocks" in kind else {"0", "1", "2", "3"})
    if "two blocks" in kind:
        assert len(adapted_layers(transformer)) == 2 * (8 + 3)


def test_a_lokr_beside_a_lora_and_of_another_size(tiny_dir, tiny_pipeline, tmp_path):
    """Refused in one sentence, with the pipeline as it was."""
    from safetensors.torch import load_file, save_file

    from acestep_pipeline.adapters.settings import LoraSettings
    from acestep_pipeline.adapters.trainable import add_lora, save_lora

    transformer = AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer")
    add_lora(transformer, LoraSettings(adapter_type="lokr", r=64), seed=0)
    save_lora(transformer, tmp_path)
    before = velocity(tiny_pipeline)
    weights = load_file(tmp_path / WEIGHTS)
    wrong = {
        "wider": ({n: t.repeat(2, 2) if "w1" in n else t for n, t in weights.items()}, "64 outputs and 128 inputs"),
        "half": ({n: t for n, t in weights.items() if "w1" in n}, "a LoKr without its lokr_w2"),
    }
    for name, (tensors, said) in wrong.items():
        path = tmp_path / name / WEIGHTS
        path.parent.mkdir()
        save_file(tensors, path)
        with pytest.raises(UsageError) as caught:
            tiny_pipeline.load_lora_weights(Path(path.parent))
        assert said in str(caught.value) and "\n" not in str(caught.value)
        assert torch.equal(velocity(tiny_pipeline), before)
