"""Every optimizer by name, through the script: it trains, says what it needs, and resumes to the bit."""

import importlib.util
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from acestep_pipeline.errors import UsageError
from acestep_pipeline.training import arguments, optimization
from acestep_pipeline.training.optimizers import OPTIMIZERS, check_optimizer
from acestep_pipeline.training.plain_state import join_state, split_state
from tests.training_runs import metrics, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
# Rank 64 makes the matrices of the tiny checkpoint just large enough for bitsandbytes to keep their state in 8 bits.
RUN = {"rank": 64, "lora_alpha": 64, "max_duration_s": 2, "lr_warmup_steps": 2, "lora_dropout": 0.1}


def adam(name: str, parameters: list, *, learning_rate: float = 1e-2, **changes) -> torch.optim.Optimizer:
    settings = {"adam_beta1": 0.9, "adam_beta2": 0.99, "adam_weight_decay": 0.1, "adam_epsilon": 1e-8} | changes
    return optimization.build_optimizer(parameters, optimizer=name, learning_rate=learning_rate, **settings)


# The other files' runs are of AdamW.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("adamw", "paged_adamw_8bit") else [])
        for name in OPTIMIZERS
    ],
)
def test_a_run_that_was_stopped_resumes_to_the_bit(demo_dir, tmp_path, name):
    """The uninterrupted run writes one checkpoint, the other three: that does not show either."""
    settings = RUN | {"optimizer": name, "learning_rate": None if name == "prodigy" else 1e-3}
    if name == "prodigy":
        settings |= {"preset": None, "mixed_precision": "no"}  # whose learning rate would be that of AdamW
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_here(demo_dir, whole, max_train_steps=7, **settings)
    train_here(demo_dir, stopped, max_train_steps=4, checkpointing_steps=3, **settings)
    train_here(
        demo_dir, stopped, max_train_steps=7, checkpointing_steps=3, resume_from_checkpoint="latest", **settings
    )
    assert (stopped / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert metrics(stopped) == metrics(whole)
    assert (whole / WEIGHTS).read_bytes() == (whole / "checkpoint-7" / WEIGHTS).read_bytes()
    weights = load_file(whole / WEIGHTS)
    assert all(tensor.abs().sum() > 0 for tensor in weights.values()), "every matrix has moved from zero"
    kept = load_file(whole / "checkpoint-7" / "optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in kept.values()) == ("8bit" in name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_json_and_tensors(name, tmp_path):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(64))]
    clones = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    optimizer, restored = adam(name, parameters), adam(name, clones)

    def steps(optimizer, parameters, seeds):
        for seed in seeds:
            for index, parameter in enumerate(parameters):
                generator = torch.Generator().manual_seed(100 * seed + index)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    steps(optimizer, parameters, range(3))
    with optimization.averaged_weights(optimizer):
        tensors, values = split_state(optimizer.state_dict())
        saved = [parameter.detach().clone() for parameter in parameters]
    with optimization.averaged_weights(restored):
        for clone, value in zip(clones, saved, strict=True):
            clone.data.copy_(value)
        restored.load_state_dict(join_state(tensors, json.loads(json.dumps(values))))
    for own, clone in zip(parameters, clones, strict=True):
        assert torch.equal(own, clone)
    steps(optimizer, parameters, range(3, 6))
    steps(restored, clones, range(3, 6))
    for own, clone in zip(parameters, clones, strict=True):
        assert torch.equal(own, clone)


def test_adamw_in_one_kernel_or_one_call_steps_as_a_loop_over_parameters_does():
    weights = {}
    for way in ("loop", "foreach", "fused"):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((8, 4), (4, 8), (4,))]
        optimizer = adam("adamw", parameters, fused=way == "fused")
        if way != "fused":
            for group in optimizer.param_groups:
                group["foreach"] = way == "foreach"
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
        weights[way] = parameters
    for way in ("foreach", "fused"):
        for one, other in zip(weights[way], weights["loop"], strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), way


def test_vectors_are_not_decayed():
    """A gradient of zero leaves weight decay alone: matrices shrink, DoRA's magnitudes stay what they were."""
    matrix, vector = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))
    optimizer = adam("adamw", [vector, matrix], learning_rate=0.5)
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(vector, torch.ones(4))
    assert torch.allclose(matrix, torch.full((4, 4), 1 - 0.5 * 0.1))


