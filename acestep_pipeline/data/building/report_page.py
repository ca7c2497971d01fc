"""`report.html`: what a dataset build did, to look at and listen to.

A pure function of the content of `report.json`: equal content gives equal bytes, with nothing of the moment or the
machine they were made on. Jinja2 escapes every text of the user's.
"""

import json
import statistics
from collections import defaultdict

from .report_charts import draw_charts
from .report_text import NO_GENRE, NOT_STATED, group_findings, plain, template_environment

# One character a step: a waveform of 120 numbers costs 120 bytes in the page.
WAVEFORM_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
WAVEFORM_LEVELS = [WAVEFORM_ALPHABET[63 * level // 99] for level in range(100)]


def render_report(content: dict, audio_urls: dict[str, str]) -> str:
    """One HTML page that needs no other file but the audio it plays.

    Args:
        content: of `report.json`.
        audio_urls: where a track's player finds its audio, by track id, percent-encoded; relative to the page or
            `file:`. A track without one has no player.
    """
    findings = content["findings"]
    values = [t["measured"]["loudness_lufs"] for t in content["tracks"] if t["measured"]]
    loudness = [value for value in values if value is not None]
    return (
        template_environment(autoescape=True)
        .get_template("report.html.j2")
        .render(
            content=content,
            minutes=sum(t["duration_s"] for t in content["tracks"]) / 60,
            holdout=sum(t["split"] == "test" for t in content["tracks"]),
            rejected=len({f["track"] for f in findings if f["severity"] == "error"}),
            warned=len({f["track"] for f in findings if f["severity"] == "warning"}),
            loudness=statistics.median(loudness) if loudness else None,
            severities=group_findings(content),
            kept={t["id"] for t in content["tracks"]},
            charts=draw_charts(content),
            data=_page_data(content, audio_urls),
            alphabet=WAVEFORM_ALPHABET,
        )
    )


def _page_data(content: dict, audio_urls: dict[str, str]):
    """The rows of the page's table as JSON that may stand in a `script` element: lists, to be small.

    What repeats (genres, licences, reasons) is written once and referred to by its index. The order of a row's values
    is the one in which the page's script takes them.
    """
    from markupsafe import Markup

    indices: dict[str, dict[str, int]] = {"genres": {}, "licences": {}, "reasons": {}}

    def index(kind: str, text: str) -> int:
        return indices[kind].setdefault(plain(text), len(indices[kind]))

    findings = defaultdict(list)
    for finding in content["findings"]:
        findings[finding["track"]].append([finding["severity"], index("reasons", finding["reason"])])
    rows = []
    for track in content["tracks"]:
        measured = track["measured"] or {"loudness_lufs": None, "waveform": []}
        text = [plain(track[name]) for name in ("id", "title", "artist")]
        numbers = [track["bpm"], _with_estimate(track, "bpm"), track["keyscale"], _with_estimate(track, "keyscale")]
        tags = ("≈ " if "tags" in track["machine_made"] and track["tags"] else "") + plain(track["tags"])
        voice = f"lyrics: {plain(track['language'])}" if track["has_lyrics"] else "instrumental"
        rows.append(
            [*text, index("genres", track["genre"] or NO_GENRE), tags, voice, *numbers, round(track["duration_s"], 1),
             measured["loudness_lufs"], track["split"], index("licences", track["license"].strip() or NOT_STATED),
             audio_urls.get(track["id"], ""), "".join([WAVEFORM_LEVELS[level] for level in measured["waveform"]]),
             findings.get(track["id"], [])]
        )  # fmt: skip
    data = {kind: list(values) for kind, values in indices.items()} | {"rows": rows}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # Inside a script element only "<" can end it or open a comment; the three are legal JSON as escapes.
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _with_estimate(track: dict, field: str) -> str:
    """A value as the table shows it: "≈120 (83 %)" if a program filled it in, "120? (41 %)" if it wasn't sure."""
    value, estimate = track[field], track["estimates"].get(field)
    sure = f" ({100 * estimate['confidence']:.0f} %)" if estimate else ""
    if value is not None:
        return f"≈{value}{sure}" if field in track["machine_made"] else str(value)
    return f"{estimate['value']}?{sure}" if estimate else ""
