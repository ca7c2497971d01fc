"""Where releases are kept: a prefix on S3 or a folder on a disk, as keys with content.

Both write in one of three ways: only if the key is new, only if it is unchanged since it was read, or (content, whose
key is its hash) whole or not at all.
"""

from pathlib import Path

from .copies import NUM_WORKERS, is_remote
from .folder_store import FolderStore
from .s3_store import S3Store

Store = S3Store | FolderStore


def open_store(address: str, *, num_workers: int = NUM_WORKERS) -> Store:
    """The store at an `s3://` address, or else a folder's path."""
    return S3Store(address, num_workers=num_workers) if is_remote(address) else FolderStore(Path(address))
