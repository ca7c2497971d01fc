"""A folder on S3 or the Hub whose files are fetched one by one, when they are needed, and not kept."""

import contextlib
import glob
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ..data.text.text_files import one_line
from ..errors import RunError, UsageError
from ..paths import check_room
from .copies import file_errors, is_remote, local_copy
from .hub_address import is_on_hub, parse_hub_address
from .s3 import open_client, parse_address, s3_errors, shown
from .s3_downloads import fetch
from .s3_listing import list_files
from .transfer_progress import UNCOUNTED, ByteCount, Workers


@dataclass(frozen=True)
class Identity:
    """A file's size in bytes, and a tag that changes with its content: S3's ETag, or the Hub's hash."""

    size: int
    tag: str


@dataclass(frozen=True, eq=False)
class RemoteFolder:
    """What lay at the address `place` when it was listed: `files` by their names, relative to it.

    `fetch(name, path, count)` brings one file to a path, whole and checked; `_keep(names)` brings files into the local
    copy that `copies.local_copy` would make, and gives its folder.
    """

    place: str
    files: dict[str, Identity]
    fetch: Callable[[str, Path, ByteCount], None]
    _keep: Callable[[set[str]], Path]

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """One file, in a temporary folder that is gone when the context ends.

        Raises:
            UsageError: there is no room for it, or the server refuses it.
            RunError: it is no longer there or has changed since the listing, arrived damaged, or the connection broke.
        """
        with contextlib.ExitStack() as stack:
            with file_errors(Path(tempfile.gettempdir())):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ace-step-")))
                check_room(folder, self.files[name].size)
                path = folder / PurePosixPath(name).name
                self.fetch(name, path, UNCOUNTED)
            yield path

    def key(self, name: str) -> list:
        """JSON that tells one file's content from any other's."""
        identity = self.files[name]
        return [self.place, name, identity.size, identity.tag]

    def keep(self, names: Iterable[str]) -> Path:
        """The folder on this machine that holds these files, of those that are there, brought up to date."""
        return self._keep(set(names))


def can_stream(location: str | Path) -> bool:
    """Whether it is an address that `open_remote_folder` takes."""
    return is_remote(location) or is_on_hub(location)


def open_remote_folder(address: str, *, num_workers: int) -> RemoteFolder:
    """List what is under an `s3://` or `hf://` address, of which up to `num_workers` files, or parts of large
    ones, are fetched at a time.

    Raises:
        UsageError: nothing is there, or it can't be read; a name is not safe.
        RunError: the server failed.
    """
    return _on_hub(address) if is_on_hub(address) else _on_s3(address, num_workers)


def _on_s3(address: str, num_workers: int) -> RemoteFolder:
    bucket, folder = parse_address(address)
    with s3_errors(address):
        client = open_client(num_workers)
        files = list_files(client, address, folder)
    if not files:
        raise UsageError(f"{shown(address)} holds no files; name a folder of the bucket that does.")
    workers = Workers(num_workers)

    def bring(name: str, path: Path, count: ByteCount) -> None:
        with s3_errors(f"s3://{bucket}/{folder}{name}"):
            fetch(client, bucket, files[name], path, workers=workers, count=count)

    return RemoteFolder(
        address,
        {name: Identity(file.size, file.etag) for name, file in files.items()},
        bring,
        lambda names: local_copy(address, choose=names.intersection, num_workers=num_workers, show_progress=False),
    )


def _on_hub(address: str) -> RemoteFolder:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import silent_tqdm

    from .hub import download, hub_errors
    from .hub_pull import list_repository
    from .hub_push import matches
    from .release_manifest import MANIFEST_NAME, check_names

    wanted = parse_hub_address(address)
    listing = list_repository(wanted)
    below = f"{wanted.folder}/" if wanted.folder else ""
    files = {file.path.removeprefix(below): file for file in listing.files if file.path.startswith(below)}
    if not files:
        raise UsageError(f"{wanted} holds no files; correct the folder's name.")
    check_names((name for name in files if name != MANIFEST_NAME), str(wanted))
    repository = {"repo_type": wanted.repo_type, "revision": listing.commit}

    def bring(name: str, path: Path, count: ByteCount) -> None:
        class Counted(silent_tqdm):
            """A bar that counts instead of being drawn."""

            def update(self, size: int | None = 1) -> None:
                count.skip(int(size))

        with hub_errors(f"{wanted}/{one_line(name)}"), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            arrived = hf_hub_download(wanted.repo_id, below + name, **repository, local_dir=folder, tqdm_class=Counted)
            os.replace(arrived, path)
        if not matches(path, files[name]):
            path.unlink()
            raise RunError(f"{wanted}/{one_line(name)} arrived with another hash than it has; run it again.")

    def keep(names: set[str]) -> Path:
        # By their endings: huggingface_hub compares every name with every pattern.
        endings = {PurePosixPath(name).suffix for name in names}
        patterns = [f"{glob.escape(below)}*{glob.escape(ending)}" for ending in sorted(endings)]
        return download(wanted.repo_id, patterns, **repository, cache_dir=None) / wanted.folder

    identities = {n: Identity(file.size, file.lfs.sha256 if file.lfs else file.blob_id) for n, file in files.items()}
    return RemoteFolder(str(replace(wanted, revision=None)), identities, bring, keep)
