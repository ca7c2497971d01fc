"""What a job may name: files below the worker's folders, `s3://` below its root, `hf://`. Nothing else.

A job comes from whoever may send one. An address of another kind (`file://`, `http://169.254.169.254/…`) would have
the worker read for them what they can't read themselves; hence a list of three good kinds, and none of bad hosts.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..data.text.text_files import one_line
from ..errors import UsageError
from ..paths import without_secrets
from ..storage.s3 import parse_address

MAX_ADDRESS_CHARS = 1000
# Owner and name of a repository, as the Hub allows them; `..` is refused besides.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


@dataclass(frozen=True)
class Places:
    """The worker's folders.

    Attributes:
        data: music and datasets that jobs may name, read-only.
        model: base models that jobs may name, read-only.
        output: where a job's own folder is made.
        s3_root: `s3://bucket/prefix`, below which every `s3://` address of a job must lie; None: whatever the worker's
            credentials may read and write.
        adapters: what the adapters of generation jobs are taken from: see `AdapterLibrary`.
    """

    data: Path = Path("/data")
    model: Path = Path("/model")
    output: Path = Path("/output")
    s3_root: str | None = None
    adapters: str = "/output"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Places":
        """From `ACESTEP_JOBS_DATA`, `ACESTEP_JOBS_MODEL`, `ACESTEP_JOBS_OUTPUT` (/data, /model, /output),
        `ACESTEP_S3_ROOT`, and `ACESTEP_ADAPTERS` (`lora` below the S3 root, else the output folder)."""
        given = os.environ if environment is None else environment
        output = given.get("ACESTEP_JOBS_OUTPUT") or "/output"
        root = given.get("ACESTEP_S3_ROOT") or ""
        s3_root = root.rstrip("/") if root.startswith("s3://") else None
        return cls(
            data=Path(given.get("ACESTEP_JOBS_DATA") or "/data"),
            model=Path(given.get("ACESTEP_JOBS_MODEL") or "/model"),
            output=Path(output),
            s3_root=s3_root,
            adapters=given.get("ACESTEP_ADAPTERS") or (f"{s3_root}/lora" if s3_root else output),
        )

    def s3_address(self, address: str, field: str) -> str:
        """An `s3://` address that a job may use, without a / at its end.

        Raises:
            UsageError: it is none, or lies elsewhere.
        """
        _check_text(address, field)
        if not address.startswith("s3://"):
            raise UsageError(f"{field} must be an address such as s3://bucket/folder, not {_shown(address)}.")
        _, folder = parse_address(address)
        parts = folder.rstrip("/").split("/")
        if folder and any(part in ("", ".", "..") for part in parts):
            raise UsageError(f"{field} {_shown(address)} has an empty part, or one that leads elsewhere.")
        if self.s3_root and not f"{address.rstrip('/')}/".startswith(f"{self.s3_root}/"):
            raise UsageError(f"{field} {_shown(address)} must lie below {self.s3_root}, this worker's S3 root.")
        return address.rstrip("/")

    def readable(self, address: str, field: str, *, root: Path, hub: str = "") -> str:
        """What a job may read: a path below `root`, `s3://…`, or a repository, whose address begins with `hub`.

        Returns:
            The resolved path, the `s3://` address, or the repository's `hf://` address.

        Raises:
            UsageError: it is none of these.
        """
        _check_text(address, field)
        if address.startswith("s3://"):
            return self.s3_address(address, field)
        if hub and address.startswith("hf://"):
            if not address.startswith(hub) or not is_repository(address.removeprefix(hub)):
                raise UsageError(f"{field} {_shown(address)} is no repository; write {hub}owner/name.")
            return address
        kinds = f"a path below {root}, s3://bucket/folder{f' or {hub}owner/name' if hub else ''}"
        if _SCHEME.match(address) or "://" in address or address.startswith("//"):
            raise UsageError(f"{field} {_shown(address)} can't be read by a job; give {kinds}.")
        # Links are followed first: one that leads out of the folder is as good as its name.
        top = root.resolve()
        path = (top / address).resolve()
        if not path.is_relative_to(top):
            raise UsageError(f"{field} {_shown(address)} lies outside {root}; give {kinds}.")
        if not path.exists():
            raise UsageError(f"{field} {_shown(address)} is not there; give {kinds}.")
        return str(path)


def is_repository(name: str) -> bool:
    """Whether `owner/name` could be a repository of the Hub."""
    return bool(_REPOSITORY.fullmatch(name)) and ".." not in name and "--" not in name


def _check_text(address: str, field: str) -> None:
    if not address or len(address) > MAX_ADDRESS_CHARS or any(ord(character) < 32 for character in address):
        raise UsageError(f"{field} must be one line of at most {MAX_ADDRESS_CHARS} characters.")


def _shown(address: str) -> str:
    return one_line(without_secrets(address))[:200]
