"""Bytes of an update, and of coding audio, at full size without the memory for it: real code on fake tensors.

PyTorch's fake tensors have shapes, dtypes and storages but no data, so that every allocation and release of DiT, LoRA,
checkpointing, backward pass, clip, AdamW and VAE is counted, and nothing is computed. They follow the CPU's kernels (a
fused attention, float32 dropout masks), so what the formulas predict beside them is for those, unquantised, with plain
AdamW.
"""

import contextlib
import weakref

import torch
from diffusers import AceStepTransformer1DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.condition_mask import ConditionMask
from acestep_pipeline.estimation.memory_use import Adapter, Batch, Precision, inspect_adapter, predict_update
from acestep_pipeline.estimation.model_shapes import SHAPES
from acestep_pipeline.masked_attention import use_masked_attention
from acestep_pipeline.pipeline import tile_audio_coding
from acestep_pipeline.progress import quiet_loading
from acestep_pipeline.training.memory import enable_gradient_checkpointing
from acestep_pipeline.training.optimization import build_optimizer
from train_ace_step_lora import squared_error


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations return while it is active: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.live, self.peak = WeakIdKeyDictionary(), 0, 0

    def count(self, *tensors: object) -> None:
        """Count what is not counted yet, until it is released; anything that is no tensor is passed over."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                size = self.seen[storage] = storage.nbytes()
                self.live += size
                weakref.finalize(storage, self._release, size)
        self.peak = max(self.peak, self.live)

    def _release(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count(*tree_leaves(result))
        return result


@contextlib.contextmanager
def fake_copy(module: torch.nn.Module):
    """Give a module on the meta device parameters and buffers without data that count as a CPU's, and let what runs
    inside make such tensors too."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    part._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield


def bfloat16_transformer(config: dict) -> AceStepTransformer1DModel:
    """On the meta device."""
    with torch.device("meta"), quiet_loading():
        return AceStepTransformer1DModel(**config).to(torch.bfloat16)


def account_update(config: dict, lora: LoraSettings, batch: Batch, *, checkpointing: float, updates: int = 1) -> int:
    """Bytes at the peak of bf16 updates with AdamW, with everything that is there, of a transformer of `config`."""
    transformer = bfloat16_transformer(config)
    use_masked_attention(transformer)
    add_lora(transformer, lora, seed=0)
    width = transformer.config.encoder_hidden_size or transformer.config.hidden_size
    items, frames = batch.items, batch.frames
    with fake_copy(transformer):
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        if checkpointing:
            enable_gradient_checkpointing(transformer, checkpointing)
        condition_mask = ConditionMask(transformer.train())
        optimizer = build_optimizer(parameters, optimizer="adamw", learning_rate=1e-4, adam_beta1=0.9,
                                    adam_beta2=0.999, adam_weight_decay=0.01, adam_epsilon=1e-8)  # fmt: skip
        for parameter in parameters:  # as after the first update
            state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = state | {"step": torch.tensor(0.0)}
        silence, null = torch.randn(1, 15000, 64), torch.randn(1, 1, width, dtype=torch.bfloat16)
        live = LiveBytes()
        live.count(*transformer.parameters(), *tree_leaves(dict(optimizer.state)))
        with live:
            for _ in range(updates):
                inputs = {
                    "latents": torch.randn(items, frames, 64),
                    "noise": torch.randn(items, frames, 64),
                    "sigmas": torch.full((items,), 0.5),
                    "encoder_hidden_states": torch.randn(items, batch.condition_tokens, width, dtype=torch.bfloat16),
                    "dropped": torch.zeros(items, dtype=torch.bool),
                }
                with torch.autocast("cpu", torch.bfloat16):
                    loss = squared_error(transformer, inputs, condition_mask, silence, null)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return live.peak


def predict_on_cpu(config: dict, lora: LoraSettings, batch: Batch, *, checkpointing: float) -> tuple[int, Adapter]:
    """What the formulas say of the same, with a CPU's kernels; and the adapter."""
    adapted = bfloat16_transformer(config)
    add_lora(adapted, lora, seed=0)
    adapter = inspect_adapter(adapted, dropout=lora.lora_dropout)
    parts = predict_update(
        bfloat16_transformer(config), adapter, batch, Precision(weight=2, mask=4, shared_keys=True),
        base_quantization="none", gradient_checkpointing=checkpointing, optimizer="adamw",
    )  # fmt: skip
    return sum(parts.values()), adapter


def account_tiles(seconds: float, *, encode: bool, dtype: torch.dtype = torch.float32) -> int:
    """Bytes at the peak of encoding, or decoding, so much audio with the full-size VAE, beside its parameters and the
    audio itself."""
    vae = SHAPES["2b"].build("vae").to(dtype)
    tile_audio_coding(vae)
    with fake_copy(vae), torch.no_grad():
        for part in vae.modules():  # what the weight norm left behind on the meta device
            if hasattr(part, "weight_g"):
                del part.weight
        shape = (1, 2, round(seconds * vae.config.sampling_rate)) if encode else (1, 64, round(seconds * 25))
        given = torch.empty(shape, dtype=dtype)
        live = LiveBytes()
        live.count(*vae.parameters(), given)
        before = live.live
        with live:
            _ = vae.encode(given).latent_dist.mean if encode else vae.decode(given).sample
    return live.peak - before
