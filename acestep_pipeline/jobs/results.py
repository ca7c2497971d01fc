"""A job's results: published on S3 and linked, or handed back in the answer where they are small.

A link holds for whoever has it, so that one is given to who asked for the job and written down nowhere else.
"""

import base64
from pathlib import Path

from ..errors import UsageError
from ..storage.publishing import publish
from ..storage.s3 import parse_address, s3_errors
from ..storage.stores import open_store

# What RunPod's and Lambda's answers hold (20 and 6 MB), less the third that base64 adds.
MAX_INLINE_BYTES = 4_000_000
MAX_LINKS = 200


def publish_results(directory: Path, address: str, *, valid_s: int, message: str | None = None) -> dict:
    """Publish the files of a folder as a release at an `s3://` address.

    Returns:
        The address, the release's number, and `files`: each with name, size, SHA-256, and a link that downloads it
        without credentials for `valid_s` seconds (of the first 200).

    Raises:
        UsageError, RunError: as `publish`.
    """
    published = publish(directory, address, message=message, force=True, show_progress=False)
    bucket, folder = parse_address(address)
    files = []
    with s3_errors(address):
        client = _signing_client()
        for file in published.manifest.files[:MAX_LINKS]:
            wanted = {
                "Bucket": bucket,
                "Key": f"{folder}{published.manifest.key(file)}",
                "ResponseContentDisposition": f'attachment; filename="{_plain(file.file)}"',
            }
            url = client.generate_presigned_url("get_object", Params=wanted, ExpiresIn=valid_s)
            files.append({"file": file.file, "size": file.size, "sha256": file.sha256, "url": url})
    return {
        "address": address,
        "release": published.manifest.release,
        "links_valid_s": valid_s,
        "num_files": len(published.manifest.files),
        "files": files,
    }


def _signing_client():
    """A client whose links are signed with version 4; botocore's default for links is version 2, which is not taken
    by every server any more."""
    import botocore.session
    from botocore.config import Config

    return botocore.session.Session().create_client("s3", config=Config(signature_version="s3v4"))


def _plain(name: str) -> str:
    """A file's own name as a header takes it."""
    return "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "_" for one in Path(name).name)


def check_can_publish(address: str) -> None:
    """Refuse an address that can't be written, before the work is done.

    Raises:
        UsageError: it can't, or the server heeds no conditions.
    """
    open_store(address).check_conditional_writes()


def inline_results(directory: Path) -> dict:
    """The files of a folder as base64.

    Raises:
        UsageError: they are too large for an answer.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    if size > MAX_INLINE_BYTES:
        raise UsageError(
            f"the results have {size / 1e6:.1f} MB, more than the {MAX_INLINE_BYTES / 1e6:.0f} MB that an answer "
            "holds; name an upload, s3://bucket/folder (or a shorter duration_s, fewer variations, format ogg)."
        )
    return {
        "files": [
            {
                "file": path.relative_to(directory).as_posix(),
                "size": path.stat().st_size,
                "base64": base64.b64encode(path.read_bytes()).decode(),
            }
            for path in files
        ]
    }


def without_links(result: dict) -> dict:
    """A result as it may be written into a log: no links, and no files."""
    files = result.get("results", {}).get("files")
    if files is None:
        return result
    hidden = [{name: value for name, value in file.items() if name not in ("url", "base64")} for file in files]
    return {**result, "results": {**result["results"], "files": hidden}}
