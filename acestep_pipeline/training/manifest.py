"""The manifest of a checkpoint: size and SHA-256 of each of its files (`release_manifest`), written last.

Nothing here imports torch: which checkpoint a run goes on from should be known before anything is loaded.
"""

import json
from pathlib import Path

from ..files import flush_to_disk, sha256
from ..storage.release_manifest import MANIFEST_NAME, Manifest, describe_file


def seal(directory: Path) -> None:
    """Flush every file below `directory` to disk and write the manifest of them.

    After it, and a rename of `directory` that is flushed as well, not even a power cut loses the files.
    """
    files = []
    for path in _files(directory):
        flush_to_disk(path)
        files.append(describe_file(directory, path.relative_to(directory).as_posix()))
    manifest = directory / MANIFEST_NAME
    manifest.write_bytes(Manifest(tuple(files)).to_json())
    for path in (manifest, *sorted({path.parent for path in _files(directory)})):
        flush_to_disk(path)


def find_damage(directory: Path) -> str | None:
    """What is wrong with the files of a sealed directory, naming the first such file; None if they are as written.

    Files that the manifest doesn't name are not looked at. About a second for each GiB.
    """
    manifest = directory / MANIFEST_NAME
    try:
        files = {entry["file"]: entry for entry in json.loads(manifest.read_text(encoding="utf-8"))["files"]}
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"its {MANIFEST_NAME} can't be read ({type(error).__name__})"
    for name, entry in files.items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                return f"its {name} has {size} bytes instead of {entry['size']}"
            if sha256(path) != entry["sha256"]:
                return f"its {name} has another SHA-256 than when it was written"
        except OSError as error:
            return f"its {name} can't be read ({error.strerror})"
    return None


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())
