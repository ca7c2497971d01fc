"""The tracks to train on, and those that are held out from training for validation."""

import random
from collections import Counter, defaultdict
from pathlib import Path

from ..errors import UsageError
from ..storage.remote_folder import RemoteFolder
from .building.splits import choose_holdout
from .dataset_rows import are_dataset, disk_splits, hub_splits
from .remote_rows import remote_splits
from .track_sources import locate
from .tracks import Problem, Track, load_tracks

HELD_OUT_SPLIT = "test"


def load_train_and_held_out(
    train_data_dir: str | Path | None,
    *,
    dataset_name: str | None,
    validation_data_dir: str | Path | None,
    validation_fraction: float,
    max_validation_samples: int,
    validation_seed: int,
    min_duration_s: float,
    max_train_samples: int | None,
    seed: int,
    streaming: bool = False,
    show_progress: bool = True,
) -> tuple[list[Track], list[Track], list[Problem]]:
    """Read the training tracks, and those to validate on: of `validation_data_dir` where it is named, else of the
    dataset's split `test` where it has one, else `validation_fraction` of the tracks, else none.

    A held-out track whose audio is also trained on, byte for byte, is left out of validation.

    Args:
        validation_fraction: share of the tracks that is held out, the same of every genre; in [0, 1).
        max_validation_samples: at most so many held-out tracks are used, drawn by `validation_seed`.
        validation_seed: also which tracks `validation_fraction` holds out, whatever `seed` is.
        streaming: that of `locate`; the others are those of `load_tracks`.

    Returns:
        The training tracks, the held-out ones, and the problems found.

    Raises:
        UsageError: nothing is usable, two sources of held-out tracks are named, or the one named gives none.
    """
    where = {"streaming": streaming, "show_progress": show_progress}
    if dataset_name is None:
        train_data_dir = locate(train_data_dir, **where)
    if validation_data_dir is not None:
        validation_data_dir = locate(validation_data_dir, **where)
    how = {"min_duration_s": min_duration_s, "show_progress": show_progress}
    tracks, problems = load_tracks(
        train_data_dir, dataset_name=dataset_name, max_train_samples=max_train_samples, seed=seed, **how
    )
    splits = splits_of(train_data_dir) if dataset_name is None else hub_splits(dataset_name)
    held_out: list[Track] = []
    if validation_data_dir is not None:
        split = HELD_OUT_SPLIT if HELD_OUT_SPLIT in splits_of(validation_data_dir) else "train"
        held_out, found = load_tracks(validation_data_dir, split=split, **how)
        problems += found
    elif HELD_OUT_SPLIT in splits:
        if validation_fraction:
            raise UsageError(
                f"the dataset has a split {HELD_OUT_SPLIT!r}, which is held out as it is: leave --validation_fraction "
                "away, or name other tracks with --validation_data_dir."
            )
        held_out, found = load_tracks(train_data_dir, dataset_name=dataset_name, split=HELD_OUT_SPLIT, **how)
        problems += found
    elif validation_fraction:
        tracks, held_out = hold_out(tracks, validation_fraction, seed=validation_seed)
    trained_on = {track.sha256 for track in tracks}
    problems += [
        Problem(f"{track.id} (held out)", "the same audio is trained on: it is no held-out track", skipped=True)
        for track in held_out
        if track.sha256 in trained_on
    ]
    asked_for = bool(held_out)
    held_out = [track for track in held_out if track.sha256 not in trained_on]
    if asked_for and not held_out:
        raise UsageError("every held-out track is also trained on; name others with --validation_data_dir.")
    if len(held_out) > max_validation_samples:
        chosen = set(random.Random(validation_seed).sample(range(len(held_out)), max_validation_samples))
        held_out = [track for index, track in enumerate(held_out) if index in chosen]
    return tracks, held_out, problems


def splits_of(place: Path | RemoteFolder) -> tuple[str, ...]:
    """The splits of a dataset; none for a folder of music."""
    if isinstance(place, RemoteFolder):
        return remote_splits(place) if are_dataset(place.files) else ()
    return disk_splits(place)


def hold_out(tracks: list[Track], fraction: float, *, seed: int) -> tuple[list[Track], list[Track]]:
    """Split whole tracks, the same share of every genre; copies of one file stay together.

    Genres of one track share as if they were one genre. The choice depends on the audio and `seed` alone.

    Returns:
        The tracks to train on, and those held out, each in their order.

    Raises:
        UsageError: there are too few tracks to hold one out.
    """
    sizes = Counter(track.genre for track in tracks)
    keyed = [(track.genre if sizes[track.genre] > 1 else "", f"{seed}/{track.sha256}") for track in tracks]
    copies = defaultdict(list)
    for index, track in enumerate(tracks):
        copies[track.sha256].append(index)
    held = choose_holdout(keyed, fraction, [group for group in copies.values() if len(group) > 1])
    if not held:
        raise UsageError(
            f"--validation_fraction {fraction:g} of {len(tracks)} tracks holds none out, since every genre keeps one "
            "to train on; add tracks, or name a folder with --validation_data_dir."
        )
    return (
        [track for index, track in enumerate(tracks) if index not in held],
        [track for index, track in enumerate(tracks) if index in held],
    )
