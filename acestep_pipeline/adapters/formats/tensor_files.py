"""The tensors of an adapter file, of which names and shapes are known before any is read."""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...errors import UsageError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BOOL": 1, "I8": 1, "U8": 1}
# A zip archive, and pickle protocols 2 to 5.
_PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in (2, 3, 4, 5)))


@dataclass(frozen=True)
class StoredTensors:
    """Names and shapes, and `load`, which reads one tensor; of a file or of a state dict in memory."""

    shapes: dict[str, tuple[int, ...]]
    load: Callable[[str], torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    size_bytes: int = 0


def from_state_dict(state_dict: dict[str, torch.Tensor]) -> StoredTensors:
    """Of a state dict, which is not changed; raises `ValueError` if it holds anything but tensors."""
    if other := [name for name, value in state_dict.items() if not torch.is_tensor(value)]:
        raise ValueError(f"{other[0]!r} is no tensor but {type(state_dict[other[0]]).__name__}")
    shapes = {str(name): tuple(tensor.shape) for name, tensor in state_dict.items()}
    return StoredTensors(shapes, lambda name: state_dict[name].detach())


def pickle_error(path: str | os.PathLike) -> UsageError:
    """Says how to convert a pickle safely."""
    target = str(Path(path).with_suffix(".safetensors"))
    return UsageError(
        f"{path} is a pickle, which can run code when loaded; convert it with "
        '`python -c "import sys, torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in torch.load('
        "sys.argv[1], map_location='cpu', weights_only=True).items()}, sys.argv[2])\" "
        f"{path} {target}`, which runs none of it, and load {target}."
    )


def open_tensors(path: Path) -> StoredTensors:
    """Open a safetensors file; its header is checked, and no tensor is read yet.

    Raises:
        UsageError: it is a pickle, not a safetensors file, or damaged.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise pickle_error(path)
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise UsageError(f"{path} is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`.")
        # A safetensors file has its header's length in 8 bytes, and then JSON.
        if start[8:9] != b"{" and start.startswith(_PICKLE_STARTS):
            raise pickle_error(path)
        # As "pt" the whole file is mapped for writing, which fails for one that is larger than the memory.
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            size = sum(
                _DTYPE_BYTES.get(part.get_dtype(), 2) * math.prod(shapes[name]) for name, part in slices.items()
            )
            metadata = dict(file.metadata() or {})
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        what = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} is no safetensors file, or a damaged one ({what}); copy it again.") from error
    opened = functools.cache(lambda: safe_open(path, "pt"))
    return StoredTensors(shapes, lambda name: opened().get_tensor(name), metadata, size)
