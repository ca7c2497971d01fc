"""What trades time for memory: the same numbers, fewer bytes, and one sentence where it can't work."""

import importlib.util

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from acestep_pipeline.adapters.trainable import LoraSettings, add_lora
from acestep_pipeline.conditioning import encode_condition
from acestep_pipeline.data.latent_cache import encode_latents
from acestep_pipeline.errors import UsageError
from acestep_pipeline.prompt_fields import PromptFields
from acestep_pipeline.training import arguments
from acestep_pipeline.training.argument_checks import check_args
from acestep_pipeline.training.memory import (
    QUANTIZATION_PACKAGES,
    check_quantization_hardware,
    enable_gradient_checkpointing,
    num_checkpointed_blocks,
)
from tests.training_runs import train_here


def saved_bytes_and_gradients(pipeline, ratio: float) -> tuple[int, torch.Tensor, list[torch.Tensor]]:
    """Bytes that a forward pass keeps for the backward pass, the output, and the adapter's gradients."""
    transformer = pipeline.transformer
    parameters = add_lora(transformer, LoraSettings(r=4, lora_dropout=0.1), seed=0)
    if ratio:
        enable_gradient_checkpointing(transformer.train(), ratio)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 200, 16, generator=generator)
    context, conditions = torch.randn(1, 200, 32, generator=generator), torch.randn(1, 20, 64, generator=generator)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)  # of the dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = transformer(
            hidden_states=latents,
            timestep=torch.tensor([0.5]),
            timestep_r=torch.tensor([0.5]),
            encoder_hidden_states=conditions,
            context_latents=context,
        ).sample
    output.square().sum().backward()
    return sum(kept.values()), output.detach(), [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("ratio", (0.25, 0.5, 1.0))
def test_checkpointing_some_blocks_changes_memory_and_nothing_else(ratio, tiny_dir):
    from acestep_pipeline import ACEStepPipeline

    def run(ratio):
        return saved_bytes_and_gradients(ACEStepPipeline.from_pretrained(tiny_dir), ratio)

    plain_bytes, plain_output, plain_gradients = run(0)
    some_bytes, output, gradients = run(ratio)
    assert torch.allclose(output, plain_output, atol=1e-5)
    for a, b in zip(gradients, plain_gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    # The rest of a block's share are its input, and what all blocks share.
    assert 1 - ratio < some_bytes / plain_bytes < 1 - 0.7 * ratio


def test_a_share_of_the_blocks_is_rounded_up():
    assert [num_checkpointed_blocks(24, ratio) for ratio in (0.01, 0.5, 0.51, 1.0)] == [1, 12, 13, 24]


def test_encoding_needs_no_dit(tiny_pipeline, demo_dir):
    """So that the device never holds DiT and encoders at once: here the DiT has no data at all."""
    clip = next(iter(sorted(demo_dir.glob("*.wav"))))
    fields = PromptFields(prompt="techno", audio_duration=4.0)
    latents, condition = encode_latents(tiny_pipeline.vae, clip), encode_condition(tiny_pipeline, fields)
    tiny_pipeline.transformer.to("meta")
    tiny_pipeline.move_encoders(torch.device("cpu"))
    again = encode_latents(tiny_pipeline.vae, clip), encode_condition(tiny_pipeline, fields)
    assert torch.equal(again[0]["mean"], latents["mean"])
    assert torch.equal(again[1].encoder_hidden_states, condition.encoder_hidden_states)


def test_move_encoders_leaves_the_dit_where_it_is(tiny_pipeline):
    tiny_pipeline.move_encoders(torch.device("meta"))
    modules = {name: part for name, part in tiny_pipeline.components.items() if isinstance(part, torch.nn.Module)}
    moved = {name for name, module in modules.items() if module.device.type == "meta"}
    assert moved == {"vae", "text_encoder", "condition_encoder"}


@pytest.mark.parametrize("ratio", (0, -0.5, 1.5, float("nan")))
def test_a_share_that_is_none_is_refused(ratio):
    args = arguments.parse_args(["--gradient_checkpointing_ratio", str(ratio)])
    with pytest.raises(UsageError, match="--gradient_checkpointing_ratio must be"):
        check_args(args)


@pytest.mark.parametrize("method", ("nf4", "int8", "fp8"))
def test_a_package_that_is_missing_is_named_with_its_extra(method, monkeypatch, demo_dir, tmp_path):
    find_spec = importlib.util.find_spec
    package = QUANTIZATION_PACKAGES[method]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find_spec(name, *a))
    with pytest.raises(UsageError, match=rf"{method} needs {package}, .* pip install 'ace-step-lora\[quantization\]'"):
        train_here(demo_dir, tmp_path / "out", base_quantization=method)
    assert not (tmp_path / "out").exists()


def test_what_the_hardware_can_not_do_is_refused_before_anything_loads(monkeypatch, demo_dir, tmp_path):
    for method in ("nf4", "int8", "fp8"):
        for device in ("cpu", "cuda"):
            check_quantization_hardware(method, torch.device(device), sharded=False)
        with pytest.raises(UsageError, match="runs on CUDA and CPU, and this is mps; use none"):
            check_quantization_hardware(method, torch.device("mps"), sharded=False)
    check_quantization_hardware("none", torch.device("mps"), sharded=True)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr("acestep_pipeline.data.held_out.load_tracks", lambda *a, **k: pytest.fail("it read tracks"))
    with pytest.raises(UsageError, match="one process or DDP; FSDP and DeepSpeed divide weights"):
        train_here(demo_dir, tmp_path / "out", base_quantization="int8")


def test_a_share_without_checkpointing_is_not_ignored():
    with pytest.raises(UsageError, match="ratio 0.5 does nothing without --gradient_checkpointing; add it"):
        check_args(arguments.parse_args(["--gradient_checkpointing_ratio", "0.5"]))
    for flags in (["--gradient_checkpointing"], ["--preset", "vram_24gb"]):
        check_args(arguments.parse_args([*flags, "--gradient_checkpointing_ratio", "0.5"]))
    check_args(arguments.parse_args(["--preset", "vram_24gb", "--no-gradient_checkpointing"]))
