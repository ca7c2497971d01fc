"""Timed lyrics (LRC): the words that are sung in a window of the song. Pure text.

The format is https://en.wikipedia.org/wiki/LRC_(file_format): `[mm:ss.xx]` before a line, several of them before a
line that returns, `<mm:ss.xx>` before its words, `[ar:...]` and the like about the song, `[offset:ms]` to move all
stamps (a positive one makes them earlier). Structure tags such as `[Chorus]`, with a stamp or without, belong with the
words that come next.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import takewhile

from ...prompt_fields import INSTRUMENTAL

# A line is sung until the next stamp, but not on through a solo: nobody sings one for longer than this.
LONGEST_LINE_S = 10.0
_STAMP = re.compile(r"\[\s*([0-9]{1,3}):([0-5]?[0-9])(?:[.,:]([0-9]{1,3}))?\s*\]\s*")
# Stamps of words, and what was meant as a stamp but names no time.
_ANY_STAMP = re.compile(r"[<\[]\s*[-+]?[0-9]+:[0-9.,:]*\s*[>\]]")
_ID_TAG = re.compile(
    r"\[\s*(?:al|ar|au|author|by|encoding|hash|id|la|language|length|lr|offset|re|ti|tool|total|ve|version|#)\s*:.*\]",
    re.IGNORECASE,
)
_OFFSET = re.compile(r"\[\s*offset\s*:\s*([-+]?[0-9]{1,9})\s*\]", re.IGNORECASE)
_STRUCTURE_TAG = re.compile(r"(\[[^\[\]]+\])\s*")


@dataclass(frozen=True)
class _Line:
    """What is sung from `start_s` to `end_s`, in seconds: `text` after the (start_s, structure tag)s before it."""

    start_s: float
    end_s: float
    tags: tuple[tuple[float, str], ...]
    text: tuple[str, ...]


def is_timed(text: str) -> bool:
    """Whether these lyrics have stamps: at least two lines that begin with one."""
    return sum(_STAMP.match(line) is not None for line in _file_lines(text)) >= 2


def cut_to_window(text: str, start_s: float, end_s: float, *, song_s: float) -> str:
    """The lyrics of the window from `start_s` to `end_s` of a song that is `song_s` long, without any stamps.

    A line sounds from its stamp to the next one, to the end of the song, or for `LONGEST_LINE_S`, whichever comes
    first. It is in the window if at least half of it sounds there or if it fills half of the window, so every line is
    in one of the windows that together cover the song. The structure tag in force is repeated at the top.

    Returns:
        The lines that are in the window, `[Instrumental]` if none is. Lyrics that aren't timed come back as they are.
    """
    if not is_timed(text):
        return text
    kept: list[str] = []
    words, section = False, None
    for line in _parse(text, song_s):
        if _sounds(line, start_s, end_s):
            tags = [tag for begin_s, tag in line.tags if kept or begin_s >= start_s]
            if not kept and not tags:
                tags = [line.tags[-1][1]] if line.tags else [section] if section else []
            kept += [*tags, *line.text]
            words = words or bool(line.text)
        for tag in (*(tag for _, tag in line.tags), *filter(_is_tag, line.text)):
            section = tag
    return "\n".join(kept) if words else INSTRUMENTAL


def lines_beyond(text: str, song_s: float) -> int:
    """How many timed lines begin when a song of `song_s` seconds is over; such lyrics belong to another version."""
    return sum(bool(line.text) and line.start_s >= song_s for line in _parse(text, song_s)) if is_timed(text) else 0


def _sounds(line: _Line, start_s: float, end_s: float) -> bool:
    overlap_s = min(line.end_s, end_s) - max(line.start_s, start_s)
    shorter_s = min(line.end_s - line.start_s, end_s - start_s)
    # Exactly half is enough, whatever the rounding of the stamps.
    return overlap_s > 0 and 2 * overlap_s >= shorter_s - 1e-6


def _is_tag(text: str) -> bool:
    return _STRUCTURE_TAG.fullmatch(text) is not None


def _parse(text: str, song_s: float) -> list[_Line]:
    """The lines in the order in which they are sung; those without words are the tags at the very end."""
    blocks = _blocks(text)
    starts = sorted({start_s for start_s, _ in blocks})
    lines: list[_Line] = []
    pending: list[tuple[float, str]] = []

    def add(start_s: float, body: list[str]) -> None:
        following = bisect_right(starts, start_s)
        next_s = starts[following] if following < len(starts) else song_s
        longest_s = LONGEST_LINE_S * max(1, sum(not _is_tag(part) for part in body))
        end_s = min(next_s, song_s, start_s + longest_s)
        lines.append(_Line(start_s, end_s, tuple(pending), tuple(body)))
        pending.clear()

    for start_s, body in sorted(blocks, key=lambda block: block[0]):
        leading = list(takewhile(_is_tag, body))
        pending += [(start_s, tag) for tag in leading]
        if len(leading) < len(body):
            add(start_s, body[len(leading) :])
    if pending:
        add(pending[0][0], [])
    return lines


def _blocks(text: str) -> list[tuple[float, list[str]]]:
    """(start in seconds, structure tags and words) of every stamp, in the order of the file.

    Words without a stamp go on with the line before them; the first ones start with the song.
    """
    offset_s = 0.0
    body: list[str] = []
    blocks = [(0.0, body)]
    tags: list[str] = []
    for line in _file_lines(text):
        if offset := _OFFSET.fullmatch(line):
            offset_s = int(offset[1]) / 1000
        stamps, line = _leading(_STAMP, line)
        if _ID_TAG.fullmatch(line):
            continue
        found, words = _leading(_STRUCTURE_TAG, " ".join(_ANY_STAMP.sub("", line).split()))
        tags += [tag[1] for tag in found]
        if stamps:
            body = []  # of all the times at which this line returns
            blocks += [(_seconds(stamp), body) for stamp in stamps]
        if stamps or words:
            body += [*tags, words] if words else tags
            tags = []
    body += tags
    return [(max(0.0, start_s - offset_s), body) for start_s, body in blocks]


def _file_lines(text: str) -> list[str]:
    return [line.strip() for line in text.removeprefix("\ufeff").splitlines()]


def _leading(pattern: re.Pattern, line: str) -> tuple[list[re.Match], str]:
    """All matches that `line` begins with, and what comes after them."""
    found, end = [], 0
    while match := pattern.match(line, end):
        found.append(match)
        end = match.end()
    return found, line[end:]


def _seconds(stamp: re.Match) -> float:
    return 60 * int(stamp[1]) + int(stamp[2]) + float(f"0.{stamp[3] or 0}")
