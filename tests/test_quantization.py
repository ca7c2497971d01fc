"""A quantised base: what it becomes, that it keeps its memory small, and that adapters train on it as on any other."""

import pytest
import torch
from safetensors.torch import load_file

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.adapters.trainable import LoraSettings, add_lora
from acestep_pipeline.data.encoders import fingerprint
from acestep_pipeline.quantization import BYTES_PER_LAYER, block_linears, quantize_base
from acestep_pipeline.training import base_model, setup
from tests.training_runs import metrics, start, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
METHODS = ("nf4", "int8", "fp8")
CPU = torch.device("cpu")
# Relative errors of a random layer's output: what 4, 8 (uniform) and 8 bits (3 of them mantissa) can hold.
ERRORS = {"nf4": (0.05, 0.12), "int8": (0.002, 0.008), "fp8": (0.015, 0.04)}


class Blocks(torch.nn.Module):
    """A model with one block that has one linear layer."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(linear)])


def quantized_layer(method: str, linear: torch.nn.Linear) -> torch.nn.Linear:
    model = Blocks(linear)
    quantize_base(model, method, device=CPU)
    return model.layers[0][0]


def held_bytes(layer: torch.nn.Linear) -> int:
    """Bytes of a layer's weight with its scales, as it lies in memory."""
    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        nested = state.state2
        return sum(tensor.nbytes for tensor in (layer.weight.data, state.absmax, nested.absmax))
    parts = [getattr(layer.weight, name, None) for name in ("qdata", "scale", "zero_point")]
    return sum(part.nbytes for part in parts if part is not None)


@pytest.mark.parametrize("method", METHODS)
def test_output_and_gradient_are_those_of_the_original_up_to_the_method_s_error(method):
    torch.manual_seed(0)
    x = torch.randn(3, 50, 256, requires_grad=True)
    linear = torch.nn.Linear(256, 512).requires_grad_(False)
    layer = quantized_layer(method, _copy(linear))
    expected, found = linear(x), layer(x)
    direction = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, x, direction)
    (gradient,) = torch.autograd.grad(found, x, direction)
    low, high = ERRORS[method]
    for a, b in ((found, expected), (gradient, expected_gradient)):
        assert low < ((a - b).norm() / b.norm()).item() < high
    assert not layer.weight.requires_grad


def _copy(linear: torch.nn.Linear) -> torch.nn.Linear:
    copied = torch.nn.Linear(linear.in_features, linear.out_features).requires_grad_(False)
    copied.load_state_dict(linear.state_dict())
    return copied


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_as_many_as_estimated_and_nothing_is_saved_for_backward(method):
    out, into = 1024, 512
    layer = quantized_layer(method, torch.nn.Linear(into, out, bias=False).requires_grad_(False))
    # bitsandbytes pads a weight's few scales of scales to whole blocks.
    assert held_bytes(layer) == pytest.approx(BYTES_PER_LAYER[method](out, into), rel=1e-3)
    saved = []
    x = torch.randn(4, into, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        layer(x).sum().backward()
    assert sum(tensor.numel() for tensor in saved) < into * out / 4, "no dequantised weight is kept"
    assert x.grad is not None


def test_evaluating_between_updates_changes_nothing():
    """On CPUs with AVX512 BF16, bitsandbytes would pack weights for inference and lose the backward pass."""
    layer = quantized_layer("nf4", torch.nn.Linear(256, 256, bias=False).requires_grad_(False))
    x = torch.randn(4, 256, requires_grad=True)
    before = layer(x)
    layer.eval()
    with torch.no_grad():
        layer(x.detach())
    layer.train()
    after = layer(x)
    after.sum().backward()
    assert torch.equal(before, after) and x.grad.abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_only_the_blocks_linear_layers_are_quantised(method, tiny_pipeline):
    transformer = tiny_pipeline.transformer
    names = {f"{name}.weight" for name in block_linears(transformer)}
    assert len(names) == 4 * (4 + 4 + 3), "q, k, v, out of two attentions and the MLP of four blocks"
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    quantize_base(transformer, method, device=CPU)
    after = transformer.state_dict()
    kept = {name for name, tensor in before.items() if type(after[name]) is torch.Tensor
            and after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)}  # fmt: skip
    assert before.keys() - kept == names


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("use_dora", (False, True))
def test_an_adapter_on_it_starts_as_nothing_and_gets_gradients(method, use_dora, tiny_pipeline):
    transformer = tiny_pipeline.transformer
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 50, 16), "timestep": torch.tensor([0.5]), "timestep_r": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 20, 64), "context_latents": torch.randn(1, 50, 32),
    }  # fmt: skip
    quantize_base(transformer, method, device=CPU)
    base = transformer(**inputs).sample
    parameters = add_lora(transformer, LoraSettings(r=4, use_dora=use_dora), seed=0)
    output = transformer(**inputs).sample
    assert torch.allclose(output, base, atol=1e-5)
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in parameters)


