"""Files of the latent cache: tensors with a checksum, written whole or not at all."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import RunError, UsageError
from ..files import write_tensors

# Raise when the meaning of a cached tensor changes.
CACHE_VERSION = 2


def cache_folder(directory: Path, name: str = "") -> Path:
    """Where in a latent cache the files of this version lie: the folder or one in it, made if need be.

    Raises:
        UsageError: it can't be made.
    """
    folder = Path(directory) / f"v{CACHE_VERSION}" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--latent_cache_dir {directory} can't be written ({error.strerror}).") from error
    return folder


def read_header(path: Path) -> dict | None:
    """Shapes and metadata of a cache file; None if it isn't there, or its contents are not what was written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    if metadata.get("sha256") != _digest(tensors):
        return None
    return {"shapes": {name: list(tensor.shape) for name, tensor in tensors.items()}, "metadata": metadata}


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_cache_file(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and what `read_header` checks them against. Raises `RunError` where that can't be done."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        write_tensors(path, tensors, metadata | {"sha256": _digest(tensors)})
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{path} can't be written ({error}); make room, or choose another --latent_cache_dir. What was encoded "
            "before is kept."
        ) from error
