"""Text as people leave it on disk: in any encoding, bounded in size, and never taken from what is not text."""

import codecs
import re
import stat
import unicodedata
from pathlib import Path

MAX_SIDECAR_BYTES = 1 << 20
MAX_TABLE_BYTES = 64 << 20

# Longest first: UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What text without a mark may be, the likeliest first: of two that read equally well, the first is taken.
_LEGACY = ("cp1252", "cp1251", "cp932", "euc_jp", "gb18030", "big5", "cp949", "cp1250", "koi8_r", "cp1253", "cp1254")
_JAPANESE = ("cp932", "euc_jp")
_SAMPLE_BYTES = 1 << 16
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x19\x1b-\x1f\x7f]")


class TextError(Exception):
    """Bytes that are no text; the message says why, without the file's name."""


def read_text(path: Path, warnings: list[str], *, max_bytes: int = MAX_SIDECAR_BYTES) -> str | None:
    """The text of a file, or None and a sentence in `warnings` where it is too large, unreadable or no text.

    An encoding that had to be guessed is named in `warnings` as well.
    """
    name = one_line(path.name)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise TextError("is not a regular file")
        if status.st_size > max_bytes:
            raise TextError(f"is larger than {max_bytes >> 20} MB")
        with path.open("rb") as file:
            text, encoding = decode_text(file.read(max_bytes + 1))
    except TextError as error:
        warnings.append(f"{name} {error} and is left out")
        return None
    except OSError as error:
        warnings.append(f"{name} can't be read ({error.strerror}) and is left out")
        return None
    if encoding is not None:
        warnings.append(f"{name} is not UTF-8 and was read as {encoding}; save it as UTF-8 if that is wrong")
    return text


def decode_text(data: bytes) -> tuple[str, str | None]:
    """Decode UTF-8, UTF-16 or UTF-32 (by their marks), or else a guess among the usual older encodings.

    Returns:
        The text without its byte order mark, and the name of the encoding if it was guessed.

    Raises:
        TextError: the bytes fit no encoding, or decode to control characters, which no text holds.
    """
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    guessed = None
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError:
        if mark and encoding != "utf-8":
            raise TextError(f"begins like {encoding[:6].upper()} text but is damaged") from None
        text, guessed = _decode_legacy(data)
    if "\0" in text and not mark:
        text, guessed = _decode_unmarked_utf16(data)
    if _CONTROL.search(text):
        raise TextError("is not text")
    return text, guessed


def _decode_unmarked_utf16(data: bytes) -> tuple[str, str]:
    """Text with zero bytes: UTF-16 where they are nearly all high bytes of one byte order."""
    for encoding, high in (("utf-16-le", data[1::2]), ("utf-16-be", data[::2])):
        if high.count(0) * 2 > len(high):
            try:
                return data.decode(encoding), encoding.upper()
            except UnicodeDecodeError:
                break
    raise TextError("is not text")


def _decode_legacy(data: bytes) -> tuple[str, str]:
    """Guess an encoding from before Unicode. Short texts fit many: the note that goes with it lets a person check."""
    for encoding in _JAPANESE:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        foreign = [c for c in text if c > "\x7f"]
        # Kana come up by chance in no other encoding; charset_normalizer takes short Japanese for Korean.
        if sum("\u3041" <= c <= "\u30ff" for c in foreign) * 3 > len(foreign):
            return text, encoding
    from charset_normalizer import from_bytes

    sample = data if len(data) <= _SAMPLE_BYTES else data[: data.rfind(b"\n", 0, _SAMPLE_BYTES) + 1]
    matches = {}
    for match in from_bytes(sample, cp_isolation=list(_LEGACY)):
        for encoding in match.could_be_from_charset:
            if encoding in _LEGACY:
                matches[encoding] = (round(match.chaos, 2), -round(match.coherence, 2), _LEGACY.index(encoding))
    for encoding in sorted(matches, key=matches.get):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    raise TextError("is not text in any usual encoding")


def one_line(name: str) -> str:
    """Control characters, line ends and undecodable bytes of a file name as escapes."""
    escaped = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in escaped else c for c in name)


def fold(name: str) -> str:
    """A file name as a file system without case, in either of Unicode's normal forms, would compare it."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
