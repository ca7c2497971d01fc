"""How many bytes an update of a LoRA takes, part by part, from the shape of the model and of the batch.

Activations are what autograd keeps for the backward pass: one formula per block, derived from the operations of
`AceStepTransformerBlock` and of peft's LoRA layers, and checked against the tensors that PyTorch really saves
(`tests/test_memory_use.py`).
"""

import math
from dataclasses import dataclass

from diffusers import AceStepTransformer1DModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ..masked_attention import BLOCK
from ..quantization import BYTES_PER_LAYER, block_linears
from ..training.memory import num_checkpointed_blocks
from ..training.optimizers import OPTIMIZERS

GIB = 1 << 30
# Sizes that are assumed, not counted: a CUDA context with its libraries' workspaces, and the share of what tensors
# take that PyTorch's allocator holds beyond it because freed blocks don't fit new tensors exactly.
CUDA_CONTEXT_BYTES = 0.6 * GIB
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Precision:
    """Bytes of an element, and what the device's kernels keep.

    Attributes:
        weight: bytes of a weight or activation, 2 or 4.
        mask: bytes of an element of a dropout mask: 1 on CUDA, 4 on CPU.
        shared_keys: whether attention under a mask takes keys that heads share as they are, or copies them for each
            head, as on CUDA (`masked_attention.py`).
    """

    weight: int = 2
    mask: int = 1
    shared_keys: bool = True

    @property
    def copies(self) -> int:
        """A norm in half precision keeps its input in float32 besides."""
        return self.weight + (4 if self.weight < 4 else 0)


