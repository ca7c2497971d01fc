"""What the dataset's page and its card share: templates, findings in groups, words."""

import re
from collections import defaultdict
from pathlib import Path

from ..text.text_files import one_line

TEMPLATES = Path(__file__).with_name("templates")
NOT_STATED = "(not stated)"
NO_GENRE = "(no genre)"
PUNCTUATION = ",;:()"
SEVERITIES = {"error": "Rejected", "warning": "Warnings", "note": "Notes"}


def plain(text: str) -> str:
    """Without line ends, control characters and halves of surrogate pairs, which UTF-8 can't hold."""
    return text if text.isprintable() else one_line(text)


def template_environment(**options):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters |= {"plain": plain, "length_words": _length_words, "count": _count_words}
    return environment


def _length_words(minutes: float) -> str:
    return f"{minutes:.1f} min" if minutes < 120 else f"{int(minutes // 60)} h {int(minutes % 60):02d} min"


def _count_words(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def group_findings(content: dict) -> list[dict]:
    """Errors, then warnings, then notes; in each, reasons that differ in numbers and names only are one group.

    Returns:
        `severity`, `title`, `count` and `groups` of each: the group's `reason` in general words, its `findings`.
    """
    names: dict[str, set[str]] = defaultdict(set)
    for name in {f["track"] for f in content["findings"]} | {t["id"] for t in content["tracks"]}:
        names[name.partition(" ")[0]].add(name)
    grouped: dict[str, dict[str, list]] = {severity: defaultdict(list) for severity in SEVERITIES}
    for finding in content["findings"]:
        grouped[finding["severity"]][_general_reason(finding["reason"], names)].append(finding)
    return [
        {
            "severity": severity,
            "title": SEVERITIES[severity],
            "count": sum(map(len, groups.values())),
            "groups": [
                {"reason": items[0]["reason"] if len(items) == 1 else reason, "findings": items}
                for reason, items in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
            ],
        }
        for severity, groups in grouped.items()
    ]


def _general_reason(reason: str, names: dict[str, set[str]]) -> str:
    """The reason with "…" for each track's name and each number in it; `names` by their first word."""
    words, general, i = reason.split(" "), [], 0
    while i < len(words):
        candidates = names.get(words[i].strip(PUNCTUATION), ())
        ends = (j for j in range(len(words), i, -1) if " ".join(words[i:j]).strip(PUNCTUATION) in candidates)
        end = next(ends, None) if candidates else None
        general.append(words[i] if end is None else "…")
        i = end or i + 1
    return re.sub(r"-?\d+(?:[.,]\d+)*", "…", " ".join(general))
