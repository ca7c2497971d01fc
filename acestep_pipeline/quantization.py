"""The frozen base DiT in 8 or 4 bits: less memory for weights that are never trained.

Only the linear layers of the blocks (attention projections and MLP) are quantised: they hold 95 % of the parameters.
The timestep embeddings, the condition projection, the patch convolutions, norms and modulation tables stay as they
are: all latents, conditions and timesteps pass through each of them, so that its error would reach every block.
"""

import warnings

import torch

# Bytes that a quantised parameter takes, scales included, by `[out, in]` of its layer. nf4: 4 bits, an 8-bit scale for
# 64 of them, a float32 scale for 256 of those (QLoRA's double quantisation). int8 and fp8: a byte, and for each output
# a float32 scale (int8 also has a zero point, a byte that is always 0).
BYTES_PER_LAYER = {
    "nf4": lambda out, into: out * into * (1 / 2 + 1 / 64 + 4 / (64 * 256)),
    "int8": lambda out, into: out * into + 5 * out,
    "fp8": lambda out, into: out * into + 4 * out,
}


def block_linears(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of the blocks by name: what is quantised."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if name.startswith("layers.") and isinstance(module, torch.nn.Linear)
    }


def quantize_base(transformer: torch.nn.Module, method: str, *, device: torch.device) -> None:
    """Quantise the blocks' linear layers in place, before an adapter is added.

    Args:
        transformer: an `AceStepTransformer1DModel` on the CPU, in the precision to compute in.
        method: none, nf4, int8 or fp8. nf4: bitsandbytes' NF4 with double quantisation (QLoRA). int8, fp8 (e4m3):
            torchao's tensors with one scale an output. Products are computed in the precision of their input.
        device: where to quantise, a layer at a time. The result is on the CPU again, so that the encoders have the
            device to themselves until training starts.
    """
    if method == "none":
        return
    # The adapter is never merged into a quantised base: it is saved, and loaded on the original one.
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
    for name, linear in block_linears(transformer).items():
        parent, _, child = name.rpartition(".")
        quantized = _nf4_linear(linear, device) if method == "nf4" else _8bit_linear(linear, method, device)
        setattr(transformer.get_submodule(parent), child, quantized)
    if method == "nf4":
        transformer.is_loaded_in_4bit = True  # by this peft chooses the adapter layer for bitsandbytes


def leave_base_out_of_ddp(transformer: torch.nn.Module) -> None:
    """Keep `DistributedDataParallel` from broadcasting frozen parameters: it can't copy torchao's tensors, and every
    process has loaded the same checkpoint. Call it with the adapter in place, before the model is wrapped."""
    frozen = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)


def _nf4_linear(linear: torch.nn.Linear, device: torch.device) -> torch.nn.Linear:
    import bitsandbytes as bnb

    size = (linear.in_features, linear.out_features)
    has_bias, dtype = linear.bias is not None, linear.weight.dtype
    layer = bnb.nn.Linear4bit(*size, bias=has_bias, compute_dtype=dtype, quant_type="nf4", device="meta")
    weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = weight.to(device).to("cpu")
    layer.bias = linear.bias
    # Otherwise evaluating on such a CPU packs the weights in a layout that has no backward pass.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _8bit_linear(linear: torch.nn.Linear, method: str, device: torch.device) -> torch.nn.Linear:
    with warnings.catch_warnings():  # deprecations within torchao
        warnings.simplefilter("ignore")
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    layer = Frozen8BitLinear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    layer.weight = torch.nn.Parameter(linear.weight.data.to(device), requires_grad=False)
    layer.bias = linear.bias
    config = Int8WeightOnlyConfig() if method == "int8" else Float8WeightOnlyConfig(set_inductor_config=False)
    quantize_(layer, config, filter_fn=lambda module, name: module is layer)
    return layer.to("cpu")


class Frozen8BitLinear(torch.nn.Linear):
    """A linear layer whose frozen weight is a torchao tensor, and that keeps no more than this for its backward pass.

    torchao's own forward pass saves the dequantised weight, so that training without gradient checkpointing would hold
    the whole base in its original precision after all.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kind = hidden_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
        output = _FrozenMatmul.apply(hidden_states.to(dtype), self.weight)
        return output if self.bias is None else output + self.bias.to(dtype)


class _FrozenMatmul(torch.autograd.Function):
    """`x @ weight.T`, dequantising the weight in the forward pass and once more in the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight.dequantize(output_dtype=x.dtype))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.weight.dequantize(output_dtype=grad.dtype), None
