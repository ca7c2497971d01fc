"""Any nested state as tensors (for safetensors) and JSON values, and back: no pickle, whatever the optimizer keeps."""

from typing import Any

import torch

# Marks what JSON has no word for. An optimizer whose own state uses these as keys is refused.
_TENSOR, _TUPLE, _PAIRS = "__tensor__", "__tuple__", "__pairs__"
_MARKS = {_TENSOR, _TUPLE, _PAIRS}


def split_state(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Take `state` (dicts, lists, tuples, tensors and JSON's values, nested in any way) apart.

    Returns:
        Tensors, contiguous on the CPU, named by their place (`state.0.exp_avg`); and JSON values that refer to them.

    Raises:
        TypeError: `state` holds something else; the message names the place.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _split(state, (), tensors)


def join_state(tensors: dict[str, torch.Tensor], values: Any) -> Any:
    """The state that `split_state` took apart, after any trip through safetensors and JSON."""
    if isinstance(values, list):
        return [join_state(tensors, value) for value in values]
    if not isinstance(values, dict):
        return values
    if values.keys() == {_TENSOR}:
        return tensors[values[_TENSOR]]
    if values.keys() == {_TUPLE}:
        return tuple(join_state(tensors, value) for value in values[_TUPLE])
    if values.keys() == {_PAIRS}:
        return {key: join_state(tensors, value) for key, value in values[_PAIRS]}
    return {key: join_state(tensors, value) for key, value in values.items()}


def _split(value: Any, place: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    def inner(key, child):
        return _split(child, (*place, str(key)), tensors)

    if type(value) in (torch.Tensor, torch.nn.Parameter):
        name = ".".join(place)
        if name in tensors:
            raise TypeError(f"two tensors of the state are called {name}")
        # A copy: parameters may share a tensor (bitsandbytes' quantisation maps), which safetensors refuses.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict) and not _MARKS & value.keys():
        if all(isinstance(key, str) for key in value):
            return {key: inner(key, child) for key, child in value.items()}
        if all(isinstance(key, str | int) for key in value):
            return {_PAIRS: [[key, inner(key, child)] for key, child in value.items()]}
    if isinstance(value, list):
        return [inner(index, child) for index, child in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [inner(index, child) for index, child in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{'.'.join(place)} can't be kept in a checkpoint: it is a {type(value).__name__}")
