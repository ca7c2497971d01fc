"""Names of what is published, and the addresses below one root that they stand for."""

import os
import re

from ..data.text.text_files import one_line
from ..errors import UsageError
from ..paths import check_addresses
from .copies import is_remote
from .hub_address import is_on_hub

ROOT_VARIABLE = "ACESTEP_S3_ROOT"
# The layout below the root: what a name begins with.
KINDS = ("models", "lora", "datasets", "trajectories", "results")
_PART = r"[^\W_][\w.+-]{0,99}"
_RESERVED = {"content", "releases", "manifest.json"}


def is_address(name: str) -> bool:
    """Whether it is a whole address (`s3://…` or a path) rather than a name."""
    return is_remote(name) or name.startswith(("/", "./", "../", "~")) or name in (".", "..")


def address_of(name: str, *, partly: bool = False) -> str:
    """The address that a name stands for: itself if it is one (`s3://…` or a path), else below the root.

    Args:
        partly: whether a part of a name, or none, will do.

    Raises:
        UsageError: it is no name, or the root is not set.
    """
    root = os.environ.get(ROOT_VARIABLE)
    check_addresses(name, root)
    if is_on_hub(name):
        raise UsageError(
            f"{one_line(name)} is on the Hub, which keeps the history and checks the content itself: only push, pull, "
            "sync and ls go there."
        )
    if is_address(name):
        return name
    parts = name.strip("/").split("/") if name.strip("/") else []
    wrong = [part for part in parts if not re.fullmatch(_PART, part) or part.lower() in _RESERVED]
    if wrong or (parts and parts[0] not in KINDS) or (len(parts) < 2 and not partly):
        kinds = ", ".join(f"{kind}/" for kind in KINDS)
        raise UsageError(
            f"{one_line(name)!r} is no name to publish under: write {kinds} and then letters, digits and . _ + -, "
            "e.g. lora/my-adapter; or a whole address (s3://bucket/…, /a/folder, ./folder)."
        )
    if not root:
        raise UsageError(
            f"{ROOT_VARIABLE} is not set: set it to s3://your-bucket (or a shared folder), or give a whole address "
            "instead of a name."
        )
    return "/".join([root.rstrip("/"), *parts])
