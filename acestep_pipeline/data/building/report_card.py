"""`dataset_card.md`: what is in a dataset and whose it is, for the Hub and for whoever must account for it.

A pure function of the content of `report.json`; every text of the user's goes through `escape_markdown`.
"""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from .report_text import NO_GENRE, NOT_STATED, group_findings, plain, template_environment

NAMED_TRACKS = 200
# Identifiers of huggingface.co/docs/hub/repositories-licenses that music or data is published under.
HUB_LICENSES = frozenset(
    "agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 "
    "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 "
    "cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 "
    "cdla-sharing-1.0 etalab-2.0 eupl-1.1 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 odbl odc-by "
    "osl-3.0 pddl unlicense wtfpl zlib".split()
)


def render_card(content: dict) -> str:
    """The dataset's card for the Hugging Face Hub, which is also the summary of its content for training."""
    from markupsafe import Markup

    tracks = content["tracks"]
    splits = Counter((t["genre"] or NO_GENRE, t["split"]) for t in tracks)
    unlicensed = [t["id"] for t in tracks if not t["license"].strip()]
    unowned = [t["id"] for t in tracks if not t["rights_holder"].strip()]
    return template_environment(autoescape=False, finalize=escape_markdown).get_template("dataset_card.md.j2").render(
        content=content,
        front_matter=Markup(_front_matter(tracks)),
        hours=sum(t["duration_s"] for t in tracks) / 3600,
        genres=[(genre, counts, splits[genre, "test"]) for genre, counts in content["genres"].items()],
        splits=[(split, *_count(t for t in tracks if t["split"] == split)) for split in ("train", "test")],
        languages=sorted(Counter(_lyrics_language(t) for t in tracks).items(), key=lambda item: (-item[1], item[0])),
        with_lyrics=sum(t["has_lyrics"] for t in tracks),
        with_tags=sum(t["tags"] not in ("", t["genre"]) for t in tracks),
        severities=group_findings(content),
        machine_made=list(_machine_made(tracks)),
        rights=_group_rights(tracks),
        unstated=[("licence", unlicensed), ("rights holder", unowned)],
        limit=NAMED_TRACKS,
    )  # fmt: skip


def escape_markdown(value: object) -> object:
    """Text as one line that Markdown shows as it is, also in a table's cell; numbers and Markdown stay."""
    from markupsafe import Markup

    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = " ".join(plain(value).split())
    text = re.sub(r"([\\`*_\[\]<>|~#$&])", r"\\\1", text)
    # What makes a list or a rule where a line begins with it.
    return re.sub(r"^(\d+(?=[.)](?: |$))|(?=[-+=]))", r"\1\\", text)


def hub_license(tracks: list[dict]) -> str:
    """The Hub's identifier of the one licence that all tracks state; "other" where there is none."""
    stated = {_license_id(track["license"]) for track in tracks}
    return stated.pop() if len(stated) == 1 and stated <= HUB_LICENSES else "other"


def _license_id(text: str) -> str:
    """ "CC BY-SA 3.0", "CC-BY-SA-3.0" and the licence's address in the spelling of the Hub."""
    text = text.strip().lower()
    if match := re.search(r"creativecommons\.org/(?:licenses/([a-z-]+)|publicdomain/(zero))/(\d\.\d)/?$", text):
        return f"cc-{match[1]}-{match[3]}" if match[1] else f"cc0-{match[3]}"
    return re.sub(r"[\s_]+", "-", text).removesuffix("-only")


def _front_matter(tracks: list[dict]) -> str:
    import yaml

    languages = {t["language"] for t in tracks if t["has_lyrics"] and re.fullmatch(r"[a-z]{2,3}", t["language"])}
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")]
    license_id = hub_license(tracks)
    fields = {
        "license": license_id,
        "license_name": "see-sources-and-licences" if license_id == "other" else None,
        "language": sorted(languages),
        "task_categories": ["text-to-audio"],
        "tags": ["music", "ace-step"],
        "size_categories": [next((name for bound, name in bounds if len(tracks) < bound), "1M<n<10M")],
    }
    return yaml.safe_dump({name: value for name, value in fields.items() if value}, sort_keys=False).strip()


def _lyrics_language(track: dict) -> str:
    return track["language"] if track["has_lyrics"] else "(instrumental)"


def _count(tracks: Iterable[dict]) -> tuple[int, float]:
    """Number of tracks, and their minutes."""
    durations = [track["duration_s"] for track in tracks]
    return len(durations), sum(durations) / 60


def _group_rights(tracks: list[dict]) -> list[tuple]:
    """(source, rights holder, licence, tracks, minutes), the most minutes first."""
    groups = defaultdict(list)
    for track in tracks:
        groups[tuple(track[name].strip() or NOT_STATED for name in ("source", "rights_holder", "license"))].append(
            track
        )
    return sorted(((*key, *_count(group)) for key, group in groups.items()), key=lambda row: (-row[4], row[:3]))


def _machine_made(tracks: list[dict]) -> Iterator[tuple[str, int, str, str]]:
    """(field, number of tracks, by which programs, their median confidence) of what no person wrote."""
    made = defaultdict(list)
    for track in tracks:
        for field in track["machine_made"]:
            made[field].append(track["estimates"].get(field))
    for field, estimates in sorted(made.items()):
        known = [estimate for estimate in estimates if estimate]
        by = ", ".join(sorted({estimate["by"] for estimate in known})) or NOT_STATED
        sure = f"{100 * statistics.median(e['confidence'] for e in known):.0f} %" if known else "–"
        yield field, len(estimates), by, sure
