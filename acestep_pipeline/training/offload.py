"""The frozen base in the host's memory, a block at a time on the device: `--offload`.

diffusers' group offloading (0.42.1) moves a block's weights, the adapter's too, in for its forward pass and out again,
and knows of no backward pass, which then finds them elsewhere. accelerate's hooks (1.15.0) work where blocks are
checkpointed, but hold everything up for each transfer, and without checkpointing autograd keeps what they loaded. So
this is our own; `tests/test_offload.py` tells when diffusers has caught up.

Only the linear layers' frozen weights of the blocks move, 95 % of the model, quantised or not; the adapter stays. A
weight keeps its tensor on the device, and only the memory behind it comes and goes, so that the views of it that
autograd saves are good again once the memory is back. This, and copying below autograd's version counters, is what
PyTorch's FSDP does with its parameters as well.
"""

import torch


class OffloadedBlock:
    """The frozen weights of one block: kept on the host, in pinned memory where the device is a GPU."""

    def __init__(self, block: torch.nn.Module, device: torch.device) -> None:
        """Move the block's frozen linear weights to `device`, and take their memory there away again."""
        self.kept: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        self.is_loaded = False
        self.ready: torch.cuda.Event | None = None
        self.linears = [
            module
            for module in block.modules()
            if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
        ]
        for linear in self.linears:
            kept = stored_tensor(linear.weight).detach().to("cpu", copy=True).untyped_storage()
            linear.to(device)
            own_memory(linear.weight)
            there = stored_tensor(linear.weight).untyped_storage()
            self.kept.append((kept.pin_memory() if device.type == "cuda" else kept, there))
            there.resize_(0)

    @property
    def size_bytes(self) -> int:
        """What the block takes on the device while it is there."""
        return sum(here.nbytes() for here, _ in self.kept)

    def load(self, stream: torch.cuda.Stream | None) -> None:
        """Start copying the weights to the device, on `stream` if there is one."""
        if self.is_loaded:
            return
        self.is_loaded = True
        with torch.cuda.stream(stream):  # does nothing for None
            for here, there in self.kept:
                there.resize_(here.nbytes())
                there.copy_(here, non_blocking=stream is not None)
            if stream is not None:
                self.ready = stream.record_event()

    def wait(self) -> None:
        """Let the device's current stream wait until the weights are there."""
        if self.ready is not None:
            torch.cuda.current_stream().wait_event(self.ready)

    def unload(self) -> None:
        """Give the memory on the device back; the host still has the weights."""
        if self.is_loaded:
            self.is_loaded, self.ready = False, None
            for _, there in self.kept:
                there.resize_(0)


def stored_tensor(weight: torch.Tensor) -> torch.Tensor:
    """The tensor that holds nearly all of a weight's bytes: itself, or what torchao packs. Scales, a few per cent of
    it, stay where they are."""
    return weight.qdata if hasattr(weight, "qdata") else weight.data


def own_memory(weight: torch.nn.Parameter) -> None:
    """Put a weight that may lie in a mapped file, with others, into memory of its own, which can be resized."""
    if hasattr(weight, "qdata"):
        weight.qdata = weight.qdata.clone()
    else:
        weight.data = weight.data.clone()


def is_offloaded(transformer: torch.nn.Module) -> bool:
    """Whether `BlockOffloading` places the weights of `transformer`, so that it must not be moved."""
    return hasattr(transformer, "block_offloading")


def bring_weights(transformer: torch.nn.Module, name: str) -> None:
    """Before layer `name` is read outside of a forward pass: have its block on the device, if it comes and goes."""
    parts = name.split(".")
    if is_offloaded(transformer) and parts[0] == "layers":
        transformer.block_offloading.bring(int(parts[1]))


class BlockOffloading:
    """Streams the blocks of a transformer: the one that is computed and the next one are on the device.

    The next one, in the backward pass the one before, is copied on a stream of its own while this one is computed.
    """

    def __init__(self, transformer: torch.nn.Module, device: torch.device) -> None:
        """Hook into `transformer`, whose adapter is in place, and move all of it to `device` that stays there.

        It must not be moved afterwards: that would copy weights which have no memory just then.
        """
        transformer.block_offloading = self
        self.blocks = [OffloadedBlock(block, device) for block in transformer.layers]
        moving = {linear for block in self.blocks for linear in block.linears}
        for module in transformer.modules():
            if module not in moving:
                module._apply(lambda tensor: tensor.to(device), recurse=False)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # The block whose backward pass is going on: if it is checkpointed, its forward pass comes again meanwhile.
        self.backward_of: int | None = None
        transformer.register_forward_pre_hook(self._start)
        for index, block in enumerate(transformer.layers):
            block.register_forward_pre_hook(lambda *_, index=index: self._before_forward(index))
            block.register_forward_hook(lambda *arguments, index=index: self._after_forward(index, arguments[-1]))

    def _start(self, *_) -> None:
        self.backward_of = None

    def _before_forward(self, index: int) -> None:
        if index != self.backward_of:
            self._bring(index, then=index + 1)

    def _after_forward(self, index: int, hidden_states: torch.Tensor) -> None:
        if hidden_states.requires_grad and self.backward_of is None:
            hidden_states.register_hook(lambda _: self._before_backward(index))

    def _before_backward(self, index: int) -> None:
        self.backward_of = index
        self._bring(index, then=index - 1)

    def bring(self, index: int) -> None:
        """Have block `index` on the device, and no other."""
        self._bring(index, then=index)

    def _bring(self, index: int, *, then: int) -> None:
        """Have block `index` on the device, start copying block `then` if there is such a one, and no other."""
        for number, block in enumerate(self.blocks):
            if number not in (index, then):
                block.unload()
        if self.stream is not None:
            # The memory that was just given back is used again once what reads it has been computed.
            self.stream.wait_stream(torch.cuda.current_stream())
        self.blocks[index].load(self.stream)
        self.blocks[index].wait()
        if 0 <= then < len(self.blocks):
            self.blocks[then].load(self.stream)
