"""Which tracks are held out, and how often each of the others is heard: pure functions of what is known."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence


def sampling_weights(genres: Sequence[str], repeats: Sequence[int], balance: float) -> list[float]:
    """Mean visits an epoch of each track for one of its repeats, so that a small genre is not drowned by a large one.

    A genre of `n` tracks (one of three repeats counts as three) gets a share of the epoch proportional to
    `n ** (1 - balance)`: 0 leaves every repeat at one visit, 1 gives every genre the same share, 0.5 the square
    root's (the temperature sampling of multilingual models: Arivazhagan et al. 2019, arXiv:1907.05019, section 4.2).

    Args:
        genres: of each track; tracks without one are a genre of their own.
        repeats: of each track.
        balance: in [0, 1].

    Returns:
        Weights in the order of `genres`; over all repeats of all tracks their mean is 1.
    """
    counts: Counter[str] = Counter()
    for genre, times in zip(genres, repeats, strict=True):
        counts[genre] += times
    shares = {genre: count ** (1 - balance) for genre, count in counts.items()}
    total = math.fsum(shares.values())
    return [sum(repeats) * shares[genre] / total / counts[genre] for genre in genres]


def choose_holdout(tracks: Sequence[tuple[str, str]], share: float, groups: Sequence[Sequence[int]] = ()) -> set[int]:
    """Indices of the tracks to hold out, the same share of every genre, the same tracks every time.

    `share` of all tracks (at least one) is dealt out to the genres by largest remainders; every genre keeps a track
    to train on. Within a genre the order is by a hash of the content, so that adding a track moves few others.

    Args:
        tracks: (genre, hash of the content) of each.
        share: in [0, 1).
        groups: tracks that must not be torn apart (near-duplicates of one another).
    """
    if not share or len(tracks) < 2:
        return set()
    wanted = max(1, math.floor(share * len(tracks) + 0.5))
    together = {index: tuple(sorted(group)) for group in groups for index in group}
    by_genre: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for index, (genre, _) in enumerate(tracks):
        group = together.get(index, (index,))
        if index == group[0]:  # a group that spans genres counts where its first track does
            by_genre[genre].append(group)
    sizes = {genre: sum(map(len, units)) for genre, units in by_genre.items()}
    quotas = {genre: wanted * size / len(tracks) for genre, size in sizes.items()}
    seats = {genre: math.floor(quota) for genre, quota in quotas.items()}
    for genre in sorted(quotas, key=lambda genre: (seats[genre] - quotas[genre], genre))[
        : wanted - sum(seats.values())
    ]:
        seats[genre] += 1
    held: set[int] = set()
    for genre, units in by_genre.items():
        room = min(seats[genre], sizes[genre] - 1)
        for unit in sorted(units, key=lambda unit: hashlib.sha256(f"holdout/{tracks[unit[0]][1]}".encode()).digest()):
            if len(unit) <= room:
                held.update(unit)
                room -= len(unit)
    return held
