"""Acoustic fingerprints: find the same recording under another name, also after re-encoding.

The method is that of J. Haitsma and T. Kalker, "A Highly Robust Audio Fingerprinting System" (ISMIR 2002): signs of
differences of band energies along time and frequency, 32 of them a word, matched through an index of whole words and
confirmed by the share of equal bits. (Chromaprint, the usual library, has no packages for Python's index that bring
the library along, so this is our own code, and its fingerprints are of a kind of their own.)

Measured on eight tracks (ambient, rock; up to 150 s of each) that no setting was chosen on, the share of equal bits of
a copy was at least 0.99 at -6 dB or as 22.05 kHz mono, 0.90 as Opus or MP3 at 64 kbit/s, and 0.86 as such an MP3 with
3 s and half a hop (the worst place) cut off; every copy was found. Of 113 full-length tracks in six styles, two pairs
were reported, both versions of one piece by their names ("theme1" and "theme1 raw" 0.85, "ambient" and "tech battle"
0.74). `SIMILAR`, 0.7, lies between. A change of speed or pitch makes another recording.
"""

import base64
from collections.abc import Iterable

import numpy as np
import soxr

from ..audio import SAMPLE_RATE

WORDS_PER_S = 8
# Share of equal bits from which two tracks are the same recording, over an overlap of at least `MIN_OVERLAP`.
SIMILAR = 0.7
MIN_OVERLAP = 0.6

_RATE = 6_000
_HOP = _RATE // WORDS_PER_S
_FRAME = 3_072
# Frames that are summed before and after a moment. More makes words last longer: safer against a shift by half a hop,
# less telling.
_SPREAD = 4
_BANDS = 33
_LOWEST_HZ, _HIGHEST_HZ = 300.0, 2_000.0
_EDGES = np.round(np.geomspace(_LOWEST_HZ, _HIGHEST_HZ, _BANDS + 1) * _FRAME / _RATE).astype(int)
# Energy of a frame's band (in the units of its windowed spectrum) below which it says nothing: under -100 dBFS.
_SILENCE = 1e-4
_NEIGHBOURS = 8
# Either of two overlapping parts of a word must be equal, twice, for two tracks to be compared. Whole words miss
# copies that are short and half a hop off; shorter parts make chance votes grow with the tracks' number squared.
_PART_BITS = 24
_PART_SHIFTS = (0, 8)
_PLACE_BITS = 40
_MIN_WORDS = 5 * WORDS_PER_S
# Of a larger collection (this is 145 hours) only a share of the parts is indexed, the same in every track, so that
# memory stays bounded: of a track of minutes that is still many parts.
_MAX_INDEXED = 1 << 22


