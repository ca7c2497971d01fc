"""The words that a track's prompt is made of: a trigger word, its tags in several orders, or the tags left out.

A condition is encoded once, before training, so each wording that an item may be given is made here beforehand; which
one it is given is drawn by `batching`.
"""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import UsageError
from .normalisation import TAG_POSITIONS, split_tags

MAX_TAG_SHUFFLE = 1000
# Tags are a few words each; more than this between two commas is a sentence that has commas.
_MAX_TAG_WORDS = 6
_SENTENCE_END = re.compile(r"[.!?](\s|$)|[。！？]")
_CONTINUED = re.compile(r"(and|but|while|which|that|with|then)\s", re.I)
# A trigger word must mean nothing to the model yet, and these do.
ORDINARY_WORDS = frozenset(
    "acoustic ambient blues bluegrass chill choir classical country dance dark disco drill drone drum dub dubstep "
    "electro electronic emo epic ethereal experimental flamenco folk funk fusion garage gospel grime groove grunge "
    "guitar hardcore hip-hop hiphop house indie industrial instrumental jazz jungle latin live lo-fi lofi lounge "
    "mellow metal minimal music noise opera orchestra orchestral phonk piano pop progressive psychedelic punk rap "
    "reggae reggaeton remix retro rnb rock salsa samba sad ska slow song soul soundtrack strings swing symphonic "
    "synth synthpop synthwave techno trance trap tribal upbeat vaporwave violin vocal vocals waltz".split()
)


@dataclass(frozen=True)
class TextOptions:
    """What is done to every track's tags. Raises `UsageError` for values that can't work.

    `trigger_word` goes where `trigger_position` says into the tags of each track that has no trigger word of its own.
    `tag_shuffle` is the number of orders of the tags, the given one among them, keyed by `seed`. `caption_dropout` is
    the probability of leaving the tags out.
    """

    trigger_word: str = ""
    trigger_position: str = TAG_POSITIONS[0]
    tag_shuffle: int = 1
    caption_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trigger_position not in TAG_POSITIONS:
            raise UsageError(f"--trigger_position must be {', '.join(TAG_POSITIONS)}, not {self.trigger_position!r}.")
        if not 1 <= self.tag_shuffle <= MAX_TAG_SHUFFLE:
            raise UsageError(f"--tag_shuffle must be in [1, {MAX_TAG_SHUFFLE}], not {self.tag_shuffle}.")
        if not 0 <= self.caption_dropout <= 1:
            raise UsageError(f"--caption_dropout must be in [0, 1], not {self.caption_dropout}.")
        if self.trigger_word and self.trigger_position == "replace" and (self.tag_shuffle > 1 or self.caption_dropout):
            raise UsageError(
                "--trigger_position replace leaves no tags to shuffle or to drop; leave out --tag_shuffle and "
                "--caption_dropout, or choose prepend or append."
            )

    def trigger_of(self, own_word: str, own_position: str) -> tuple[str, str]:
        """Trigger word (may be empty) and position for a track, whose own values win."""
        return own_word or self.trigger_word, own_position or self.trigger_position

    def with_trigger(self, prompt: str) -> str:
        """A prompt written by hand, with the trigger word put first (or last, for `append`) if it isn't in it."""
        if not self.trigger_word or self.trigger_word.casefold() in prompt.casefold():
            return prompt
        return ", ".join(
            (prompt, self.trigger_word) if self.trigger_position == "append" else (self.trigger_word, prompt)
        )


@dataclass(frozen=True)
class Wordings:
    """The prompts that a track is described by: as `given`, in other orders, and `without_tags`.

    `without_tags` is None where no item is ever to have it.
    """

    given: str
    shuffled: tuple[str, ...] = ()
    without_tags: str | None = None


def make_wordings(
    tags: str, options: TextOptions, *, trigger_word: str = "", trigger_position: str = "", key: str = ""
) -> Wordings:
    """Every prompt that items of a track may be given, all distinct but for `without_tags`.

    The trigger word keeps its place in all of them. Where there are no more than `options.tag_shuffle` orders, all are
    there; a prose caption has one.

    Args:
        tags: normalised.
        options: for all tracks.
        trigger_word, trigger_position: the track's own, or empty.
        key: names the track, whatever its place: the orders depend on it, the tags and `options.seed` alone.
    """
    word, position = options.trigger_of(trigger_word, trigger_position)
    parts = [] if is_prose(tags) else split_tags(tags)
    orders = tag_orders(parts, options.tag_shuffle, key=f"{options.seed}/{key}")[1:]
    given = place_trigger(tags, word, position)
    shuffled = dict.fromkeys(place_trigger(", ".join(order), word, position) for order in orders)
    return Wordings(
        given,
        tuple(prompt for prompt in shuffled if prompt != given),
        word if options.caption_dropout else None,
    )


def place_trigger(tags: str, word: str, position: str) -> str:
    """Tags with a trigger word; a tag that is the trigger word itself is not told twice."""
    if not word:
        return tags
    told = {"prepend": f"{word}, {tags}", "append": f"{tags}, {word}", "replace": word}[position]
    return ", ".join(split_tags(told))


def tag_orders(tags: Sequence[str], number: int, *, key: str) -> list[list[str]]:
    """Up to `number` distinct orders of distinct `tags`, the given one first; fewer where there are no more.

    A larger `number` adds orders to those of a smaller one, so that what was encoded before is used.
    """
    source = random.Random(f"tag order/{key}")
    orders = {tuple(tags): None}
    wanted = min(number, math.factorial(min(len(tags), 10)))
    while len(orders) < wanted:
        order = list(tags)
        source.shuffle(order)
        orders[tuple(order)] = None
    return [list(order) for order in orders]


def is_prose(tags: str) -> bool:
    """Whether a description is written in sentences, whose parts make no sense in another order.

    It is, where a sentence ends (`.`, `!` or `?` before a space or at the end), where more than six words stand
    between two commas, or where a part begins with a word that continues a sentence (`and`, `with`, `which`, …).
    """
    parts = tags.split(", ")
    long = any(len(part.split()) > _MAX_TAG_WORDS for part in parts)
    return long or bool(_SENTENCE_END.search(tags)) or any(_CONTINUED.match(part) for part in parts)


def describe_wordings(described: Sequence[tuple[str, str, str]], options: TextOptions) -> list[tuple[str, str]]:
    """(flag, sentence) about what the options won't do as hoped for these tracks.

    Args:
        described: (tags, genre, own trigger word) of each track.
        options: what was asked for.
    """
    said = []
    flag = f"--trigger_word {options.trigger_word}"
    words = {tag.casefold() for tag in split_tags(options.trigger_word)}
    named = sum(any(tag.casefold() in words for tag in split_tags(tags)) for tags, _, _ in described)
    if named:
        said.append((flag, f"{named} of {len(described)} tracks have it among their tags already; a word of its own "
                           "would mean these tracks alone"))  # fmt: skip
    genres = {genre.casefold() for _, genre, _ in described if genre}
    if words & (ORDINARY_WORDS | genres):
        said.append(
            (flag, "it is an ordinary word for music, which the model knows; a made-up word changes less of it")
        )
    own = sum(bool(word) for _, _, word in described)
    if options.trigger_word and own:
        said.append((flag, f"{own} of {len(described)} tracks have a trigger word of their own and keep that"))
    prose = sum(is_prose(tags) for tags, _, _ in described)
    if options.tag_shuffle > 1 and prose:
        said.append((f"--tag_shuffle {options.tag_shuffle}", f"{prose} of {len(described)} tracks are described in "
                     "sentences, which stay as they are"))  # fmt: skip
    return said