@dataclass(frozen=True)
class Batch:
    """One forward pass: `items` windows of `frames` latent frames, each with up to `condition_tokens`."""

    items: int
    frames: int
    condition_tokens: int

    def tokens(self, config) -> int:
        """DiT tokens of all items: one for each patch of frames."""
        return self.items * self.item_tokens(config)

    def item_tokens(self, config) -> int:
        """DiT tokens of one item."""
        return -(-self.frames // config.patch_size)


@dataclass(frozen=True)
class Adapter:
    """What was added to a transformer: for each adapted layer of one block (`self_attn.to_q` …) its rank (0 where the
    method has none), the parameters of all blocks, the dropout, and whether it is DoRA."""

    ranks: dict[str, int]
    num_parameters: int
    dropout: float
    use_dora: bool = False


def inspect_adapter(transformer: AceStepTransformer1DModel, *, dropout: float, use_dora: bool = False) -> Adapter:
    """Read off a transformer, on any device, what `add_lora` added. Blocks are taken to be alike: of a layer that
    only some blocks adapt, all are counted."""
    ranks = {}
    for name, module in transformer.named_modules():
        if isinstance(module, BaseTunerLayer) and name.startswith("layers."):
            down = getattr(module, "lora_A", None)
            ranks[name.split(".", 2)[2]] = max((layer.out_features for layer in (down or {}).values()), default=0)
    trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    return Adapter(ranks, trained, dropout, use_dora)


def base_bytes(transformer: AceStepTransformer1DModel, method: str, precision: Precision) -> int:
    """Bytes of the frozen weights, before an adapter is added, with the blocks' linear layers quantised."""
    total = sum(parameter.numel() for parameter in transformer.parameters()) * precision.weight
    if method != "none":
        for linear in block_linears(transformer).values():
            size = BYTES_PER_LAYER[method](linear.out_features, linear.in_features)
            total += math.ceil(size) - linear.weight.numel() * precision.weight
    return total


def moving_bytes(transformer: AceStepTransformer1DModel, method: str, precision: Precision) -> int:
    """Bytes of a block's weights that `--offload` moves: its linear layers', quantised or not."""
    linears = block_linears(transformer).values()
    size = BYTES_PER_LAYER.get(method, lambda out, into: out * into * precision.weight)
    total = sum(size(linear.out_features, linear.in_features) for linear in linears)
    return math.ceil(total / len(transformer.layers))


def block_bytes(config, adapter: Adapter, batch: Batch, precision: Precision) -> int:
    """What one block keeps for its backward pass.

    Three norms keep their inputs, the attentions their queries, keys and values before and after the norm and their
    outputs, the MLP its three intermediate tensors; each adapted layer its input and its down-projection.
    """
    tokens, conditions = batch.tokens(config), batch.items * batch.condition_tokens
    hidden, into_mlp = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    w = precision.weight
    total = 3 * tokens * hidden * precision.copies + 3 * tokens * into_mlp * w
    for attention, key_tokens in (("self_attn", tokens), ("cross_attn", conditions)):
        total += tokens * queries * (precision.copies + 2 * w) + tokens * config.num_attention_heads * 4
        total += key_tokens * keys * 2 * w
        # The condition needs no gradient: without an adapter on them, neither do its keys.
        if attention == "self_attn" or "cross_attn.to_k" in adapter.ranks:
            total += key_tokens * keys * precision.copies
    return total + _adapter_bytes(config, adapter, batch, precision)


def _adapter_bytes(config, adapter: Adapter, batch: Batch, precision: Precision) -> int:
    """What the adapted layers of a block keep. In float32 without dropout, those with the same input share it."""
    tokens, conditions = batch.tokens(config), batch.items * batch.condition_tokens
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    widths = {"to_q": (hidden, queries), "to_k": (hidden, keys), "to_v": (hidden, keys), "to_out.0": (queries, hidden),
              "gate_proj": (hidden, config.intermediate_size), "up_proj": (hidden, config.intermediate_size),
              "down_proj": (config.intermediate_size, hidden)}  # fmt: skip
    total, shared = 0, set()
    for name, rank in adapter.ranks.items():
        module, layer = name.split(".", 1)
        of_condition = module == "cross_attn" and layer in ("to_k", "to_v")
        rows, (into, out) = conditions if of_condition else tokens, widths[layer]
        size = rows * rank * precision.weight
        if adapter.dropout or precision.weight < 4:
            size += rows * into * precision.weight
            size += 0 if of_condition or not adapter.dropout else rows * into * precision.mask
        elif of_condition or (layer == "to_out.0" and batch.items == 1):
            pass  # kept once for all blocks, or by the attention (of several items, in another layout)
        elif (source := (module, layer in ("to_out.0", "down_proj"))) not in shared:
            shared.add(source)
            size += rows * into * 4
        if adapter.use_dora:
            size += rows * out * (precision.weight + 4)
        total += size
    return total


def attention_kinds(config) -> list[str]:
    """`sliding_attention` or `full_attention`, for each block; where the config doesn't say, as diffusers has it."""
    blocks = config.num_hidden_layers
    return list(config.layer_types or (["sliding_attention", "full_attention"] * blocks)[:blocks])


def _window_bytes(config, batch: Batch, precision: Precision) -> int:
    """What a sliding window keeps in a block beyond full attention: the output of each block of queries, before they
    are joined, its mask, and copied keys and values."""
    tokens, queries = batch.item_tokens(config), config.num_attention_heads * config.head_dim
    if tokens <= config.sliding_window + 1:
        return 0
    mask = tokens * min(tokens, BLOCK + 2 * config.sliding_window) * precision.weight
    return mask + batch.tokens(config) * (queries * precision.weight + _copied_key_bytes(config, precision))


def _copied_key_bytes(config, precision: Precision) -> int:
    """What a key and its value take for each head of the queries, beyond what they take themselves."""
    heads = 0 if precision.shared_keys else config.num_attention_heads - config.num_key_value_heads
    return 2 * heads * config.head_dim * precision.weight


def activation_bytes(config, adapter: Adapter, batch: Batch, precision: Precision, checkpointing: float) -> int:
    """The most that is kept at any time of an update: at the end of the forward pass, or, with checkpointed blocks,
    when the last of these has been computed again.

    Args:
        config: an `AceStepTransformer1DModel`'s.
        checkpointing: the share of the blocks, the first ones, that keep only their input.
    """
    tokens, conditions = batch.tokens(config), batch.items * batch.condition_tokens
    blocks, w = config.num_hidden_layers, precision.weight
    checkpointed = num_checkpointed_blocks(blocks, checkpointing)
    whole = max(blocks - checkpointed, 1 if checkpointed else 0)
    # Conditions of unequal length are masked, in every block.
    block = block_bytes(config, adapter, batch, precision) + conditions * _copied_key_bytes(config, precision)
    kept = checkpointed * tokens * config.hidden_size * w + whole * block
    sliding = attention_kinds(config)[blocks - whole :].count("sliding_attention")
    kept += sliding * _window_bytes(config, batch, precision)
    if not checkpointed:
        # The first block's input needs no gradient: its norm and its dropouts keep nothing.
        dropouts = sum(name in adapter.ranks for name in ("self_attn.to_q", "self_attn.to_k", "self_attn.to_v"))
        masks = dropouts * precision.mask if adapter.dropout else 0
        kept -= tokens * config.hidden_size * (precision.copies + masks)
    # Once for all blocks: the condition, the sliding window's mask, the last norm, the noisy latents and the loss.
    kept += conditions * config.hidden_size * w + batch.item_tokens(config) ** 2 * w
    kept += tokens * config.hidden_size * precision.copies
    kept += batch.items * batch.frames * (config.in_channels * w + 5 * config.audio_acoustic_hidden_dim * 4)
    if w < 4:
        kept += adapter.num_parameters * w  # the adapter as autocast rounds it
    return kept


def working_bytes(config, batch: Batch, precision: Precision, method: str) -> int:
    """Gradients of activations and other buffers that live for a moment: at most, an MLP's backward pass holds three
    of its intermediate tensors and two of the residual stream, beside one dequantised weight."""
    tokens = batch.tokens(config)
    buffers = tokens * (3 * config.intermediate_size + 2 * config.hidden_size) * precision.weight
    weight = config.intermediate_size * config.hidden_size
    return buffers + (0 if method == "none" else weight * (precision.weight + (8 if method != "nf4" else 0)))


def predict_update(
    transformer: AceStepTransformer1DModel,
    adapter: Adapter,
    batch: Batch,
    precision: Precision,
    *,
    base_quantization: str,
    gradient_checkpointing: float,
    optimizer: str,
    offload: bool = False,
    ema: bool = False,
) -> dict[str, int]:
    """Bytes of tensors at the peak of an update, by part.

    Args:
        transformer: of the model's shape and without the adapter; the meta device will do.
        gradient_checkpointing: the share of the blocks that are checkpointed.
        optimizer: a name of `optimizers.OPTIMIZERS`.
        offload: whether only two blocks of the base are there at a time.
        ema: whether an average of the adapter is kept besides.
    """
    config, trained = transformer.config, adapter.num_parameters
    base = base_bytes(transformer, base_quantization, precision)
    if offload:
        base -= max(0, config.num_hidden_layers - 2) * moving_bytes(transformer, base_quantization, precision)
    return {
        "base weights": base,
        "adapter": 4 * trained * (2 if ema else 1),
        "gradients": 4 * trained,
        "optimizer": math.ceil(OPTIMIZERS[optimizer].state_bytes * trained),
        "activations": activation_bytes(config, adapter, batch, precision, gradient_checkpointing),
        "working memory": working_bytes(config, batch, precision, base_quantization),
    }
