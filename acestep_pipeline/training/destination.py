"""Where a run is published: the adapter at an address, the checkpoints below it; refused early where that can't be.

Nothing here imports torch.
"""

from pathlib import Path

from ..errors import UsageError
from ..paths import probe_writable
from ..storage.copies import file_errors, is_remote
from ..storage.publishing import check_target
from ..storage.release_manifest import CHECKPOINTS_FOLDER
from ..storage.s3 import shown


def join_address(address: str, folder: str) -> str:
    """The address of a folder ("" for itself) below another."""
    return f"{address.rstrip('/')}/{folder}" if folder else address


def check_destination(address: str, *, may_exist: bool) -> dict[str, int]:
    """Refuse, before anything is loaded, an address that the run could not publish to.

    Args:
        address: `s3://bucket/name` or a folder.
        may_exist: whether releases may be there already, which are added to.

    Returns:
        The number of the latest release (0: none) of the adapter, under "", and of the checkpoints.

    Raises:
        UsageError: a release is there, or the place is taken otherwise, or S3 or the file system refuses.
        RunError: the connection broke.
    """
    found = {}
    for folder in ("", CHECKPOINTS_FOLDER):
        place = join_address(address, folder)
        if not is_remote(place):
            with file_errors(Path(place).expanduser()):
                probe_writable(Path(place).expanduser())
        latest = check_target(place)
        if latest is not None and not may_exist:
            raise UsageError(
                f"{shown(place)} is published already (release {latest.release}, {latest.created}); continue that run "
                "with --resume_from_checkpoint latest, add releases to it with --overwrite_output_dir, or name "
                "another address."
            )
        found[folder] = latest.release if latest else 0
    return found
