"""What lies under an `s3://` address, as files of a folder: objects by their keys, releases by their manifests."""

import re
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from ..data.text.text_files import one_line
from ..errors import RunError, UsageError
from .release_manifest import (
    CONTENT_FOLDER,
    HISTORY_FOLDER,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    PROBE_KEY,
    Manifest,
    parse_manifest,
)
from .s3 import RemoteFile, list_folder, open_client, parse_address, read_object, s3_errors, shown

# What a pull keeps in the folder: index.json, a lock, and partial/ with the downloads under way.
PULL_FOLDER = ".ace-step-pull"
# A release may come between a listing and the reading of its manifest.
_LISTINGS = 3
_CONTENT = re.compile(rf"(.*/)?{CONTENT_FOLDER}/[0-9a-f]{{64}}", re.DOTALL)


def list_objects(url: str) -> list[RemoteFile]:
    """Every object under `s3://bucket/prefix`, taken as a folder (`a` does not take `ab/`), in the order of the keys.

    Raises `UsageError` where boto3 is missing or the bucket can't be read.
    """
    bucket, folder = parse_address(url)
    with s3_errors(url):
        return list_folder(open_client(1), bucket, folder)


def list_names(url: str) -> list[str]:
    """The names of the files under `s3://bucket/prefix`, relative to it, as `storage.pull` makes them.

    Raises as `list_objects`, and as `list_files`.
    """
    with s3_errors(url):
        return list(list_files(open_client(1), url, parse_address(url)[1]))


def list_files(client: Any, url: str, root_key: str) -> dict[str, RemoteFile]:
    """The objects under `url` by the name of their file, relative to `root_key` ("" or ending in /); of a release
    (`publishing`), the files that its manifest names. Call it within `s3_errors`.

    Raises:
        UsageError: a key or a name in a manifest is not safe.
        RunError: the content of a release is not there.
    """
    bucket, folder = parse_address(url)
    for _ in range(_LISTINGS):
        wanted = file_names(url, list_folder(client, bucket, folder), root_key)
        lacking = []
        for above in sorted({match[1] or "" for name in wanted if (match := _CONTENT.fullmatch(name))}):
            manifest = wanted.get(f"{above}{MANIFEST_NAME}")
            if manifest is not None:
                lacking += _show_release(wanted, above, _read_manifest(client, bucket, manifest))
        if not lacking:
            return wanted
    raise RunError(f"{shown(url)}: the content of {one_line(lacking[0])} is not what its {MANIFEST_NAME} names.")


def _show_release(wanted: dict[str, RemoteFile], above: str, manifest: Manifest) -> list[str]:
    """Put a release's files, below the folder `above`, in the place of the objects of which it consists.

    Returns the names of those whose content isn't there.
    """
    if manifest.content is None:
        return []
    inside = {name.removeprefix(above): file for name, file in wanted.items() if name.startswith(above)}
    for key in inside:
        if key.startswith((f"{CONTENT_FOLDER}/", f"{HISTORY_FOLDER}/")) or key == PROBE_KEY:
            del wanted[above + key]
    lacking = []
    for file in manifest.files:
        found = inside.get(manifest.key(file))
        if found is None or found.size != file.size:
            lacking.append(above + file.file)
        else:
            wanted[above + file.file] = replace(found, sha256=file.sha256)
    return lacking


def _read_manifest(client: Any, bucket: str, file: RemoteFile) -> Manifest:
    where = f"s3://{bucket}/{one_line(file.key)}"
    found = read_object(client, bucket, file.key, max_bytes=MAX_MANIFEST_BYTES)
    if found is None:
        raise RunError(f"{where} was removed meanwhile; run it again.")
    return parse_manifest(found[0], where)


def file_names(url: str, objects: list[RemoteFile], root_key: str) -> dict[str, RemoteFile]:
    """The objects by the relative name of their file; refused, all of them, if one has no safe name of its own."""
    wanted = {}
    for file in objects:
        name = file.key[len(root_key) :]
        if (name.endswith("/") and not file.size) or PULL_FOLDER in name.split("/"):
            continue
        # As a path it must be the same parts: no empty or "." ones, no leading /, on Windows no \ and no drive.
        if PurePath(name).parts != tuple(name.split("/")) or ".." in name.split("/") or "\0" in name:
            raise UsageError(f"{shown(url)}: the key {one_line(file.key)!r} is no safe file name; rename the object.")
        wanted[name] = file
    folders = {parent.as_posix() for name in wanted for parent in PurePath(name).parents}
    if both := sorted(folders & wanted.keys()):
        raise UsageError(f"{shown(url)}: {one_line(both[0])} is a file and a folder at once; rename one of them.")
    return wanted