def test_training_on_nf4_learns_and_leaves_base_and_caches_alone(demo_dir, tmp_path, monkeypatch):
    """The loss falls as on the original base; the adapter loads on that; caches and fingerprint are the same."""
    watched = []
    original = base_model.add_lora

    def watch(transformer, *args, **kwargs):
        watched.append((transformer, fingerprint(transformer)))
        return original(transformer, *args, **kwargs)

    monkeypatch.setattr(base_model, "add_lora", watch)
    settings = {"max_train_samples": 1, "learning_rate": 5e-3, "rank": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    cache = tmp_path / "cache"
    train_here(demo_dir, tmp_path / "plain", max_train_steps=1, latent_cache_dir=cache, **settings)
    cached = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert cached
    output = tmp_path / "nf4"
    train_here(demo_dir, output, base_quantization="nf4", max_train_steps=80, latent_cache_dir=cache, **settings)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == cached
    facts = [(tmp_path / name / "training_args.json").read_text() for name in ("plain", "nf4")]
    hashes = [line for text in facts for line in text.splitlines() if '"model_sha256"' in line]
    assert len(hashes) == 2 and hashes[0] == hashes[1]
    losses = [line["loss"] for line in metrics(output)]
    assert sum(losses[-20:]) / 20 < 0.8 * sum(losses[:4]) / 4

    transformer, before = watched[1]
    transformer.unload_lora()
    assert fingerprint(transformer) == before, "no quantised weight has changed"
    pipeline = ACEStepPipeline.from_pretrained("tiny")
    pipeline.load_lora_weights(output)
    loaded = {name: p for name, p in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(load_file(output / WEIGHTS)) == 64


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_quantised_base_resumes_to_the_bit(method, demo_dir, tmp_path):
    settings = {"base_quantization": method, "gradient_checkpointing": True, "gradient_checkpointing_ratio": 0.5}
    settings |= {"max_train_steps": 4, "checkpointing_steps": 2, "lora_dropout": 0.1, "max_duration_s": 2}
    output = tmp_path / "run"
    train_here(demo_dir, output, **settings)
    whole, lines = (output / WEIGHTS).read_bytes(), metrics(output)
    train_here(demo_dir, output, resume_from_checkpoint=output / "checkpoint-2", **settings)
    assert ((output / WEIGHTS).read_bytes(), metrics(output)) == (whole, lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", ("int8", "nf4"))
def test_two_processes_are_one_with_twice_the_accumulation(method, demo_dir, tmp_path):
    settings = {"max_train_steps": 3, "lora_dropout": 0, "max_duration_s": 2, "base_quantization": method}
    settings |= {"gradient_checkpointing": True, "effective_batch_size": 2}
    process = start(demo_dir, tmp_path / "two", config="ddp.yaml", **settings)
    log, _ = process.communicate(timeout=180)
    assert process.returncode == 0, log
    train_here(demo_dir, tmp_path / "one", train_batch_size=1, **settings)
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    one = load_file(tmp_path / "one" / WEIGHTS)
    for name, tensor in load_file(tmp_path / "two" / WEIGHTS).items():
        assert torch.allclose(tensor, one[name], atol=2e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_bf16_with_autocast(method, demo_dir, tmp_path, monkeypatch):
    """What a GPU does: bf16 activations and float32 adapters; forced here, where it is slow."""
    monkeypatch.setattr(setup, "bf16_is_fast", lambda device: True)
    settings = {
        "max_train_steps": 2,
        "max_train_samples": 2,
        "lora_dropout": 0,
        "max_duration_s": 2,
        "mixed_precision": "bf16",
    }
    train_here(demo_dir, tmp_path / "plain", **settings)
    train_here(demo_dir, tmp_path / "quantized", base_quantization=method, **settings)
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "quantized"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
