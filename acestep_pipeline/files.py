"""Writing files so that a finished name is a finished file, readable by whoever may read its neighbours."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under a temporary name in a folder beside it, then rename it to `path`.

    The file gets the permissions that the umask gives to new files (safetensors alone would make it private).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".partial-{path.name}-", dir=path.parent))
    try:
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file  # torch, which callers that only write text should not wait for

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata=metadata)
        sort_metadata(temporary)

    write_atomically(path, write)


def sort_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors header, in place, so that equal content makes equal bytes.

    The library writes it in another order each time. Layout: 8 bytes of little-endian length, then that much JSON,
    padded with spaces, then the tensors (the safetensors format's specification).
    """
    with Path(path).open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:  # the same JSON, as compact as it can be, has no way to grow
            raise AssertionError(f"{path}: the header grew from {length} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(length))
