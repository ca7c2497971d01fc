"""The language of lyrics: one code for what people write, and a guess where nobody wrote anything."""

import functools
import re

UNKNOWN = "unknown"
# A guess on less text, or with less confidence, is worse than none.
MIN_LETTERS = 40
MIN_PROBABILITY = 0.9

# English name and ISO 639-2 codes of the languages of the model's official list, by its (mostly ISO 639-1) code.
_NAMES = {
    "ar": "arabic ara", "az": "azerbaijani aze", "bg": "bulgarian bul", "bn": "bengali ben", "ca": "catalan cat",
    "cs": "czech ces cze", "da": "danish dan", "de": "german deu ger deutsch", "el": "greek ell gre",
    "en": "english eng", "es": "spanish spa español espanol castilian", "fa": "persian fas per farsi",
    "fi": "finnish fin", "fr": "french fra fre français francais", "he": "hebrew heb iw", "hi": "hindi hin",
    "hr": "croatian hrv", "ht": "haitian hat", "hu": "hungarian hun", "id": "indonesian ind",
    "is": "icelandic isl ice", "it": "italian ita italiano", "ja": "japanese jpn jp 日本語",
    "ko": "korean kor kr 한국어", "la": "latin lat", "lt": "lithuanian lit", "ms": "malay msa may", "ne": "nepali nep",
    "nl": "dutch nld dut nederlands", "no": "norwegian nor nb nn nob nno", "pa": "punjabi pan",
    "pl": "polish pol polski", "pt": "portuguese por português", "ro": "romanian ron rum",
    "ru": "russian rus русский", "sa": "sanskrit san", "sk": "slovak slk slo", "sr": "serbian srp",
    "sv": "swedish swe svenska", "sw": "swahili swa", "ta": "tamil tam", "te": "telugu tel", "th": "thai tha",
    "tl": "tagalog tgl filipino fil", "tr": "turkish tur", "uk": "ukrainian ukr", "ur": "urdu urd",
    "vi": "vietnamese vie", "yue": "cantonese", "zh": "chinese zho chi cmn mandarin cn 中文",
    UNKNOWN: "und unk none n/a na auto instrumental zxx -",
}  # fmt: skip
LANGUAGES = frozenset(_NAMES)
_CODES = {name: code for code, names in _NAMES.items() for name in names.split()}
_REGION = re.compile(r"([a-z]{2,3})[-_][a-z0-9_-]+")
_NOT_SUNG = re.compile(r"\[[^\]\n]*\]|<\d+:\d+[.:\d]*>")


def normalise_language(text: str) -> str:
    """`English`, `eng` and `en-US` are `en`; nothing is `unknown`; a name not listed here stays as it is."""
    name = " ".join(text.split()).casefold()
    region = _REGION.fullmatch(name)
    if region and region[1] not in ("zh", "yue"):
        name = region[1]
    elif region:
        name = "yue" if name in ("zh-yue", "zh_yue", "zh-hk", "zh_hk") else region[1]
    return _CODES.get(name, name) or UNKNOWN


def detect_language(lyrics: str) -> str:
    """The language of the sung words by character statistics, or `unknown` where they are few or undecided.

    Structure tags and timestamps don't count. The confidence is py3langid's normalised probability.
    """
    words = " ".join(_NOT_SUNG.sub(" ", lyrics).split())
    if sum(map(str.isalpha, words)) < MIN_LETTERS:
        return UNKNOWN
    language, probability = _identifier().classify(words)
    return normalise_language(language) if probability >= MIN_PROBABILITY else UNKNOWN


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