def test_schedule_free_weights_are_the_average_and_evaluation_leaves_no_trace():
    """Its formulas by hand: z is plain (normalised) gradient descent, x the running mean of z, y between them."""
    start, rate, beta1, beta2 = 1.0, 0.1, 0.9, 0.99
    parameter = torch.nn.Parameter(torch.tensor([[start]], dtype=torch.float64))
    optimizer = adam("schedulefree_adamw", [parameter], learning_rate=rate, adam_weight_decay=0.0)
    x = z = y = start
    square = 0.0
    for k, gradient in enumerate((0.3, -1.2, 0.7), start=1):
        square = beta2 * square + (1 - beta2) * gradient**2
        z -= rate * gradient / (math.sqrt(square / (1 - beta2**k)) + 1e-8)
        x = (1 - 1 / k) * x + z / k
        y = (1 - beta1) * z + beta1 * x
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        trained = parameter.detach().clone()
        assert parameter.item() == pytest.approx(y, abs=1e-12)
        with optimization.averaged_weights(optimizer):
            assert parameter.item() == pytest.approx(x, abs=1e-12)
        assert torch.equal(parameter, trained)


def test_the_rate_that_is_logged_is_the_one_that_is_used():
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    free = adam("schedulefree_adamw", [matrix], learning_rate=0.4, warmup_steps=4)
    for expected in (0.1, 0.2, 0.3, 0.4, 0.4):
        assert optimization.current_learning_rate(free) == pytest.approx(expected)
        matrix.grad = torch.ones(4, 4)
        free.step()
        assert free.param_groups[0]["scheduled_lr"] == pytest.approx(expected)


def test_prodigy_finds_the_distance_to_the_goal():
    """It starts from 1e-6 and raises its estimate; the way from 0 to 3 in every element is 3."""
    matrix = torch.nn.Parameter(torch.zeros(4, 4))
    prodigy = adam("prodigy", [matrix], learning_rate=1.0, adam_weight_decay=0.0)
    rates = []
    for _ in range(200):
        rates.append(optimization.current_learning_rate(prodigy))
        matrix.grad = torch.sign(matrix.detach() - 3.0)
        prodigy.step()
    assert rates[0] == pytest.approx(1e-6) and rates == sorted(rates)
    assert 0.03 < rates[-1] < 3.0
    assert (matrix - 3.0).abs().max() < 1.0


def test_prodigy_has_a_rate_of_its_own(monkeypatch):
    def rate(*flags):
        return arguments.parse_args(list(flags)).learning_rate

    assert rate() == rate("--optimizer", "AdamW") == rate("--optimizer", "schedulefree_adamw") == 1e-4
    assert rate("--optimizer", "Prodigy") == rate("--preset", "c", "--optimizer=prodigy") == 1.0
    assert rate("--preset", "c", "--optimizer", "prodigy", "--learning_rate", "0.5") == 0.5
    assert rate("--preset", "c", "--optimizer", "adamw_8bit") == 5e-5
    monkeypatch.setattr(arguments, "load_preset", lambda name: {"optimizer": "prodigy", "learning_rate": 0.7})
    assert rate("--preset", "c") == 0.7 and rate("--preset", "c", "--optimizer", "prodigy") == 1.0


def test_diffusers_spelling_of_eight_bits():
    def chosen(*flags):
        return arguments.parse_args(["--use_8bit_adam", *flags]).optimizer

    assert chosen() == chosen("--optimizer", "AdamW") == "adamw_8bit"
    assert chosen("--optimizer", "paged_adamw_8bit") == "paged_adamw_8bit"
    with pytest.raises(UsageError, match="--use_8bit_adam is for AdamW and --optimizer says prodigy"):
        chosen("--optimizer", "prodigy")


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.package])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UsageError) as caught:
        check_optimizer(name, lr_scheduler="constant")
    assert f"--optimizer {name} needs an extra: pip install 'ace-step-lora[" in str(caught.value)


def test_what_does_not_go_together_is_refused_before_anything_is_loaded(demo_dir, tmp_path):
    for changes, said in (
        ({"optimizer": "adam"}, "--optimizer must be one of adamw, adamw_8bit"),
        ({"optimizer": "schedulefree_adamw", "lr_scheduler": "cosine"}, "replaces the schedule; use --lr_scheduler"),
    ):
        with pytest.raises(UsageError, match=said):
            train_here(demo_dir, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
