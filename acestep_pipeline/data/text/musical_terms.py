"""Tempo, key and time signature as people write them, to the one spelling that the model was trained with.

The official ACE-Step 1.5 constants allow a note A to G with nothing, a sharp or a flat, `major` or `minor`
(`F# minor`), 30 to 300 beats a minute, and 2, 3, 4 or 6 beats in a bar.
"""

import re

# What the model was trained with (`timesignature` is the number of beats in a bar).
TIME_SIGNATURES = ("2", "3", "4", "6")
BPM_RANGE = (30, 300)

_ACCIDENTALS = {"": "", "#": "#", "♯": "#", "sharp": "#", "b": "b", "♭": "b", "flat": "b"}
_MODES = {"major": "major", "maj": "major", "dur": "major", "minor": "minor", "min": "minor", "moll": "minor"}
_LONG_KEY = re.compile(
    r"(?P<note>[a-g])[\s_-]*(?P<accidental>[#♯♭]|b|sharp|flat)?[\s_-]*(?P<mode>major|maj|dur|minor|min|moll)\.?", re.I
)
# `Am`, `F#m`: only so, since `am` and `em` are words.
_SHORT_KEY = re.compile(r"(?P<note>[A-G])(?P<accidental>[#♯♭b])?m")
_BARE_KEY = re.compile(r"(?P<note>[A-G])(?P<accidental>[#♯♭b])?(?P<mode>M?)")
_KEY_LABEL = re.compile(r"(?:keyscale|key\s+of|key|in\s+the\s+key\s+of)\s*[:=]?\s+|(?:keyscale|key)\s*[:=]\s*", re.I)
# Mixed In Key's Camelot wheel (8B is C major) and Traktor's Open Key (1d is C major) count fifths.
_WHEEL_KEY = re.compile(r"(?P<hour>1[0-2]|[1-9])(?P<ring>[ABdm])")
_FIFTHS_MAJOR = ("C", "G", "D", "A", "E", "B", "F#", "Db", "Ab", "Eb", "Bb", "F")
_FIFTHS_MINOR = ("A", "E", "B", "F#", "C#", "G#", "Eb", "Bb", "F", "C", "G", "D")

_BPM_TAG = re.compile(
    r"(?:bpm|tempo)\s*[:=]\s*(\d+(?:\.\d+)?)(?:\s*bpm)?|bpm\s+(\d+(?:\.\d+)?)|(\d+(?:\.\d+)?)\s*bpm", re.I
)
_SIGNATURE_TAG = re.compile(r"(?:time[\s_-]?signature\s*[:=]?\s*)?([2346])\s*/\s*[248](?:\s+time)?", re.I)


def parse_bpm(value: object) -> int | None:
    """`120`, `"119.6"`, `"96 BPM"` as a whole number in `BPM_RANGE`, or None."""
    try:
        bpm = round(float(str(value).lower().replace("bpm", "").replace(",", ".")))
    except (ValueError, OverflowError):
        return None
    return bpm if BPM_RANGE[0] <= bpm <= BPM_RANGE[1] else None


def parse_keyscale(text: str) -> str | None:
    """The content of a key field as `C minor` or `F# major`, or None where it is no major or minor key.

    A field may hold a bare note (`F#`: major, as in ID3's TKEY), `Ebm`, and the wheels of DJ programs (`8A`, `1m`).
    """
    text = _KEY_LABEL.sub("", text.strip(), count=1)
    wheel = _WHEEL_KEY.fullmatch(text)
    if wheel:
        steps = int(wheel["hour"]) - (8 if wheel["ring"] in "AB" else 1)
        minor = wheel["ring"] in "Am"
        return f"{(_FIFTHS_MINOR if minor else _FIFTHS_MAJOR)[steps % 12]} {'minor' if minor else 'major'}"
    bare = _BARE_KEY.fullmatch(text)
    if bare:
        return f"{bare['note']}{_ACCIDENTALS[bare['accidental'] or '']} major"
    return keyscale_in_tag(text)


def keyscale_in_tag(tag: str) -> str | None:
    """The key that a whole tag names (`C minor`, `c# min`, `Am`, `key: A`), or None: `E` and `minor key` name none."""
    label = _KEY_LABEL.match(tag)
    if label and label.end() < len(tag):
        return parse_keyscale(tag[label.end() :])
    found = _LONG_KEY.fullmatch(tag)
    if found:
        accidental = _ACCIDENTALS[(found["accidental"] or "").lower()]
        return f"{found['note'].upper()}{accidental} {_MODES[found['mode'].lower()]}"
    found = _SHORT_KEY.fullmatch(tag)
    return f"{found['note']}{_ACCIDENTALS[found['accidental'] or '']} minor" if found else None


def bpm_in_tag(tag: str) -> int | None:
    """The tempo that a whole tag names (`90bpm`, `90 BPM`, `bpm: 90`), or None."""
    found = _BPM_TAG.fullmatch(tag)
    return parse_bpm(next(filter(None, found.groups()))) if found else None


def timesignature_in_tag(tag: str) -> str | None:
    """The beats in a bar of a tag such as `4/4` or `6/8`, or None."""
    found = _SIGNATURE_TAG.fullmatch(tag)
    return found[1] if found else None


def parse_timesignature(text: str) -> str | None:
    """`4/4`, `4` and `4.0` as `4`; None for what the model does not know."""
    beats = text.split("/")[0].strip().removesuffix(".0")
    return beats if beats in TIME_SIGNATURES else None
