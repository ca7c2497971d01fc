"""Fetch the checkpoint that a run goes on from, and what else its output directory then needs, from where it was
published (`uploading`). Nothing here imports torch."""

import json
import os
import re
import shutil
from pathlib import Path

from ..data.text.text_files import one_line
from ..errors import UsageError
from ..files import flush_to_disk, sha256
from ..storage.copies import file_errors, is_remote
from ..storage.publishing import read_history, read_latest
from ..storage.release_manifest import CHECKPOINTS_FOLDER, Manifest
from ..storage.release_pull import pull_release
from ..storage.s3 import parse_address, shown
from ..storage.stores import open_store
from .destination import join_address
from .manifest import MANIFEST_NAME, find_damage
from .run_directory import (
    CHECKPOINT_PREFIX,
    METRICS_NAME,
    PARTIAL_PREFIX,
    STATE_NAME,
    VALIDATION_NAME,
    discard,
    list_checkpoints,
)

_STATE = re.compile(rf"({CHECKPOINT_PREFIX}(\d+))/{re.escape(STATE_NAME)}")
_CHECKPOINT = re.compile(rf"{CHECKPOINT_PREFIX}\d+")
# In the output directory while a checkpoint is fetched; a run removes what a killed one left of it.
_ARRIVING = f"{PARTIAL_PREFIX}{CHECKPOINT_PREFIX}fetched"


def fetch_checkpoint(output_dir: Path, resume_from_checkpoint: str, *, address: str | None) -> str:
    """Bring the checkpoint that is to be resumed from into `output_dir`, with the metrics up to it, if it isn't here.

    The processes of a machine may call it at the same time: the first one fetches.

    Args:
        output_dir: the run's; a checkpoint of its own that is as new counts before one that is published.
        resume_from_checkpoint: the flag: `latest`, `s3://…/latest`, `s3://…/checkpoint-<update>`, or a local one,
            with which there is nothing to do.
        address: where the run publishes; with it, `latest` is the latest of here and there.

    Returns:
        What `find_checkpoint` is to look for.

    Raises:
        UsageError: it is not there or can't be read, or `output_dir` holds another run.
        RunError: what is stored is damaged, or the connection broke.
    """
    from filelock import FileLock

    if is_remote(resume_from_checkpoint):
        run, _, wanted = resume_from_checkpoint.rstrip("/").rpartition("/")
        if wanted != "latest" and not _CHECKPOINT.fullmatch(wanted):
            raise UsageError(
                f"--resume_from_checkpoint {shown(resume_from_checkpoint)} names no checkpoint; write s3://…/latest "
                f"or s3://…/{CHECKPOINT_PREFIX}<update>."
            )
        parse_address(run)
    elif resume_from_checkpoint == "latest" and address is not None:
        run, wanted = address, "latest"
    else:
        return resume_from_checkpoint
    found = _find(run, wanted)
    if found is None and is_remote(resume_from_checkpoint):
        raise UsageError(
            f"--resume_from_checkpoint {shown(resume_from_checkpoint)}: no such checkpoint is published there; see "
            "`acestep-lora storage ls` of it."
        )
    if found is None or (not is_remote(resume_from_checkpoint) and _newest_update(output_dir) >= _update(found[2])):
        return resume_from_checkpoint
    place, release, name = found
    if not _is_here(output_dir / name, release):
        with file_errors(output_dir):
            (output_dir / _ARRIVING).mkdir(parents=True, exist_ok=True)
            with FileLock(output_dir / _ARRIVING / "lock"):
                if not _is_here(output_dir / name, release):  # another process has not brought it meanwhile
                    _fetch(place, release, name, output_dir)
    return str(output_dir / name)


def _find(run: str, wanted: str) -> tuple[str, Manifest, str] | None:
    """Where the checkpoint is published, in which release, and its name.

    With the run's other checkpoints, or by `storage push --include_checkpoints`.
    """
    for place in (join_address(run, CHECKPOINTS_FOLDER), run):
        store = open_store(place)
        latest = read_latest(store)
        if latest is None or latest[0].content is None:
            continue
        for release in [latest[0]] if wanted == "latest" else read_history(store, latest[0]):
            names = [match[1] for file in release.files if (match := _STATE.fullmatch(file.file))]
            if wanted in names or (wanted == "latest" and names):
                return place, release, max(names, key=_update) if wanted == "latest" else wanted
    return None


def _update(name: str) -> int:
    return int(name.removeprefix(CHECKPOINT_PREFIX))


def _newest_update(output_dir: Path) -> int:
    """Of the newest checkpoint here that is whole; -1 if there is none."""
    whole = (path for path in reversed(list_checkpoints(output_dir)) if find_damage(path) is None)
    newest = next(whole, None)
    return _update(newest.name) if newest else -1


def _is_here(checkpoint: Path, release: Manifest) -> bool:
    """Whether this checkpoint, whole, lies here already: its manifest has the hashes of all its files."""
    published = {file.file: file.sha256 for file in release.files}
    manifest = checkpoint / MANIFEST_NAME
    return (
        manifest.is_file()
        and sha256(manifest) == published.get(f"{checkpoint.name}/{MANIFEST_NAME}")
        and find_damage(checkpoint) is None
    )


def _fetch(place: str, release: Manifest, name: str, output_dir: Path) -> None:
    arrived = output_dir / _ARRIVING / "release"
    pull_release(
        place,
        arrived,
        version=str(release.release),
        force=True,  # in place of another one that a killed run fetched
        choose=lambda file: file.startswith(f"{name}/") or file in (METRICS_NAME, VALIDATION_NAME),
        show_progress=os.environ.get("LOCAL_RANK", "0") == "0",
    )
    if damage := find_damage(arrived / name):
        raise UsageError(f"{shown(place)}: {name} is damaged: {damage}; resume from another one.")
    _check_same_run(output_dir / METRICS_NAME, arrived / METRICS_NAME, place)
    if (output_dir / name).exists():
        discard(output_dir / name)
    for file in (METRICS_NAME, VALIDATION_NAME):
        if (arrived / file).exists():
            os.replace(arrived / file, output_dir / file)
    os.replace(arrived / name, output_dir / name)
    flush_to_disk(output_dir)
    shutil.rmtree(arrived)


def _check_same_run(here: Path, there: Path, place: str) -> None:
    """Refuse to put one run's metrics in the place of another's.

    The first update that both have is told alike in a run that moved from one machine to the other: it was made by one
    of them. Later ones may have been made by both, which may differ in the last bits.
    """
    own, other = _lines(here), _lines(there)
    first = min(own.keys() & other.keys(), default=None)
    if own and (first is None or own[first] != other[first]):
        raise UsageError(
            f"{one_line(str(here.parent))} holds another run than {shown(place)}; name another --output_dir, or a "
            "checkpoint of that run."
        )


def _lines(metrics: Path) -> dict[int, dict]:
    """The complete lines of a run's metrics by update, without times."""
    lines = {}
    if metrics.is_file():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
                lines[values["update"]] = {name: value for name, value in values.items() if name != "seconds"}
            except (ValueError, KeyError, TypeError, AttributeError):
                break
    return lines
