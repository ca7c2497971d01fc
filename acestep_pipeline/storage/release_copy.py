"""What a folder that was published to holds, as files under their names: copied into the cache when asked for."""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ..data.text.text_files import one_line
from ..errors import RunError
from ..files import sha256, write_atomically
from ..paths import cache_dir
from .folder_store import FolderStore
from .publishing import read_latest
from .release_manifest import CONTENT_FOLDER, MANIFEST_NAME, Manifest


def read_local_release(folder: Path) -> Manifest | None:
    """The latest release that was published to a folder; None where nothing was, such as a pulled copy.

    Raises:
        UsageError: its manifest is damaged.
    """
    if not (folder / MANIFEST_NAME).is_file() or not (folder / CONTENT_FOLDER).is_dir():
        return None
    latest = read_latest(FolderStore(folder))
    return latest[0] if latest and latest[0].content is not None else None


def copy_release(
    folder: Path, manifest: Manifest, *, choose: Callable[[list[str]], Iterable[str]] | None = None
) -> Path:
    """The folder in the cache that holds a release's files: all, or what `choose` takes of their names.

    Raises:
        RunError: content is missing or damaged.
    """
    release = hashlib.sha256(manifest.to_json()).hexdigest()[:32]
    root = cache_dir() / "releases" / release
    root.mkdir(parents=True, exist_ok=True)
    names = [file.file for file in manifest.files]
    chosen = set(names if choose is None else choose(names))
    for file in manifest.files:
        target, source = root / file.file, folder / manifest.key(file)
        if file.file not in chosen or (target.is_file() and target.stat().st_size == file.size):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not source.is_file() or source.stat().st_size != file.size or sha256(source) != file.sha256:
            raise RunError(
                f"{one_line(str(folder))}: the content of {one_line(file.file)} is missing or damaged; publish it "
                "again."
            )
        write_atomically(target, lambda temporary, source=source: shutil.copyfile(source, temporary))
    return root