class Fingerprinter:
    """Makes a fingerprint of blocks `[2, n]` at a rate in Hz, in memory that stays flat."""

    def __init__(self, sample_rate: int):
        self._resampler = soxr.ResampleStream(sample_rate, _RATE, 1, dtype="float32", quality="HQ")
        self._window = np.hanning(_FRAME).astype(np.float32)
        self._rest = np.empty(0, np.float32)
        self._energies: list[np.ndarray] = []

    def add(self, block: np.ndarray) -> None:
        """Hear what comes next."""
        self._add(self._resampler.resample_chunk(block[0] + block[1]))

    def _add(self, mono: np.ndarray) -> None:
        """Take the band energies of every whole frame, and keep what the next one begins with."""
        from scipy.fft import rfft

        rest = np.concatenate([self._rest, mono])
        count = max(0, (len(rest) - _FRAME) // _HOP + 1)
        if count:
            frames = np.lib.stride_tricks.sliding_window_view(rest, _FRAME)[: count * _HOP : _HOP]
            bins = rfft(frames * self._window)[:, : _EDGES[-1]]
            power = np.square(bins.real) + np.square(bins.imag)
            self._energies.append(np.add.reduceat(power, _EDGES[:-1], axis=1))
        self._rest = rest[count * _HOP :]

    def words(self) -> np.ndarray:
        """The fingerprint of all that was heard: uint32 `[words]`, `WORDS_PER_S` a second; 0 is said of silence."""
        self._add(self._resampler.resample_chunk(np.empty(0, np.float32), last=True))
        if not self._energies:
            return np.empty(0, np.uint32)
        energies = np.concatenate(self._energies)
        if len(energies) < 2 * _SPREAD:
            return np.empty(0, np.uint32)
        windows = np.lib.stride_tricks.sliding_window_view
        level = windows(np.log(energies + _SILENCE), _SPREAD, axis=0).sum(axis=-1)
        across = np.diff(level, axis=1)
        bits = across[_SPREAD:] > across[:-_SPREAD]
        words = np.packbits(bits, axis=1).view(">u4")[:, 0].astype(np.uint32)
        words[windows(energies.max(axis=1), 2 * _SPREAD).max(axis=1) < 10 * _SILENCE] = 0
        return words


def fingerprint(blocks: Iterable[np.ndarray], *, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """The fingerprint of a waveform in blocks `[2, n]`: uint32 `[words]`, about 32 bytes a second."""
    printer = Fingerprinter(sample_rate)
    for block in blocks:
        printer.add(block)
    return printer.words()


def encode(words: np.ndarray) -> str:
    """A fingerprint as base64 of its little-endian words, for JSON."""
    return base64.b64encode(words.astype("<u4").tobytes()).decode("ascii")


def decode(text: str) -> np.ndarray:
    """The fingerprint that `encode` wrote. Raises `ValueError` where it is none."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<u4").astype(np.uint32)


def find_near_duplicates(fingerprints: dict[str, np.ndarray]) -> list[tuple[str, str, float]]:
    """Pairs of tracks that hold the same recording, as (id, id, share of equal bits), in the order of the dict.

    Of many copies of one recording, each is paired with at least one that comes before it, not with all of them. A
    pair needs the same recording at the same speed over `MIN_OVERLAP` of the shorter track, and 5 s at least.
    """
    ids, prints = list(fingerprints), list(fingerprints.values())
    found = []
    for first, second, offset in _candidates(prints):
        similarity = _similarity(prints[first], prints[second], offset)
        if similarity >= SIMILAR:
            found.append((first, second, similarity))
    best: dict[tuple[int, int], float] = {}
    for first, second, similarity in found:
        best[first, second] = max(similarity, best.get((first, second), 0.0))
    return [(ids[a], ids[b], round(similarity, 4)) for (a, b), similarity in sorted(best.items())]


def _candidates(prints: list[np.ndarray]) -> list[tuple[int, int, int]]:
    """(track, later track, offset in words) that share parts of words: Haitsma and Kalker's index, as sorts.

    Every part is compared with the `_NEIGHBOURS` that follow it among its equals, so that words which are everywhere
    (a drone, a metronome) cost no more than others.
    """
    starts = np.concatenate([[0], np.cumsum([len(words) for words in prints], dtype=np.int64)])
    if starts[-1] < 2:
        return []
    if starts[-1] >= 1 << _PLACE_BITS:
        raise ValueError(f"more than {(1 << _PLACE_BITS) / WORDS_PER_S / 3600:.0f} hours of music at once")
    words = np.concatenate(prints)
    # The most by which one place can lie after another in its track.
    span = 2 * max(len(words) for words in prints) + 3
    votes = [_votes(words, starts, shift, span) for shift in _PART_SHIFTS]
    keys = _elect(np.concatenate(votes))
    pair, offset = keys // span, keys % span - span // 2
    return list(zip((pair // len(prints)).tolist(), (pair % len(prints)).tolist(), offset.tolist(), strict=True))


def _votes(words: np.ndarray, starts: np.ndarray, shift: int, span: int) -> np.ndarray:
    """One number for each two tracks and offset at which the part of `_PART_BITS` from bit `shift` on is equal."""
    part = (words >> np.uint32(shift)) & np.uint32((1 << _PART_BITS) - 1)
    # The part in the upper bits, its place in the lower: one sort brings equals together, in the order of tracks.
    share = -(-len(words) // _MAX_INDEXED)
    # Knuth's multiplicative hash (The Art of Computer Programming 3, 6.4) makes the share an even one.
    indexed = np.flatnonzero((words != 0) & ((part * np.uint32(2654435769) >> np.uint32(8)) % np.uint32(share) == 0))
    index = part[indexed].astype(np.uint64) << np.uint64(_PLACE_BITS) | indexed.astype(np.uint64)
    index.sort()
    part = (index >> np.uint64(_PLACE_BITS)).astype(np.uint32)
    place = (index & np.uint64((1 << _PLACE_BITS) - 1)).astype(np.int64)
    del index
    track = (np.searchsorted(starts, place, side="right") - 1).astype(np.int32)
    within = (place - starts[track]).astype(np.int32)
    del place
    votes = []
    for step in range(1, _NEIGHBOURS + 1):
        here = np.flatnonzero((part[step:] == part[:-step]) & (track[step:] != track[:-step]))
        pair = track[here].astype(np.int64) * (len(starts) - 1) + track[here + step]
        votes.append(pair * span + (within[here + step] - within[here] + span // 2))
    return np.concatenate(votes)


def _elect(votes: np.ndarray) -> np.ndarray:
    """Of votes, those that another one confirms, with the same offset or one beside it. Sorts `votes` in place."""
    votes.sort()
    close = np.diff(votes) <= 1
    confirmed = np.concatenate([close, [False]]) | np.concatenate([[False], close])
    return np.unique(votes[confirmed[: len(votes)]])


def _similarity(first: np.ndarray, second: np.ndarray, offset: int) -> float:
    """Share of equal bits where both sound, `second` being `offset` words late; 0 where they overlap too little."""
    begin, end = max(0, -offset), min(len(first), len(second) - offset)
    if end <= begin:
        return 0.0
    a, b = first[begin:end], second[begin + offset : end + offset]
    sounding = (a != 0) & (b != 0)
    shorter = min(np.count_nonzero(first), np.count_nonzero(second))
    heard = int(sounding.sum())
    if heard < max(_MIN_WORDS, MIN_OVERLAP * shorter):
        return 0.0
    return 1 - float(np.bitwise_count(a ^ b)[sounding].sum()) / (32 * heard)
