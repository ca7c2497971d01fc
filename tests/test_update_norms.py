"""Norms from small factors, against what the layers do to the identity: for every kind of adapter, on any base."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.quantization import quantize_base
from acestep_pipeline.training.effect_report import describe_update, draw_update_norms
from acestep_pipeline.training.update_norms import ModuleNorm, group_by, measure_update_norms, relative_norm

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lokr": {"adapter_type": "lokr"},
    "lokr of two products": {"adapter_type": "lokr", "lokr_factor": 16, "lokr_decompose_both": True, "r": 2},
    "patterns": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"cross": 32}},
    "mlp, and a layer outside the blocks": {"target_modules": ("gate_proj", "condition_embedder")},
}


def adapted(transformer, *, base="none", std=0.05, **settings):
    """The transformer with a random adapter of those settings."""
    quantize_base(transformer, base, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for parameter in add_lora(transformer, LoraSettings(**{"r": 4, "lora_alpha": 8} | settings), seed=0):
        noise = torch.randn(parameter.shape, generator=generator)
        # A DoRA's magnitudes stay near the norms of the weights, as in training.
        parameter.data.copy_(std * noise if parameter.ndim > 1 else parameter.data * (1 + std * noise))
    return transformer.eval()


@torch.no_grad()
def norms_by_forward_pass(transformer) -> dict[str, tuple[float, float]]:
    """||dW|| and ||W|| of each adapted layer, from its outputs for the identity."""
    norms = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, BaseTunerLayer):
            eye = torch.eye(layer.in_features)
            without = layer.get_base_layer()(eye)
            weight = without - layer.get_base_layer()(torch.zeros_like(eye))
            norms[name] = tuple(float(torch.linalg.norm(matrix)) for matrix in (layer(eye) - without, weight))
    return norms


def check(transformer, rel):
    measured = {norm.name: norm for norm in measure_update_norms(transformer)}
    expected = norms_by_forward_pass(transformer)
    assert list(measured) == list(expected) and len(measured) >= 5
    for name, (update, weight) in expected.items():
        assert update > 0
        assert measured[name].update_squared ** 0.5 == pytest.approx(update, rel=rel), name
        assert measured[name].weight_squared ** 0.5 == pytest.approx(weight, rel=rel), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_norms_are_those_of_what_is_added(tiny_pipeline, kind):
    check(adapted(tiny_pipeline.transformer, **KINDS[kind]), rel=1e-4)


@pytest.mark.parametrize("base, kind", [("nf4", "dora"), ("int8", "lora"), ("fp8", "dora")])
def test_a_quantised_base_is_measured_as_it_computes(tiny_pipeline, base, kind):
    check(adapted(tiny_pipeline.transformer, base=base, **KINDS[kind]), rel=2e-3)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_an_untrained_adapter_moves_nothing(tiny_pipeline, kind):
    add_lora(tiny_pipeline.transformer, LoraSettings(r=4, **KINDS[kind]), seed=0)
    assert relative_norm(measure_update_norms(tiny_pipeline.transformer)) < 1e-6


def test_groups_are_taken_together_and_the_largest_named(tmp_path):
    norms = [
        ModuleNorm("layers.0.self_attn.to_out.0", update_squared=9.0, weight_squared=100.0),
        ModuleNorm("layers.1.self_attn.to_out.0", update_squared=7.0, weight_squared=300.0),
        ModuleNorm("layers.1.cross_attn.to_q", update_squared=0.0, weight_squared=100.0),
        ModuleNorm("condition_embedder", update_squared=1.0, weight_squared=100.0),
    ]
    assert relative_norm(norms) == pytest.approx((17 / 600) ** 0.5)
    assert group_by(norms, "kind") == pytest.approx(
        {"self_attn.to_out": 0.2, "cross_attn.to_q": 0.0, "condition_embedder": 0.1}
    )
    assert group_by(norms, "block") == pytest.approx({0: 0.3, 1: (7 / 400) ** 0.5, None: 0.1})
    assert describe_update(norms) == (
        "16.8 % of the adapted weights' norm; most in self_attn.to_out (20 %) and in block 0 (30 %)"
    )
    draw_update_norms(norms, tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    assert relative_norm([]) == 0
