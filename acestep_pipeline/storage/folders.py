"""What `acestep_pipeline.storage` does with folders on this machine and on S3."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import BinaryIO

from ..errors import UsageError
from ..paths import free_space_bytes
from .copies import NUM_WORKERS, file_errors, is_remote
from .folder_store import Stored
from .folder_sync import look, sync_folder
from .publishing import publish, read_latest
from .release_manifest import ManifestFile
from .release_pull import fetch_checked, pull_release
from .s3 import shown
from .stores import Store, open_store
from .transfer_progress import UNCOUNTED, Workers

sync = sync_folder
# How many folders above a file a release is looked for.
_MAX_DEPTH = 8


def pull(source: str, directory: Path, *, version: str | None, **options) -> Path:
    pull_release(source, directory, version=version, **options)
    return directory


def push(directory: Path, target: str, *, version: str | None, **options) -> str:
    manifest = publish(directory, target, version=version, **options).manifest
    return manifest.version or str(manifest.release)


def list_files(location: str) -> list[Stored]:
    files = look(location).files
    return [dataclasses.replace(file, key=name) for name, file in sorted(files.items())]


def exists(location: str) -> bool:
    if not is_remote(location) and Path(location).expanduser().exists():
        return True
    return _find(location) is not None or bool(look(location).files)


def open_file(location: str) -> BinaryIO:
    path = Path(location).expanduser()
    if not is_remote(location) and path.is_file():
        return path.open("rb")
    found = _find(location)
    if found is None:
        raise UsageError(f"{shown(location)} is no file that is there; correct the name, or list what is there.")
    store, stored, entry = found
    with tempfile.TemporaryDirectory(prefix="ace-step-") as folder, file_errors(Path(folder)):
        if stored.size > free_space_bytes(Path(folder)):
            raise UsageError(f"{folder} has no room for {shown(location)} ({stored.size / 1e9:.1f} GB); make room.")
        path = Path(folder, "file")
        if entry is None:
            store.fetch(stored, path, count=UNCOUNTED, workers=Workers(NUM_WORKERS))
        else:
            fetch_checked(store, stored, entry, path, count=UNCOUNTED, workers=Workers(NUM_WORKERS))
        return path.open("rb")  # it stays readable once its name is gone


def _find(location: str) -> tuple[Store, Stored, ManifestFile | None] | None:
    """What lies under a file's own name, or is so named by a release in a folder above: store, content, entry."""
    above, _, name = location.rstrip("/").rpartition("/")
    for depth in range(_MAX_DEPTH):
        if above in ("", "s3:", "s3:/"):
            return None
        store = open_store(above)
        own = [stored for stored in store.list_keys(name) if stored.key == name] if depth == 0 else []
        if own:
            return store, own[0], None
        with contextlib.suppress(UsageError):  # another program's manifest.json
            latest = read_latest(store)
            if latest is not None and latest[0].content is not None:
                for entry in latest[0].files:
                    if entry.file == name:
                        return next(((store, stored, entry) for stored in store.list_keys(latest[0].key(entry))), None)
                return None
        above, _, last = above.rpartition("/")
        name = f"{last}/{name}"
    return None
