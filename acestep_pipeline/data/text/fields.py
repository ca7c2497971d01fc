"""The raw text fields of a track, whatever the names: from a JSON object, a table's row or a dataset's row."""

import math

from ...prompt_fields import INSTRUMENTAL

# Names that a source may use for each text field, the first that has a value wins. They are ours, the official
# ACE-Step trainer's (caption, keyscale, formatted_lyrics, …) and Side-Step's (key, signature, …); case does not
# matter, and a space or hyphen counts as an underscore.
FIELD_NAMES = {
    "tags": ("tags", "caption", "prompt"),
    "lyrics": ("lyrics", "formatted_lyrics", "raw_lyrics"),
    "genre": ("genre", "genres"),
    "bpm": ("bpm",),
    "keyscale": ("keyscale", "key_scale", "key"),
    "timesignature": ("timesignature", "time_signature", "signature"),
    "language": ("language", "vocal_language"),
    "title": ("title",),
    "artist": ("artist",),
    "rights_holder": ("rights_holder", "copyright", "label", "publisher"),
    "isrc": ("isrc",),
    "license": ("license", "licence"),
    "source": ("source", "url"),
    "trigger_word": ("trigger_word", "custom_tag"),
    "trigger_position": ("trigger_position", "tag_position"),
    "sampling_weight": ("sampling_weight",),
    "repeats": ("repeats", "num_repeats"),
    "machine_made": ("machine_made",),
}
# Not fields of their own: they decide about others of the same source.
_SWITCHES = {"is_instrumental", "prompt_override"}
KNOWN_NAMES = _SWITCHES.union(*FIELD_NAMES.values())


def canonical_name(name: str) -> str:
    """`Time Signature` and `time-signature` are `time_signature`."""
    return "_".join(name.strip().casefold().replace("-", " ").replace("_", " ").split())


def text_fields(values: dict, warnings: list[str]) -> dict:
    """The known fields of a JSON object or a row, lists joined (tags by commas, lyrics by lines).

    What is neither text, a number nor a list of them is left out, and a sentence about it added to `warnings`.
    `is_instrumental: true` gives the lyrics `[Instrumental]`, `prompt_override: "genre"` the genre as tags.
    """
    known: dict = {}
    for name, value in values.items():
        name = canonical_name(name) if isinstance(name, str) else None
        if name in KNOWN_NAMES and not _is_empty(value):
            known.setdefault(name, value)
    fields = {}
    for field, names in FIELD_NAMES.items():
        value = next((known[name] for name in names if name in known), None)
        if value is None:
            continue
        if isinstance(value, list | tuple) and all(map(_is_scalar, value)):
            value = ("\n" if field == "lyrics" else ", ").join(map(str, value))
        if _is_scalar(value) or field == "bpm" and isinstance(value, float | bool):  # a wrong number is named later
            fields[field] = value
        else:
            warnings.append(f"its {field} is neither text, a number nor a list of them and is left out")
    if str(known.get("is_instrumental")).strip().casefold() in {"true", "1", "1.0", "yes"}:
        fields["lyrics"] = INSTRUMENTAL
    if known.get("prompt_override") == "genre" and "genre" in fields:
        fields["tags"] = fields["genre"]
    return fields


def _is_empty(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def _is_scalar(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)


def fill_missing(record: dict, fields: dict) -> None:
    """Add what `record` does not have: of two sources the first asked wins, field by field."""
    for field, value in fields.items():
        record.setdefault(field, value)
