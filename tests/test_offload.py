"""A frozen base that comes and goes block by block: the same numbers, and no more than two blocks there at a time."""

import pytest
import torch
from diffusers.hooks import apply_group_offloading, group_offloading

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.pipeline import ACEStepPipeline
from acestep_pipeline.quantization import quantize_base
from acestep_pipeline.training.memory import enable_gradient_checkpointing
from acestep_pipeline.training.offload import BlockOffloading, OffloadedBlock, stored_tensor
from tests.training_runs import metrics, train_here

CPU = torch.device("cpu")


def build(tiny_dir, *, quantization="none", checkpointing=0.0, **settings):
    """The tiny DiT with an adapter of random weights, in training mode."""
    transformer = ACEStepPipeline.from_pretrained(tiny_dir).transformer
    quantize_base(transformer, quantization, device=CPU)
    parameters = add_lora(transformer, LoraSettings(r=4, lora_alpha=8, lora_dropout=0.1, **settings), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if checkpointing:
        enable_gradient_checkpointing(transformer, checkpointing)
    return transformer.train(), parameters


def forward(transformer):
    generator = torch.Generator().manual_seed(2)
    config = transformer.config
    channels, width = config.audio_acoustic_hidden_dim, config.encoder_hidden_size or config.hidden_size
    torch.manual_seed(3)  # dropout
    return transformer(
        hidden_states=torch.randn(2, 50, channels, generator=generator),
        timestep=torch.tensor([0.3, 0.8]),
        timestep_r=torch.tensor([0.3, 0.8]),
        encoder_hidden_states=torch.randn(2, 7, width, generator=generator),
        context_latents=torch.randn(2, 50, config.in_channels - channels, generator=generator),
        return_dict=False,
    )[0]


def gradients(transformer, parameters) -> list[torch.Tensor]:
    """Of two forward passes of an update, after one without a gradient, as validation makes."""
    with torch.no_grad():
        forward(transformer)
    for _ in range(2):
        forward(transformer).square().mean().backward()
    found = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.mark.parametrize(
    "kind",
    [{}, {"checkpointing": 0.5}, {"checkpointing": 1.0}, {"target_modules": ("to_q", "gate_proj")},
     {"use_dora": True}, {"adapter_type": "lokr", "checkpointing": 1.0}, {"quantization": "nf4"},
     {"quantization": "nf4", "checkpointing": 1.0}, {"quantization": "int8"}, {"quantization": "fp8"}],
    ids=str,
)  # fmt: skip
def test_the_same_gradients_to_the_bit(tiny_dir, kind):
    expected = gradients(*build(tiny_dir, **kind))
    transformer, parameters = build(tiny_dir, **kind)
    offloading = BlockOffloading(transformer, CPU)
    found = gradients(transformer, parameters)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in found)
    assert all(block.size_bytes > 0 for block in offloading.blocks)


def on_device(transformer) -> list[int]:
    """The blocks whose frozen weights have memory."""
    found = []
    for index, block in enumerate(transformer.layers):
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad]
        sizes = {stored_tensor(linear.weight).untyped_storage().nbytes() > 0 for linear in linears}
        assert len(sizes) == 1, "a block is there as a whole, or not at all"
        found += [index] if sizes.pop() else []
    return found


@pytest.mark.parametrize("checkpointing", [0.0, 1.0])
def test_two_blocks_are_there_and_the_next_one_is_fetched_ahead(tiny_dir, checkpointing, monkeypatch):
    """The order of the transfers, and what is in memory at each."""
    transformer, _ = build(tiny_dir, checkpointing=checkpointing)
    offloading = BlockOffloading(transformer, CPU)
    assert on_device(transformer) == []
    moves, load = [], OffloadedBlock.load

    def watched(block, stream):
        if not block.is_loaded:
            moves.append(offloading.blocks.index(block))
        load(block, stream)
        assert len(on_device(transformer)) <= 2

    monkeypatch.setattr(OffloadedBlock, "load", watched)
    loss = forward(transformer).square().mean()
    assert moves == [0, 1, 2, 3] and on_device(transformer) == [3]
    # Without its weights, the backward pass of a block would not be the one above.
    loss.backward()
    assert moves == [0, 1, 2, 3, 2, 1, 0] and on_device(transformer) == [0]
    with torch.no_grad():
        forward(transformer)
    assert moves[7:] == [1, 2, 3] and on_device(transformer) == [3]


def test_autograd_keeps_no_memory_of_the_base(tiny_dir):
    """What a forward pass saves for the backward pass is not a copy of weights that have gone."""
    transformer, _ = build(tiny_dir)
    BlockOffloading(transformer, CPU)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        forward(transformer)
    weights = {
        stored_tensor(module.weight).untyped_storage().data_ptr()
        for block in transformer.layers[:-1]
        for module in block.modules()
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
    }
    empty = [tensor for tensor in saved if tensor.numel() and not tensor.untyped_storage().nbytes()]
    assert weights == {0} and len(empty) >= 3 * 8, "views of the weights, without memory"


def test_a_run_makes_the_same_adapter(demo_dir, tmp_path):
    settings = {"max_train_steps": 3, "lora_dropout": 0.1, "gradient_checkpointing": True, "checkpointing_steps": 1,
                "validation_fraction": 0.3, "num_validation_draws": 1, "validation_steps": 1}  # fmt: skip
    train_here(demo_dir, tmp_path / "plain", **settings)
    train_here(demo_dir, tmp_path / "run", offload=True, **settings | {"max_train_steps": 2})
    train_here(demo_dir, tmp_path / "run", offload=True, resume_from_checkpoint="latest", **settings)
    plain, offloaded = (tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("plain", "run"))
    assert offloaded.read_bytes() == plain.read_bytes()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "plain")


def test_diffusers_offloading_still_brings_nothing_back_for_the_backward_pass(tiny_dir, monkeypatch):
    """When this fails, see whether `training/offload.py` can go."""
    transformer, _ = build(tiny_dir)
    moved, onload = [], group_offloading.ModuleGroup.onload_
    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", lambda group: moved.append(group) or onload(group))
    apply_group_offloading(transformer, CPU, CPU, "block_level", num_blocks_per_group=1)
    loss = forward(transformer).square().mean()
    before = len(moved)
    loss.backward()
    assert before >= 4 and len(moved) == before
