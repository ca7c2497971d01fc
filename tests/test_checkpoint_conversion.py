"""The original checkpoint layout: what is read from it, and every way in which a folder can be wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AceStepTransformer1DModel
from diffusers.pipelines.ace_step import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer, AceStepConditionEncoder
from safetensors.torch import load_file, save_file

from acestep_pipeline.checkpoint_conversion import load_dit_components, locate_original
from acestep_pipeline.errors import UsageError
from tests.original_layout import write_original_dit

GOLDEN = Path(__file__).parent / "golden" / "base"
# As in the file `tests/golden/README.md` describes.
SILENCE_FRAMES = 15_000

# ---------------------------------------------------------------------------------------------------------------------
# What is read (that it computes what the official code does: tests/test_official_model.py)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def components() -> dict[str, torch.nn.Module]:
    return load_dit_components(GOLDEN)


def test_components_are_frozen_and_carry_the_timestep_distribution(components):
    assert list(components) == ["transformer", "condition_encoder", "audio_tokenizer", "audio_token_detokenizer"]
    for module in components.values():
        assert not module.training
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())
    config = components["transformer"].config
    assert (config.timestep_mu, config.timestep_sigma) == (-0.4, 1.0)
    assert (config.is_turbo, config.model_version) == (False, "base")
    assert components["condition_encoder"].silence_latent.shape == (1, SILENCE_FRAMES, 64)


def test_audio_tokenizer_round_trip_runs(components, golden):
    with torch.no_grad():
        quantized, indices = components["audio_tokenizer"].tokenize(golden["x0"])
        latents = components["audio_token_detokenizer"](quantized)
    assert indices.shape[:2] == (2, 15)
    assert latents.shape == golden["x0"].shape
    assert latents.isfinite().all()


def test_bfloat16_is_the_rounded_float32(components):
    rounded = load_dit_components(GOLDEN, torch.bfloat16)
    for name, module in components.items():
        expected = module.state_dict()
        for key, tensor in rounded[name].state_dict().items():
            assert torch.equal(tensor, expected[key].to(torch.bfloat16)), f"{name}.{key}"


# ---------------------------------------------------------------------------------------------------------------------
# Shards, and damaged files


@pytest.fixture
def dit(tmp_path) -> Path:
    """A copy of the golden DiT, to damage."""
    directory = tmp_path / "dit"
    directory.mkdir()
    for name in ("config.json", "model.safetensors", "silence_latent.pt"):
        shutil.copy(GOLDEN / name, directory / name)
    return directory


@pytest.fixture
def sharded_dit(dit) -> Path:
    weights = load_file(dit / "model.safetensors")
    (dit / "model.safetensors").unlink()
    weight_map = {}
    for i, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        shard = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, dit / shard)
        weight_map |= dict.fromkeys(names, shard)
    (dit / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return dit


def test_shards_equal_the_single_file(sharded_dit, components):
    sharded = load_dit_components(sharded_dit)
    for name, module in components.items():
        state_dict = sharded[name].state_dict()
        assert state_dict.keys() == module.state_dict().keys()
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, state_dict[key]), f"{name}.{key}"


def load_error(dit: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_dit_components(dit)
    message = str(caught.value)
    assert str(dit) in message
    assert "\n" not in message
    return message


def test_missing_shard_is_named(sharded_dit):
    (sharded_dit / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in load_error(sharded_dit)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_damaged_json_is_named(sharded_dit, name):
    (sharded_dit / name).write_text("{")
    assert name in load_error(sharded_dit)


@pytest.mark.parametrize("kept_bytes", [0, 4, 1000, 1_000_000])
def test_truncated_weights_are_named(dit, kept_bytes):
    path = dit / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert "model.safetensors" in load_error(dit)


@pytest.mark.parametrize("content", [b"", b"not a pickle", None])
def test_damaged_silence_latent_is_named(dit, content):
    path = dit / "silence_latent.pt"
    path.write_bytes(path.read_bytes()[:1_000_000] if content is None else content)
    assert "silence_latent.pt" in load_error(dit)


def change_weights(dit: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(dit / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, dit / "model.safetensors")


def test_unknown_parameter_is_named(dit):
    change_weights(dit, lm_head__weight=torch.zeros(3))
    assert "'lm_head.weight'" in load_error(dit)


def test_unknown_parameter_of_a_known_component_is_named(dit):
    change_weights(dit, decoder__extra__weight=torch.zeros(3))
    assert "extra.weight" in load_error(dit)


def test_missing_parameter_is_named(dit):
    change_weights(dit, decoder__proj_in__1__weight=None)
    assert "proj_in_conv.weight" in load_error(dit)


def test_wrong_shape_is_named(dit):
    change_weights(dit, decoder__norm_out__weight=torch.zeros(65))
    message = load_error(dit)
    assert "norm_out.weight" in message
    assert "65" in message


def test_checkpoint_without_a_transformer_is_refused(dit):
    weights = load_file(dit / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("decoder.")}, dit / "model.safetensors")
    assert "transformer" in load_error(dit)


def test_checkpoint_without_an_audio_tokenizer_loads(dit, components):
    weights = load_file(dit / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "tokenizer." not in k}, dit / "model.safetensors")
    assert list(load_dit_components(dit)) == ["transformer", "condition_encoder"]


def test_config_without_a_needed_value_is_named(dit):
    config = json.loads((dit / "config.json").read_text())
    del config["head_dim"]
    (dit / "config.json").write_text(json.dumps(config))
    message = load_error(dit)
    assert "config.json" in message
    assert "head_dim" in message


# ---------------------------------------------------------------------------------------------------------------------
# XL


def xl_modules() -> dict[str, torch.nn.Module]:
    """Random modules like XL's: the condition encoder (32) and the audio tokenizer are narrower than the DiT (64)."""
    shared = {"head_dim": 16, "sliding_window": 16}
    dit = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    encoder = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokenizer = {"audio_acoustic_hidden_dim": 16, "num_attention_pooler_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        modules = {
            "transformer": AceStepTransformer1DModel(
                **shared,
                **dit,
                num_hidden_layers=2,
                in_channels=48,
                audio_acoustic_hidden_dim=16,
                encoder_hidden_size=32,
                is_turbo=True,
                model_version="turbo",
            ),
            "condition_encoder": AceStepConditionEncoder(
                **shared,
                **encoder,
                text_hidden_dim=48,
                timbre_hidden_dim=16,
                num_lyric_encoder_hidden_layers=2,
                num_timbre_encoder_hidden_layers=2,
            ),
            "audio_tokenizer": AceStepAudioTokenizer(**shared, **encoder, **tokenizer, fsq_dim=32),
            "audio_token_detokenizer": AceStepAudioTokenDetokenizer(**shared, **encoder, **tokenizer),
        }
        modules["condition_encoder"].silence_latent.normal_()
    return modules


