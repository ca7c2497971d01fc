"""The manifest: what a published folder holds, as one JSON file that says everything about it.

`{"files": [{"file", "size", "sha256"}, …]}` is what checkpoints carry too. A release adds `content` (the folder beside
the manifest that holds each file under its SHA-256; without it the files lie beside the manifest under their names),
`release` (a number, from 1), `parent` (that of the one before), `version`, `message`, `created`, `tool` and `id`.
"""

import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..data.text.text_files import one_line
from ..errors import UsageError
from ..files import sha256
from ..version import __version__

MANIFEST_NAME = "manifest.json"
# Where a release's files lie, each under its SHA-256, and where the manifests of earlier releases do.
CONTENT_FOLDER = "content"
HISTORY_FOLDER = "releases"
# Below the name of a run's adapter, a name of its own: the releases are the run's checkpoints (`training.uploading`).
CHECKPOINTS_FOLDER = "checkpoints"
# Written by the first publisher of a prefix on S3, to learn whether the server refuses to write it a second time.
PROBE_KEY = ".conditional-writes"
# Of a million files with names of 200 bytes.
MAX_MANIFEST_BYTES = 300 * 1024**2
# An object on S3 is no larger (S3 user guide, "Amazon S3 quotas", 2025).
_MAX_FILE_BYTES = 50 * 10**12
# Names that open a device on Windows, with any ending (Microsoft, "Naming Files, Paths, and Namespaces").
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE | re.DOTALL)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"(?!latest$)(?=[^0-9]*[^\W\d])[\w.+-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class ManifestFile:
    """A file: its name relative to the folder (with /), its size in bytes and its SHA-256 in hexadecimal."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder holds. `content` is None where the files lie beside the manifest (a checkpoint, a pulled copy);
    `release` and what follows it are None where it never was published."""

    files: tuple[ManifestFile, ...]
    content: str | None = None
    release: int | None = None
    parent: int | None = None
    version: str | None = None
    message: str | None = None
    created: str | None = None
    tool: str | None = None
    id: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def key(self, file: ManifestFile) -> str:
        """Where a file's content lies, relative to the manifest's folder."""
        return file.file if self.content is None else f"{self.content}/{file.sha256}"

    def to_json(self) -> bytes:
        """The file's content."""
        facts = {name: value for name, value in vars(self).items() if name != "files" and value is not None}
        return json.dumps(
            facts | {"files": [vars(file) for file in self.files]}, indent=1, ensure_ascii=False
        ).encode()


def describe_file(directory: Path, name: str) -> ManifestFile:
    """Measure and hash one file of a folder."""
    path = directory / name
    return ManifestFile(name, path.stat().st_size, sha256(path))


