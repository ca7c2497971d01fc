"""Tags inside an audio file: ID3, Vorbis comments, MP4 atoms, RIFF INFO, as raw fields of a track.

tinytag reads them from the file's headers. How a tag becomes a field of `Track` is the business of `normalisation`.
"""

import io
import re
from pathlib import Path
from typing import BinaryIO

# More than any tag with text needs; a damaged length field would ask for the whole file, or for 4 GB.
_MAX_TAG_BYTES = 32 << 20
_GENRE_SEPARATORS = re.compile(r"[;\0]")
_TIMESTAMP = re.compile(r"\[\d+:\d\d")
# Names that tinytag gives, the first found wins; those of Vorbis comments that it does not know come as they are.
_NAMES = {
    "title": ("title",),
    "artist": ("artist", "albumartist"),
    "bpm": ("bpm", "tempo"),
    "keyscale": ("initial_key", "initialkey", "key"),
    "isrc": ("isrc",),
    "rights_holder": ("copyright", "rights", "publisher", "label", "organization"),
    "license": ("license", "licence"),
    "source": ("url", "source"),
}
# What programs write for "none": 0 (iTunes, tempo) and o ("off key", ID3's TKEY).
_NONE = {"bpm": {"0"}, "keyscale": {"o"}}


class _BoundedReader(io.RawIOBase):
    """A file of which no more than `_MAX_TAG_BYTES` may be read in all."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left = _MAX_TAG_BYTES

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._left:
            raise ValueError("a tag claims to be larger than a tag can be")
        data = self._file.read(size)
        self._left -= len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def read_file_tags(source: Path | bytes) -> tuple[dict, list[str]]:
    """What the tags inside an audio file say, without decoding it.

    Of several genres the first is the genre, and all of them are tags; one alone is the genre only. Lyrics with
    timestamps go before those without.

    Returns:
        Raw fields, and a warning where the tags are damaged.
    """
    from tinytag import TinyTag, TinyTagException, UnsupportedFormatError

    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            tags = TinyTag.get(file_obj=_BoundedReader(file), duration=False).as_dict()
    except UnsupportedFormatError:
        return {}, []  # a container that has no tags known to tinytag, such as Wave64
    except (TinyTagException, ValueError, OSError):
        return {}, ["the tags inside the file are damaged and are left out"]
    return _raw_fields({name: _texts(values) for name, values in tags.items() if isinstance(values, list)}), []


def _texts(values: list) -> list[str]:
    return [text for text in (str(value).strip("\0 \r\n\t") for value in values) if text]


def _raw_fields(tags: dict[str, list[str]]) -> dict:
    fields = {}
    for field, names in _NAMES.items():
        values = next((tags[name] for name in names if tags.get(name)), [])
        values = [value for value in values if value not in _NONE.get(field, ())]
        if values:
            fields[field] = ", ".join(values) if field == "artist" else values[0]
    contact = next(iter(tags.get("contact", [])), "")  # of the makers: in Vorbis comments often their site
    if contact.startswith(("http://", "https://")):
        fields.setdefault("source", contact)
    genres = [part.strip() for text in tags.get("genre", []) for part in _GENRE_SEPARATORS.split(text) if part.strip()]
    if genres:
        fields["genre"] = genres[0]
    if len(set(genres)) > 1:
        fields["tags"] = "\n".join(genres)
    lyrics = sorted(tags.get("lyrics", []), key=lambda text: not _TIMESTAMP.search(text))
    if lyrics:
        fields["lyrics"] = lyrics[0]
    return fields
