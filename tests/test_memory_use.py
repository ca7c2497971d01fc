"""Predicted bytes against the tensors that PyTorch really keeps."""

import contextlib

import pytest
import torch
from diffusers import AceStepTransformer1DModel

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.estimation.memory_use import Batch, Precision, activation_bytes, inspect_adapter
from acestep_pipeline.masked_attention import use_masked_attention
from acestep_pipeline.training.memory import enable_gradient_checkpointing
from acestep_pipeline.training.optimization import build_optimizer
from acestep_pipeline.training.optimizers import OPTIMIZERS

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
XL_LIKE = {"hidden_size": 320, "intermediate_size": 1216, "num_attention_heads": 8, "num_key_value_heads": 2,
           "head_dim": 64, "encoder_hidden_size": 256}  # fmt: skip


def saved_and_predicted(shape, dtype, dropout, items, *, checkpointing=0.0, targets=None) -> tuple[int, int]:
    """Bytes of what autograd keeps, without parameters and inputs, and what the formula says."""
    torch.manual_seed(0)
    model = AceStepTransformer1DModel(num_hidden_layers=6, **shape).to(dtype)
    settings = {"target_modules": targets} if targets else {}
    use_masked_attention(model)
    add_lora(model, LoraSettings(r=8, lora_dropout=dropout, **settings), seed=0)
    blocks = []
    if checkpointing:
        enable_gradient_checkpointing(model, checkpointing)
        for block in model.layers[: round(6 * checkpointing)]:
            block.register_forward_pre_hook(
                lambda module, args, kwargs: blocks.append(kwargs["hidden_states"]), with_kwargs=True
            )
    batch, width = Batch(items, 400, 60), model.config.encoder_hidden_size or model.config.hidden_size
    inputs = {
        "hidden_states": torch.randn(items, 400, 64).to(dtype), "timestep": torch.full((items,), 0.5).to(dtype),
        "timestep_r": torch.full((items,), 0.5).to(dtype), "context_latents": torch.randn(items, 400, 128).to(dtype),
        "encoder_hidden_states": torch.randn(items, 60, width).to(dtype),
    }  # fmt: skip
    given = {
        tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), *inputs.values()]
    }
    kept, alive = {}, []

    def keep(tensor):
        alive.append(tensor)  # or its memory would be used, and counted, again
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.train()(**inputs).sample.float().square().sum()
    for tensor in blocks:  # a checkpointed block's input is kept outside of the hooks
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    precision = Precision(weight=dtype.itemsize, mask=4)
    predicted = activation_bytes(
        model.config, inspect_adapter(model, dropout=dropout), batch, precision, checkpointing
    )
    return sum(size for address, size in kept.items() if address not in given), predicted


@pytest.mark.parametrize("shape", (WIDE, XL_LIKE))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dropout", (0.0, 0.05))
@pytest.mark.parametrize("items", (1, 2))
def test_activations_are_predicted_within_five_percent(shape, dtype, dropout, items):
    saved, predicted = saved_and_predicted(shape, dtype, dropout, items)
    assert predicted == pytest.approx(saved, rel=0.05)


def test_half_of_the_blocks_checkpointed():
    saved, predicted = saved_and_predicted(WIDE, torch.float32, 0.05, 1, checkpointing=0.5)
    assert predicted == pytest.approx(saved, rel=0.05)


def test_fewer_targets_keep_less():
    saved, predicted = saved_and_predicted(WIDE, torch.bfloat16, 0.05, 1, targets=("to_q", "to_v"))
    assert predicted == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_s_state_is_as_large_as_its_table_says(name):
    parameters = [torch.nn.Parameter(torch.randn(64, 2048)) for _ in range(2)]
    optimizer = build_optimizer(parameters, optimizer=name, learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.999,
                                adam_weight_decay=0.01, adam_epsilon=1e-8)  # fmt: skip
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    constants = {tensor.data_ptr() for tensor in tensors if tensor.numel() <= 256}  # step counters, code books
    size = sum(tensor.nbytes for tensor in tensors if tensor.data_ptr() not in constants)
    assert size / (2 * 64 * 2048) == pytest.approx(OPTIMIZERS[name].state_bytes, rel=0.02)
