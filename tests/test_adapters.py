"""LoRA adapters: their settings, what training adds to the transformer, the file in plain diffusers and in ours."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from acestep_pipeline.adapters.settings import (
    DEFAULT_TARGET_MODULES,
    LoraSettings,
    describe,
    parse_targets,
    read_lora_config,
)
from acestep_pipeline.adapters.trainable import (
    LORA_WEIGHTS_NAME,
    add_lora,
    lora_state_dict,
    resolve_target_modules,
    save_lora,
)
from acestep_pipeline.errors import UsageError

# Plain diffusers' Oobleck, loaded here for comparison, uses it.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

SETTINGS = LoraSettings(r=4, lora_alpha=12.0)


@pytest.fixture
def transformer(tiny_dir) -> AceStepTransformer1DModel:
    return AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer")


@torch.no_grad()
def velocity(model: AceStepPipeline | AceStepTransformer1DModel) -> torch.Tensor:
    """What the transformer predicts for one fixed input."""
    transformer = getattr(model, "transformer", model)
    generator = torch.Generator().manual_seed(0)
    return transformer(
        hidden_states=torch.randn(1, 50, 16, generator=generator),
        timestep=torch.tensor([0.6]),
        timestep_r=torch.tensor([0.6]),
        encoder_hidden_states=torch.randn(1, 20, 64, generator=generator),
        context_latents=torch.randn(1, 50, 32, generator=generator),
        return_dict=False,
    )[0]


def lora_layers(transformer: torch.nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def trained(transformer: torch.nn.Module, settings: LoraSettings, seed: int = 0) -> torch.nn.Module:
    """`transformer` with an adapter as if trained: what starts at zero is random, and DoRA's magnitudes moved."""
    parameters = add_lora(transformer, settings, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name or "lokr_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        elif "lora_magnitude_vector" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
    assert parameters
    return transformer


def save_trained(tiny_dir: Path, directory: Path, settings: LoraSettings, seed: int = 0) -> Path:
    transformer = AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer")
    save_lora(trained(transformer, settings, seed), directory)
    return directory


@pytest.fixture(scope="module")
def adapters(tiny_dir, tmp_path_factory) -> dict[str, Path]:
    """Two saved adapters of different rank and alpha. Read-only."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "one": save_trained(tiny_dir, root / "one", SETTINGS, seed=1),
        "two": save_trained(tiny_dir, root / "two", LoraSettings(r=2, lora_alpha=3.0), seed=2),
    }


@pytest.fixture(scope="module")
def base_velocity(tiny_dir) -> torch.Tensor:
    return velocity(AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer"))


# ---------------------------------------------------------------------------------------------------------------------
# Targets and settings


@pytest.mark.parametrize(
    ("spelt", "resolved"),
    [
        ("to_q,to_k,to_v,to_out.0", list(DEFAULT_TARGET_MODULES)),
        ("q_proj,k_proj,v_proj,o_proj", list(DEFAULT_TARGET_MODULES)),
        ("linear_q, linear_k ,linear_v,to_out", list(DEFAULT_TARGET_MODULES)),
        ("linear_q,linear_k,linear_v,to_q,to_k,to_v,to_out.0", list(DEFAULT_TARGET_MODULES)),
        (["self_attn.q_proj", "cross_attn.to_out"], ["self_attn.to_q", "cross_attn.to_out.0"]),
        ("layers.2.self_attn.o_proj", ["layers.2.self_attn.to_out.0"]),
        ("gate_proj,mlp.up_proj,down_proj", ["gate_proj", "mlp.up_proj", "down_proj"]),
    ],
)
def test_targets_resolve_to_linear_layers(transformer, spelt, resolved):
    assert resolve_target_modules(transformer, parse_targets(spelt)) == resolved
    add_lora(transformer, LoraSettings(r=1, target_modules=parse_targets(spelt)), seed=0)
    adapted = list(lora_layers(transformer))
    for target in resolved:
        assert any(name.endswith(target) for name in adapted), target
    assert all(any(name.endswith(target) for target in resolved) for name in adapted)


@pytest.mark.parametrize("wrong", ["to_w", "attn.to_q", "norm_q", "o_pro", "layers", "proj_in_conv"])
def test_unknown_target_lists_what_exists(transformer, wrong):
    with pytest.raises(UsageError) as caught:
        resolve_target_modules(transformer, ("to_q", wrong))
    message = str(caught.value)
    assert f"the LoRA target {wrong!r} (--lora_layers" in message
    assert "have: down_proj, gate_proj, to_k, to_out.0, to_q, to_v, up_proj (" in message
    assert "q_proj" in message
    assert "linear_q" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -4),
        ("lora_alpha", 0.0),
        ("lora_alpha", -1.0),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_dropout", math.nan),
        ("lora_dropout", -0.1),
        ("lora_dropout", 1.0),
    ],
)
def test_settings_out_of_bounds(field, value):
    with pytest.raises(UsageError, match=str(value)):
        LoraSettings(**{field: value})


def test_settings_at_their_bounds():
    settings = LoraSettings(r=1, lora_alpha=1e-3, lora_dropout=0.0, target_modules=("to_q",))
    assert json.loads(json.dumps(describe(settings)))["target_modules"] == ["to_q"]
    LoraSettings(lora_dropout=0.99)
    with pytest.raises(UsageError, match="no target modules"):
        LoraSettings(target_modules=())


def test_lora_config_file(tmp_path):
    path = tmp_path / "lora.json"
    values = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "use_dora": True}
    path.write_text(json.dumps(values))
    assert read_lora_config(path) == {**values, "target_modules": ("q_proj", "v_proj")}
    assert LoraSettings(**read_lora_config(path)).use_dora
    path.write_text('{"target_modules": "to_q, to_k"}')
    assert read_lora_config(path) == {"target_modules": ("to_q", "to_k")}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"rank": 8}', "unknown field 'rank'; known are r, lora_alpha"),
        ('{"r": "8"}', "r has the wrong type ('8')"),
        ('{"r": 8.5}', "r has the wrong type (8.5)"),
        ('{"r": true}', "r has the wrong type (True)"),
        ('{"use_dora": 1}', "use_dora has the wrong type (1)"),
        ('{"target_modules": {}}', "target_modules has the wrong type ({})"),
        ('{"target_modules": ["to_q", 3]}', "target_modules has the wrong type"),
        ("[1]", "must hold a JSON object"),
        ("r: 8", "is not JSON"),
        ("", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (None, "can't be read: No such file or directory"),
    ],
)
def test_wrong_lora_config_file(tmp_path, content, said):
    path = tmp_path / "lora.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        read_lora_config(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The adapter that training starts from


@pytest.mark.parametrize(
    "targets", [DEFAULT_TARGET_MODULES, ("self_attn.to_q", "down_proj"), ("condition_embedder", "to_v")]
)
def test_adapter_has_rank_times_in_plus_out_parameters_a_layer(transformer, targets):
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = [module for name, module in linears.items() if name.endswith(tuple(targets))]
    parameters = add_lora(transformer, LoraSettings(r=4, target_modules=targets), seed=0)
    assert sum(parameter.numel() for parameter in parameters) == sum(
        4 * (module.in_features + module.out_features) for module in adapted
    )
    assert adapted


@pytest.mark.parametrize(("rank", "expected"), [(64, 44_040_192), (16, 11_010_048)])
def test_adapter_of_the_2b_model_has_the_published_size(rank, expected):
    with torch.device("meta"):
        transformer = AceStepTransformer1DModel()
        parameters = add_lora(transformer, LoraSettings(r=rank), seed=0)
    assert len(lora_layers(transformer)) == 4 * 48
    assert sum(parameter.numel() for parameter in parameters) == expected


def test_adapter_is_float32_on_a_bfloat16_base_that_stays_frozen(transformer):
    transformer.to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    parameters = add_lora(transformer, SETTINGS, seed=0)
    trainable = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(parameters)
    assert all("lora_" in name for name in trainable)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    for name, tensor in transformer.state_dict().items():
        if "lora_" not in name:
            original = before[name.replace(".base_layer", "")]
            assert tensor.dtype == original.dtype == torch.bfloat16
            assert torch.equal(tensor, original)


def test_adapter_depends_on_its_seed_alone(tiny_dir):
    weights = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        transformer = AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer")
        torch.manual_seed(global_seed)
        weights.append([parameter.detach() for parameter in add_lora(transformer, SETTINGS, seed=seed)])
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(global_seed).get_state())
    same, other = weights[1], weights[2]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


def test_untrained_adapter_changes_nothing(transformer, base_velocity):
    add_lora(transformer, SETTINGS, seed=0)
    assert torch.equal(velocity(transformer), base_velocity)


# ---------------------------------------------------------------------------------------------------------------------
# The saved file in plain diffusers


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        (SETTINGS, 3.0),
        (LoraSettings(r=8, lora_alpha=4.0, target_modules=("v_proj", "o_proj")), 0.5),
        (LoraSettings(r=4, lora_alpha=12.0, use_rslora=True), 6.0),
        (LoraSettings(r=4, lora_alpha=12.0, use_dora=True), 3.0),
    ],
    ids=["lora", "v-and-o-only", "rslora", "dora"],
)
def test_plain_diffusers_loads_what_was_trained(tiny_dir, transformer, tmp_path, base_velocity, settings, scaling):
    save_lora(trained(transformer, settings), tmp_path)

    pipeline = AceStepPipeline.from_pretrained(tiny_dir)
    pipeline.load_lora_weights(tmp_path)
    expected_layers, layers = lora_layers(transformer), lora_layers(pipeline.transformer)
    assert layers.keys() == expected_layers.keys()
    for name, layer in layers.items():
        (adapter,) = layer.scaling
        assert layer.scaling[adapter] == scaling, name
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        assert torch.equal(a, expected_layers[name].lora_A["default"].weight)
        # PEFT's own arithmetic may round otherwise.
        torch.testing.assert_close(layer.get_delta_weight(adapter), b @ a * scaling, rtol=1e-5, atol=1e-6)
        assert layer.use_dora[adapter] == settings.use_dora
    predicted = velocity(pipeline)
    assert torch.equal(predicted, velocity(transformer))
    assert (predicted - base_velocity).abs().max() > 0.05


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_saved_file_follows_the_umask(transformer, tmp_path, umask):
    add_lora(transformer, SETTINGS, seed=0)
    previous = os.umask(umask)
    try:
        save_lora(transformer, tmp_path / "adapter")
    finally:
        os.umask(previous)
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == [LORA_WEIGHTS_NAME]
    assert (tmp_path / "adapter" / LORA_WEIGHTS_NAME).stat().st_mode & 0o777 == 0o666 & ~umask


# ---------------------------------------------------------------------------------------------------------------------
# Adapters in our pipeline


def test_directory_file_and_state_dict_load_alike(tiny_dir, tiny_pipeline, adapters, base_velocity, monkeypatch):
    plain = AceStepPipeline.from_pretrained(tiny_dir)
    monkeypatch.setenv("HOME", str(adapters["one"].parent))
    state_dict = load_file(adapters["one"] / LORA_WEIGHTS_NAME)
    plain.load_lora_weights(adapters["one"])
    expected = velocity(plain)
    assert not torch.equal(expected, base_velocity)
    for source in (adapters["one"], str(adapters["one"]), adapters["one"] / LORA_WEIGHTS_NAME, "~/one"):
        tiny_pipeline.load_lora_weights(source)
        assert torch.equal(velocity(tiny_pipeline), expected), source
        tiny_pipeline.unload_lora_weights()
    # A state dict has no metadata: its alpha is its rank, for diffusers as for us.
    plain.unload_lora_weights()
    for pipeline in (plain, tiny_pipeline):
        pipeline.load_lora_weights(state_dict, adapter_name="one")
        assert {layer.scaling["one"] for layer in lora_layers(pipeline.transformer).values()} == {1.0}
    assert torch.equal(velocity(plain), velocity(tiny_pipeline))
    assert state_dict.keys() == load_file(adapters["one"] / LORA_WEIGHTS_NAME).keys(), "the caller's dict was changed"


def test_original_names_load_too(tiny_pipeline, adapters, tmp_path):
    """PEFT's own names over the original modules' names, as the official trainer writes them; alpha is the rank."""
    renames = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "o_proj"}
    weights = {}
    for name, tensor in load_file(adapters["one"] / LORA_WEIGHTS_NAME).items():
        for renamed, original in renames.items():
            name = name.replace(f".{renamed}.", f".{original}.")
        weights[name.replace("transformer.", "base_model.model.")] = tensor
    save_file(weights, tmp_path / LORA_WEIGHTS_NAME)
    tiny_pipeline.load_lora_weights(tmp_path, adapter_name="peft")
    layers = lora_layers(tiny_pipeline.transformer)
    assert len(layers) == 4 * 4 * 2
    assert all(layer.lora_B["peft"].weight.abs().sum() > 0 for layer in layers.values())


def test_two_adapters_add_up_with_their_weights(tiny_pipeline, adapters):
    tiny_pipeline.load_lora_weights(adapters["one"], adapter_name="one")
    alone = velocity(tiny_pipeline)
    tiny_pipeline.load_lora_weights(adapters["two"], adapter_name="two")
    tiny_pipeline.set_adapters(["one", "two"], [0.5, 2.0])
    both = velocity(tiny_pipeline)
    name = "layers.1.cross_attn.to_k"
    layer = tiny_pipeline.transformer.get_submodule(name)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight = layer.base_layer.weight.clone()
    for adapter, scale in (("one", 0.5 * 12 / 4), ("two", 2.0 * 3 / 2)):
        weight += scale * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight), rtol=1e-4, atol=1e-4)
    tiny_pipeline.set_adapters(["one", "two"], [1.0, 0.0])
    assert torch.equal(velocity(tiny_pipeline), alone)
    tiny_pipeline.set_adapters(["one"])
    assert torch.equal(velocity(tiny_pipeline), alone)
    assert not torch.equal(both, alone)


def test_disabled_and_unloaded_is_the_base(tiny_pipeline, adapters, base_velocity):
    module_types = {name: type(module) for name, module in tiny_pipeline.transformer.named_modules()}
    tiny_pipeline.load_lora_weights(adapters["one"])
    adapted = velocity(tiny_pipeline)
    assert not torch.equal(adapted, base_velocity)
    tiny_pipeline.disable_lora()
    assert torch.equal(velocity(tiny_pipeline), base_velocity)
    tiny_pipeline.enable_lora()
    assert torch.equal(velocity(tiny_pipeline), adapted)
    tiny_pipeline.unload_lora_weights()
    assert torch.equal(velocity(tiny_pipeline), base_velocity)
    assert {name: type(module) for name, module in tiny_pipeline.transformer.named_modules()} == module_types
    tiny_pipeline.load_lora_weights(adapters["one"])
    assert torch.equal(velocity(tiny_pipeline), adapted)


def wider(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter of a checkpoint twice as wide."""
    return {name: t.repeat(1, 2) if "lora_A" in name else t.repeat(2, 1) for name, t in state_dict.items()}


def deeper(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter of a checkpoint with more blocks."""
    return state_dict | {name.replace("layers.3.", "layers.4."): tensor.clone() for name, tensor in state_dict.items()}


def of_another_model(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("transformer.", "unet."): tensor for name, tensor in state_dict.items()}


WRONG_STATE_DICTS = {
    "wider": (
        wider,
        "layers.0.cross_attn.to_k has 64 outputs and 128 inputs, this checkpoint's 32 outputs and 64 inputs",
    ),
    "deeper": (deeper, "layers.4.cross_attn.to_k, a layer that this checkpoint doesn't have"),
    "of another model": (of_another_model, "no weights for this transformer"),
    "full weights": (
        lambda state_dict: {"transformer.layers.0.mlp.up_proj.weight": torch.zeros(160, 64)},
        "no weights for this",
    ),
    "empty": (lambda state_dict: {}, "no weights for this transformer"),
}


@pytest.mark.parametrize("loaded_before", [False, True], ids=["on the base", "beside an adapter"])
def test_wrong_adapters_are_refused_and_leave_the_pipeline_as_it_was(
    tiny_pipeline, adapters, base_velocity, tmp_path, loaded_before, capfd
):
    pipeline, good = tiny_pipeline, adapters["one"] / LORA_WEIGHTS_NAME
    if loaded_before:
        pipeline.load_lora_weights(good, adapter_name="one")
    before = velocity(pipeline)
    module_names = [name for name, _ in pipeline.transformer.named_modules()]
    state_dict = load_file(good)

    truncated = tmp_path / "truncated" / LORA_WEIGHTS_NAME
    truncated.parent.mkdir()
    truncated.write_bytes(good.read_bytes()[:5000])
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(good, tmp_path / "adapter_model.bin")
    wrong = {
        folder: f"holds no {LORA_WEIGHTS_NAME}",
        tmp_path / "missing": "does not exist",
        tmp_path / "missing.safetensors": "does not exist",
        tmp_path / "adapter_model.bin": "pickle",
        truncated.parent: "truncated",
        "nobody/nothing": "nobody/nothing",
    }
    cases = [(source, (str(source), said)) for source, said in wrong.items()]
    for label, (change, said) in WRONG_STATE_DICTS.items():
        directory = tmp_path / label
        directory.mkdir()
        save_file(change(state_dict), directory / LORA_WEIGHTS_NAME)
        cases += [(directory, (str(directory), said)), (change(state_dict), ("given as a state dict", said))]
    if loaded_before:
        cases.append((adapters["two"], ("one is in use already",)))

    capfd.readouterr()
    for source, parts in cases:
        with pytest.raises(UsageError) as caught:
            pipeline.load_lora_weights(source, adapter_name="one" if source == adapters["two"] else "new")
        assert all(part in str(caught.value) for part in parts), str(caught.value)
        assert "\n" not in str(caught.value)
        assert [name for name, _ in pipeline.transformer.named_modules()] == module_names, parts
        assert pipeline.get_active_adapters() == (["one"] if loaded_before else [])
    assert capfd.readouterr().err == "", "the error says it all"
    assert torch.equal(velocity(pipeline), before)
    assert torch.equal(before, base_velocity) != loaded_before

    pipeline.load_lora_weights(adapters["two"], adapter_name="new")
    assert pipeline.get_active_adapters() == ["new"]


def test_scaling_of_a_large_rank():
    """`lora_alpha / r`, and over the root of `r` for rsLoRA, as `LoraSettings` says."""
    for rslora, root in ((False, 16), (True, math.sqrt(16))):
        with torch.device("meta"):
            transformer = AceStepTransformer1DModel(num_hidden_layers=1)
            add_lora(transformer, LoraSettings(r=16, lora_alpha=40.0, use_rslora=rslora), seed=0)
        assert {layer.scaling["default"] for layer in lora_layers(transformer).values()} == {40.0 / root}


def test_dropout_of_training_is_not_heard(tiny_dir, tiny_pipeline, tmp_path):
    """Plain diffusers leaves what it loads in training mode: our files name no dropout, and ours hears none at all."""
    transformer = AceStepTransformer1DModel.from_pretrained(tiny_dir, subfolder="transformer")
    trained(transformer, LoraSettings(r=4, lora_alpha=12.0, lora_dropout=0.5))
    expected = velocity(transformer.eval())
    save_lora(transformer, tmp_path / "ours")
    layers = {f"transformer.{name}": tensor for name, tensor in lora_state_dict(transformer).items()}
    config = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 12.0, "transformer.lora_dropout": 0.5,
                         "transformer.target_modules": list(DEFAULT_TARGET_MODULES)})  # fmt: skip
    (tmp_path / "foreign").mkdir()
    save_file(layers, tmp_path / "foreign" / LORA_WEIGHTS_NAME, metadata={"lora_adapter_metadata": config})

    plain = AceStepPipeline.from_pretrained(tiny_dir)
    plain.load_lora_weights(tmp_path / "ours")
    assert torch.equal(velocity(plain), expected)
    for name in ("ours", "foreign"):
        tiny_pipeline.load_lora_weights(tmp_path / name)
        assert torch.equal(velocity(tiny_pipeline), expected), name
        tiny_pipeline.unload_lora_weights()
