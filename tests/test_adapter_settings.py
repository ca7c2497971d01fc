"""Settings of an adapter: sets of targets, blocks, patterns, kinds; what is refused, before anything is loaded."""

import json

import pytest
import torch
from diffusers import AceStepTransformer1DModel

from acestep_pipeline.adapters.settings import LoraSettings, parse_blocks, parse_targets, read_lora_config
from acestep_pipeline.adapters.trainable import add_lora, resolve_pattern, resolve_target_modules
from acestep_pipeline.errors import UsageError
from acestep_pipeline.training import arguments
from acestep_pipeline.training.argument_checks import check_args
from acestep_pipeline.training.settings import lora_settings


@pytest.fixture(scope="module")
def transformer() -> AceStepTransformer1DModel:
    with torch.device("meta"):
        return AceStepTransformer1DModel(num_hidden_layers=12)


@pytest.mark.parametrize(
    ("spelt", "names"),
    [
        ("attention", "to_q,to_k,to_v,to_out.0"),
        ("attention+mlp", "to_q,to_k,to_v,to_out.0,mlp.gate_proj,mlp.up_proj,mlp.down_proj"),
        ("self", "self_attn.to_q,self_attn.to_k,self_attn.to_v,self_attn.to_out.0"),
        ("cross, gate_proj", "cross_attn.to_q,cross_attn.to_k,cross_attn.to_v,cross_attn.to_out.0,gate_proj"),
        (["mlp", "mlp.up_proj"], "mlp.gate_proj,mlp.up_proj,mlp.down_proj"),
    ],
)
def test_sets_of_targets(transformer, spelt, names):
    assert list(parse_targets(spelt)) == names.split(",")
    assert resolve_target_modules(transformer, parse_targets(spelt)) == names.split(",")


def test_a_rank_that_a_layer_can_not_use(tiny_dir):
    tiny = AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer")
    pattern = LoraSettings(r=96, rank_pattern={"cross_attn.to_k": 97})
    with pytest.raises(UsageError, match="--rank 97 .* layers.0.cross_attn.to_k can use, a layer from 64 to 32: at"):
        add_lora(tiny, pattern, seed=0)
    assert add_lora(tiny, LoraSettings(r=96), seed=0)


def test_blocks(transformer):
    assert parse_blocks("0-2, 9") == parse_blocks([9, 2, 1, 0]) == (0, 1, 2, 9)
    assert parse_blocks(None) is None
    names = resolve_target_modules(transformer, ("q_proj", "self_attn.linear_k"), (1, 11))
    assert set(names) == {f"layers.{n}.{name}" for n in (1, 11)
                          for name in ("self_attn.to_q", "cross_attn.to_q", "self_attn.to_k")}  # fmt: skip
    for blocks, said in (((0, 12), "names 12; this transformer has the blocks 0 to 11"), ((), "names no block"),
                             (range(12, 100), "names 12, 13, …, 99; this")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            resolve_target_modules(transformer, ("to_q",), blocks)
    with pytest.raises(UsageError, match="'condition_embedder' .* matches no linear layer"):
        resolve_target_modules(transformer, ("condition_embedder",), (1,))
    for wrong in ("3-1", "a", "1,,2", "-1", [-1]):
        with pytest.raises(UsageError, match="--lora_blocks takes numbers and ranges"):
            parse_blocks(wrong)


def test_patterns_name_layers_once_and_the_first_counts():
    names = [f"layers.{n}.{part}.{name}" for n in (0, 1, 10) for part in ("self_attn", "cross_attn")
             for name in ("to_q", "to_out.0")]  # fmt: skip
    found = resolve_pattern(names, {"layers.1.self_attn.q_proj": 8, "self": 4, "o_proj": 2}, field="rank_pattern")
    assert found["layers.1.self_attn.to_q"] == 8, "and not layers.10"
    assert found["layers.10.self_attn.to_q"] == 4 and found["layers.0.self_attn.to_out.0"] == 4
    assert found["layers.0.cross_attn.to_out.0"] == 2 and "layers.0.cross_attn.to_q" not in found
    with pytest.raises(UsageError) as caught:
        resolve_pattern(names, {"mlp.up_proj": 8}, field="rank_pattern")
    assert "'mlp.up_proj' matches no adapted layer" in str(caught.value)
    assert "adapted are cross_attn.to_out.0, cross_attn.to_q, self_attn.to_out.0" in str(caught.value)
    with pytest.raises(UsageError, match="is no regular expression"):
        resolve_pattern(names, {"to_q(": 8}, field="rank_pattern")


def test_a_pattern_that_matches_nothing_fails_before_training(transformer):
    settings = LoraSettings(r=2, target_modules=("to_q",), alpha_pattern={"to_k": 4.0})
    with pytest.raises(UsageError, match="alpha_pattern in --lora_config: 'to_k' matches no adapted layer"):
        add_lora(transformer, settings, seed=0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--adapter_type loha", "--adapter_type must be one of lora, lokr, not 'loha'"),
        ("--adapter_type lokr --use_dora", "--use_dora is a kind of LoRA"),
        ("--adapter_type lokr --use_rslora", "--use_rslora is a kind of LoRA"),
        ("--adapter_type lokr --lokr_factor 0", "--lokr_factor must be -1"),
        ("--adapter_type lokr --lora_dropout 0.6", "at most 0.5"),
        ("--adapter_type lokr --base_quantization int8", "--adapter_type lokr needs the base unquantised"),
        ("--lokr_factor 8", "are for --adapter_type lokr"),
        ("--lora_blocks x", "--lora_blocks takes numbers and ranges"),
        ("--lora_layers +", "no target modules"),
        ("--rank 0", "--rank"),
        ("--rank 2561", "between 1 and 2560, .*--rank"),
    ],
)
def test_flags_that_do_not_work(flags, said):
    with pytest.raises(UsageError, match=said):
        check_args(arguments.parse_args(flags.split()))


def test_the_config_file_sets_all_of_it_and_flags_win(tmp_path):
    path = tmp_path / "lora.json"
    values = {"r": 8, "target_modules": ["self", "mlp"], "layers_to_transform": [0, 3], "adapter_type": "lokr",
              "lokr_factor": 8, "rank_pattern": {"mlp": 4}, "alpha_pattern": {"self": 1.5}}  # fmt: skip
    path.write_text(json.dumps(values))
    settings = lora_settings(arguments.parse_args(["--lora_config", str(path), "--lora_blocks", "2"]))
    assert settings == LoraSettings(
        r=8, target_modules=parse_targets("self+mlp"), layers_to_transform=(2,), adapter_type="lokr", lokr_factor=8,
        rank_pattern={"mlp": 4}, alpha_pattern={"self": 1.5},
    )  # fmt: skip
    for wrong in ({"rank_pattern": {"mlp": 2.5}}, {"alpha_pattern": {"mlp": True}}, {"layers_to_transform": ["a"]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UsageError, match="has the wrong type"):
            read_lora_config(path)
    for wrong in ({"rank_pattern": {"mlp": 0}}, {"alpha_pattern": {"mlp": -1}}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UsageError, match="pattern\\['mlp'\\] in --lora_config"):
            LoraSettings(**read_lora_config(path))