def new_release(
    files: Iterable[ManifestFile], *, parent: Manifest | None, version: str | None = None, message: str | None = None
) -> Manifest:
    """The manifest of the release after `parent`; no two are equal, even of the same files."""
    return Manifest(
        files=tuple(sorted(files, key=lambda file: file.file)),
        content=CONTENT_FOLDER,
        release=parent.release + 1 if parent else 1,
        parent=parent.release if parent else None,
        version=version,
        message=message,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool=f"ace-step-lora {__version__}",
        id=secrets.token_hex(8),
    )


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read and check a manifest.

    Args:
        data: the file.
        where: what to call it in messages.

    Raises:
        UsageError: it is damaged, or names a file that would not be a file of its own below the folder.
    """
    try:
        content = json.loads(data)
        files = tuple(ManifestFile(entry["file"], entry["size"], entry["sha256"]) for entry in content["files"])
        known = {name: content.get(name) for name in Manifest.__dataclass_fields__ if name != "files"}
        right = (
            all(_is_file_entry(file) for file in files)
            and all(_is_count(known[name]) for name in ("release", "parent") if known[name] is not None)
            and all(
                isinstance(value, str | None) for name, value in known.items() if name not in ("release", "parent")
            )
            and (known["content"] in (None, CONTENT_FOLDER))
            and (known["content"] is None or bool(known["release"]))
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{where} can't be read ({type(error).__name__}); publish it again.") from None
    if not right:
        raise UsageError(f"{where} is damaged: a size, hash or number in it is none; publish it again.")
    check_names((file.file for file in files), where)
    return Manifest(files=files, **known)


def _is_file_entry(file: ManifestFile) -> bool:
    hashed = isinstance(file.sha256, str) and _SHA256.fullmatch(file.sha256)
    return isinstance(file.file, str) and _is_count(file.size) and file.size <= _MAX_FILE_BYTES and bool(hashed)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_names(names: Iterable[str], where: str, *, may_hold_manifest: bool = False) -> None:
    """Refuse names of files that could lead out of a folder, or could not lie in it together, on any system.

    Raises:
        UsageError: names the first that is refused.
    """
    seen: set[str] = set()
    folders: set[str] = set()
    for name in names:
        if (reason := _refusal(name)) and not (may_hold_manifest and name == MANIFEST_NAME):
            raise UsageError(f"{where}: {one_line(name)!r} is no safe file name ({reason}); rename it.")
        if name in seen:
            raise UsageError(f"{where}: {one_line(name)!r} is there twice; publish it again.")
        seen.add(name)
        folders.update(parent.as_posix() for parent in PurePosixPath(name).parents)
    if both := sorted(folders & seen):
        raise UsageError(f"{where}: {one_line(both[0])!r} is a file and a folder at once; rename one of them.")


def _refusal(name: str) -> str | None:
    parts = name.split("/")
    if name.startswith("/") or PureWindowsPath(name).drive:
        return "it is an absolute path"
    if ".." in parts or "." in parts or "" in parts:
        return "it leads elsewhere"
    if "\\" in name:
        return "it has a backslash"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "it has a line break or control character"
    if any(_DEVICES.fullmatch(part.rstrip(" ")) for part in parts):
        return "on Windows it is a device"
    try:
        if any(len(part.encode()) > 255 for part in parts):
            return "it is longer than 255 bytes"
    except UnicodeEncodeError:
        return "it is not UTF-8"
    if name == MANIFEST_NAME:
        return "that is the manifest's own"
    return None


def check_version(version: str) -> None:
    """Refuse what could be taken for a release's number, or `latest`, or is hard to type.

    Raises:
        UsageError: it says what is allowed.
    """
    if not _VERSION.fullmatch(version):
        raise UsageError(
            f"{one_line(version)!r} is no version: write letters, digits and . _ + - with at least one letter, "
            "and not `latest`, e.g. v1.2."
        )


# --- which files of a folder are published ---------------------------------------------------------------------------

# What only a training that goes on needs, by name: ours (safetensors) and accelerate's.
_STATE_FILES = re.compile(
    r"optimizer.*|trainer_state\.json|finished\.json|random_states_\d+\.pkl|scheduler\.bin|scaler\.pt"
)
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def files_to_publish(directory: Path, *, include_checkpoints: bool = False) -> tuple[list[str], list[str]]:
    """The names of a folder's files, sorted: those to publish, and those to leave out.

    Left out are hidden files and folders (`.env`, `.git`, what is half-written), and, unless `include_checkpoints`,
    `checkpoint-<update>/` and optimizer state anywhere. The folder's own manifest is in neither list.

    Raises:
        UsageError: there is no such folder, nothing is left, a name is not safe, or it holds a link to a folder or
            something that is no file.
    """
    if not directory.is_dir():
        raise UsageError(f"{one_line(str(directory))} is no folder; name one to publish.")
    chosen, left_out = [], []
    for folder, folders, names in os.walk(directory):
        for name in [*names, *(name for name in folders if Path(folder, name).is_symlink())]:
            relative = Path(folder, name).relative_to(directory).as_posix()
            if _is_left_out(relative, include_checkpoints):
                left_out.append(relative)
            elif relative != MANIFEST_NAME:
                if not Path(folder, name).is_file():
                    raise UsageError(
                        f"{one_line(str(Path(folder, name)))} is no file (a link to a folder or to nothing, or a "
                        "device); remove it, or copy what it stands for."
                    )
                chosen.append(relative)
    if not chosen:
        hint = "; what resume needs goes with --include_checkpoints" if left_out else ""
        raise UsageError(f"{one_line(str(directory))} holds no files to publish{hint}.")
    check_names(chosen, one_line(str(directory)))
    return sorted(chosen), sorted(left_out)


def _is_left_out(name: str, include_checkpoints: bool) -> bool:
    *folders, last = name.split("/")
    if any(part.startswith(".") for part in (*folders, last)):
        return True
    if include_checkpoints:
        return False
    return any(_CHECKPOINT.fullmatch(part) for part in folders) or bool(_STATE_FILES.fullmatch(last))