def test_xl_converts_bit_exactly(tmp_path):
    modules = xl_modules()
    write_original_dit(modules, tmp_path / "xl")
    loaded = load_dit_components(tmp_path / "xl")
    assert loaded.keys() == modules.keys()
    for component, module in modules.items():
        expected, actual = module.state_dict(), loaded[component].state_dict()
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), f"{component}.{name}"
        for name, value in module.config.items():
            if not name.startswith("_") and name != "layer_types":
                assert loaded[component].config[name] == value, f"{component}: {name}"
    assert loaded["transformer"].layer_types == modules["transformer"].layer_types
    assert loaded["transformer"].config.encoder_hidden_size == 32


def test_xl_with_an_audio_tokenizer_as_wide_as_the_dit(tmp_path):
    modules = xl_modules()
    wide = {**modules["audio_tokenizer"].config, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    wide |= {"intermediate_size": 96, "fsq_dim": 64}
    modules["audio_tokenizer"] = AceStepAudioTokenizer.from_config(wide)
    wide.pop("fsq_dim")
    modules["audio_token_detokenizer"] = AceStepAudioTokenDetokenizer.from_config(wide)
    write_original_dit(modules, tmp_path / "xl")
    loaded = load_dit_components(tmp_path / "xl")
    for component in ("audio_tokenizer", "audio_token_detokenizer"):
        for name, tensor in modules[component].state_dict().items():
            assert torch.equal(loaded[component].state_dict()[name], tensor), f"{component}.{name}"


# ---------------------------------------------------------------------------------------------------------------------
# Finding the parts


def make_component(folder: Path, *names: str) -> Path:
    """A folder with the given empty files: finding the parts of a checkpoint looks at names only."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """One DiT, a 5 Hz language model, the VAE and the text encoder."""
    folder = tmp_path / "checkpoint"
    make_component(folder / "acestep-v15-base", "config.json", "model.safetensors", "silence_latent.pt")
    make_component(folder / "acestep-5Hz-lm-1.7B", "config.json", "model.safetensors")
    make_component(folder / "vae", "config.json", "model.safetensors")
    make_component(folder / "Qwen3-Embedding-0.6B", "config.json", "model.safetensors")
    return folder


@pytest.fixture
def two_variants(checkpoint) -> Path:
    """A second, sharded DiT beside the first."""
    names = ("config.json", "model.safetensors.index.json", "silence_latent.pt")
    make_component(checkpoint / "acestep-v15-sft", *names)
    return checkpoint


def locate_error(folder: Path, variant_dir: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        locate_original(folder, variant_dir)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_the_only_dit_is_found(checkpoint):
    found = locate_original(checkpoint, None)
    assert found.dit == checkpoint / "acestep-v15-base"
    assert found.vae == checkpoint / "vae"
    assert found.text_encoder == checkpoint / "Qwen3-Embedding-0.6B"


def test_variant_dir_chooses_among_several(two_variants):
    message = locate_error(two_variants)
    assert "acestep-v15-base, acestep-v15-sft" in message
    assert "--variant_dir" in message
    assert locate_original(two_variants, "acestep-v15-sft").dit == two_variants / "acestep-v15-sft"


@pytest.mark.parametrize("wrong", ["acestep-v15-turbo", "vae/none", "acestep-5Hz-lm-1.7B/x"])
def test_wrong_variant_dir_lists_what_exists(two_variants, wrong):
    message = locate_error(two_variants, wrong)
    assert repr(wrong) in message
    assert "acestep-v15-base, acestep-v15-sft" in message


def test_language_model_is_no_variant(checkpoint):
    assert "silence_latent.pt" in locate_error(checkpoint, "acestep-5Hz-lm-1.7B")


def test_parts_inside_or_beside_the_dits_own_folder(checkpoint, tmp_path):
    beside = locate_original(checkpoint / "acestep-v15-base", None)
    assert (beside.dit, beside.vae) == (checkpoint / "acestep-v15-base", checkpoint / "vae")
    own = tmp_path / "own"
    shutil.copytree(checkpoint / "acestep-v15-base", own)
    shutil.copytree(checkpoint / "vae", own / "vae")
    shutil.copytree(checkpoint / "Qwen3-Embedding-0.6B", own / "Qwen3-Embedding-0.6B")
    inside = locate_original(own, None)
    assert (inside.dit, inside.vae, inside.text_encoder) == (own, own / "vae", own / "Qwen3-Embedding-0.6B")


@pytest.mark.parametrize("name", ["vae", "Qwen3-Embedding-0.6B"])
def test_missing_part_is_named(checkpoint, name):
    shutil.rmtree(checkpoint / name)
    assert repr(name) in locate_error(checkpoint)


def test_missing_silence_latent_is_named(checkpoint):
    (checkpoint / "acestep-v15-base" / "silence_latent.pt").unlink()
    assert "silence_latent.pt" in locate_error(checkpoint, "acestep-v15-base")
    assert "silence_latent.pt" in locate_error(checkpoint / "acestep-v15-base")
    assert "silence_latent.pt" in locate_error(checkpoint)


def test_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").touch()
    message = locate_error(tmp_path)
    assert "model_index.json" in message
    assert "silence_latent.pt" in message
