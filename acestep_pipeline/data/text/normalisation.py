"""From a raw record of text fields to the fields of `Track`, every value in one spelling.

Nothing here raises for what a user wrote: a value that can't be used is left out with a warning. What has been
normalised once stays as it is when it is normalised again, so that a dataset reads back as it was built.
"""

import math
import re
import unicodedata

from ...prompt_fields import INSTRUMENTAL
from .languages import UNKNOWN, detect_language, normalise_language
from .musical_terms import (
    BPM_RANGE,
    bpm_in_tag,
    keyscale_in_tag,
    parse_bpm,
    parse_keyscale,
    parse_timesignature,
    timesignature_in_tag,
)

# More descriptors than this don't fit into the 256 tokens that the model reads.
MANY_TAGS = 50
MAX_REPEATS = 1000
TAG_POSITIONS = ("prepend", "append", "replace")
RIGHTS_FIELDS = ("title", "artist", "rights_holder", "isrc", "license", "source")
TEXT_FIELDS = {"tags", "lyrics", "language", "genre", "bpm", "keyscale", "timesignature"}

_SEPARATORS = re.compile(r"[,;\n，、；]")
_BULLETS = "#*•·-–— "
_LINE_ENDS = re.compile(r"\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_INSTRUMENTAL = re.compile(r"[\[({<（【\s]*(?:instrumental|inst\.?|no (?:vocals|lyrics))[\])}>）】\s]*", re.I)
_NOTHING = {"", "n/a", "na", "none", "null", "nan", "unknown", "auto", "-", "?"}
_ISRC = re.compile(r"[A-Z]{2}[A-Z0-9]{3}[0-9]{7}")  # ISO 3901: country, registrant, year, designation
_MAX_RIGHTS_CHARS = 1000


def normalise_text(record: dict) -> tuple[dict, list[str]]:
    """The text fields of `Track` from a raw record, with a warning for each value that had to be left out.

    Where there are no tags, the genre stands in their place.

    Returns:
        `TEXT_FIELDS`, `machine_made`, `sampling_weight`, `repeats`, and the trigger word and its position (each may be
        empty), and the warnings.
    """
    warnings: list[str] = []
    genre = _line(record.get("genre"))
    fields = {
        "bpm": _bpm(record.get("bpm"), warnings),
        "keyscale": _keyscale(record.get("keyscale"), warnings),
        "timesignature": _timesignature(record.get("timesignature"), warnings),
    }
    tags = _take_terms(split_tags(_text(record.get("tags"))), fields, warnings)
    if not tags:
        tags = _take_terms(split_tags(genre), fields, warnings)
    if len(tags) > MANY_TAGS:
        warnings.append(f"it has {len(tags)} tags, of which the model reads about the first {MANY_TAGS}; name fewer")
    lyrics = normalise_lyrics(_text(record.get("lyrics")))
    language = normalise_language(_line(record.get("language")))
    machine_made = set(_machine_made(record.get("machine_made")))
    if language == UNKNOWN:
        language = detect_language(lyrics)
        if language != UNKNOWN:
            machine_made.add("language")
    return {
        "tags": ", ".join(tags),
        "lyrics": lyrics,
        "language": language,
        "genre": genre,
        **fields,
        "trigger_word": normalise_tags(_line(record.get("trigger_word"))),
        "trigger_position": _trigger_position(record.get("trigger_position"), warnings),
        "machine_made": tuple(sorted(machine_made)),
        "sampling_weight": _weight(record.get("sampling_weight"), warnings),
        "repeats": _repeats(record.get("repeats"), warnings),
    }, warnings


def normalise_rights(record: dict) -> tuple[dict[str, str], list[str]]:
    """`RIGHTS_FIELDS`, each one line of text, and warnings. An ISRC has twelve characters and no hyphens."""
    warnings: list[str] = []
    rights = {field: _line(record.get(field))[:_MAX_RIGHTS_CHARS].strip() for field in RIGHTS_FIELDS}
    if rights["isrc"]:
        isrc = re.sub(r"^ISRC[:\s]*|[-\s]", "", rights["isrc"].upper())
        if not _ISRC.fullmatch(isrc):
            warnings.append(f"its ISRC {shown(rights['isrc'])} is not of the form CC-XXX-YY-NNNNN; left empty")
            isrc = ""
        rights["isrc"] = isrc
    return rights, warnings


def normalise_tags(tags: str) -> str:
    """Descriptors separated by commas, semicolons or lines, trimmed, without bullets or repeats, in their order."""
    return ", ".join(split_tags(tags))


def split_tags(tags: str) -> list[str]:
    """`normalise_tags` as a list. Repeats are found whatever the case; the first spelling stays."""
    seen: dict[str, str] = {}
    for tag in _SEPARATORS.split(_clean(tags)):
        tag = unicodedata.normalize("NFC", " ".join(tag.split()).lstrip(_BULLETS))
        if tag:
            seen.setdefault(tag.casefold(), tag)
    return list(seen.values())


def normalise_lyrics(lyrics: str) -> str:
    """Lyrics with their structure tags and timestamps, lines ended by newlines; none are `[Instrumental]`."""
    lyrics = _clean(lyrics).strip()
    return INSTRUMENTAL if not lyrics or _INSTRUMENTAL.fullmatch(lyrics) else lyrics


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _text(value: object) -> str:
    """The text of a scalar; half a surrogate pair, which JSON can hold and no tokenizer takes, becomes `?`."""
    if value is None or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return str(value).encode("utf-8", "replace").decode().strip()


def _line(value: object) -> str:
    return unicodedata.normalize("NFC", " ".join(_clean(_text(value)).split()))


def _clean(text: str) -> str:
    """Unix line ends, no other control characters or byte order marks, Unicode's normal form C."""
    text = _LINE_ENDS.sub("\n", text)
    text = "".join(c for c in text if c in "\n\t" or (unicodedata.category(c) != "Cc" and c != "\ufeff"))
    return unicodedata.normalize("NFC", text)


def _bpm(value: object, warnings: list[str]) -> int | None:
    if value is None or (isinstance(value, str) and value.strip().casefold() in _NOTHING):
        return None
    bpm = parse_bpm(value)
    if bpm is None:
        warnings.append(f"its bpm {shown(value)} is not between {BPM_RANGE[0]} and {BPM_RANGE[1]}; left empty")
    return bpm


def _keyscale(value: object, warnings: list[str]) -> str | None:
    text = _line(value)
    if text.casefold() in _NOTHING:
        return None
    keyscale = parse_keyscale(text)
    if keyscale is None:
        warnings.append(f"its key {shown(text)} is not a major or minor key such as 'C minor'; left empty")
    return keyscale


def _timesignature(value: object, warnings: list[str]) -> str | None:
    text = _line(value)
    if text.casefold() in _NOTHING:
        return None
    timesignature = parse_timesignature(text)
    if timesignature is None:
        warnings.append(f"its time signature {shown(value)} is not 2, 3, 4 or 6; left empty")
    return timesignature


def _take_terms(tags: list[str], fields: dict, warnings: list[str]) -> list[str]:
    """Move tempo, key and time signature out of the tags into the `fields` that are empty; name contradictions."""
    kept = []
    for tag in tags:
        found = {
            "bpm": bpm_in_tag(tag),
            "keyscale": keyscale_in_tag(tag),
            "timesignature": timesignature_in_tag(tag),
        }
        field = next((field for field, value in found.items() if value is not None), None)
        if field is None:
            kept.append(tag)
        elif fields[field] is None:
            fields[field] = found[field]
        elif fields[field] != found[field]:
            warnings.append(f"its tag {shown(tag)} contradicts its {field} {fields[field]} and is left out")
    return kept


def _trigger_position(value: object, warnings: list[str]) -> str:
    position = _line(value).casefold()
    if position in ("", *TAG_POSITIONS):
        return position
    warnings.append(f"its trigger_position {shown(position)} is not {', '.join(TAG_POSITIONS)}; left empty")
    return ""


def _machine_made(value: object) -> list[str]:
    names = _line(value).split(",")
    return [name.strip() for name in names if name.strip()]


def _weight(value: object, warnings: list[str]) -> float:
    if value is None:
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        warnings.append(f"its sampling weight {shown(value)} is not a number above 0; it counts as 1")
        return 1.0
    return weight


def _repeats(value: object, warnings: list[str]) -> int:
    try:
        repeats = 1.0 if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        repeats = math.nan
    if not (repeats.is_integer() and 1 <= repeats <= MAX_REPEATS):
        warnings.append(f"its repeats {shown(value)} is not a whole number from 1 to {MAX_REPEATS}; it counts as 1")
        return 1
    return int(repeats)
