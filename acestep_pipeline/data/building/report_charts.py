"""The charts of the dataset's page: inline SVG in the page's colours, each with its content in words beside it."""

import io
import itertools
import math
import re
import statistics
import warnings
from collections import Counter, defaultdict

from .report_text import NO_GENRE, plain

CHARTED_GENRES = 18
# Colours that matplotlib draws with, and the variables of the page's style sheet (light and dark) in their place.
INK, GRID, FIRST, SECOND = "#010203", "#010204", "#010205", "#010206"
PAGE_COLOURS = {INK: "var(--ink)", GRID: "var(--line)", FIRST: "var(--first)", SECOND: "var(--second)"}
CIRCLE_OF_FIFTHS = ("C", "G", "D", "A", "E", "B", "F#", "Db", "Ab", "Eb", "Bb", "F")
SAME_TONIC = {"Gb": "F#", "C#": "Db", "G#": "Ab", "D#": "Eb", "A#": "Bb", "Cb": "B", "E#": "F", "B#": "C", "Fb": "E"}


def draw_charts(content: dict) -> list[dict]:
    """`title`, `svg` (None without data) and `text`, which says in words what the chart shows or how to get one."""
    import matplotlib.style

    tracks = content["tracks"]
    style = {"svg.hashsalt": "acestep", "svg.fonttype": "none", "text.parse_math": False, "font.size": 10.5}
    colours = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style |= dict.fromkeys(colours, INK)
    # "default", so that a matplotlibrc of the user's does not change the page.
    with matplotlib.style.context(["default", style]), warnings.catch_warnings():
        # The browser's fonts draw the text, and have the emoji that matplotlib's own lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        return [
            _genre_chart(tracks),
            _bpm_chart(tracks, auto_tag=content["options"]["auto_tag"]),
            _key_chart(tracks, auto_tag=content["options"]["auto_tag"]),
            _duration_chart(tracks),
            _loudness_chart(tracks, validated=content["validated"]),
        ]


def _genre_chart(tracks: list[dict]) -> dict:
    minutes: dict[str, Counter] = defaultdict(Counter)
    for track in tracks:
        minutes[track["genre"] or NO_GENRE][track["split"]] += track["duration_s"] / 60
    largest = sorted(minutes, key=lambda genre: (-minutes[genre].total(), genre))
    shown, rest = largest[:CHARTED_GENRES], largest[CHARTED_GENRES:]
    bars = [(_shorten(genre), minutes[genre]) for genre in shown]
    if rest:
        bars.append((f"{len(rest)} more", sum((minutes[genre] for genre in rest), Counter())))
    figure, axes = _axes("minutes", height=1.1 + 0.28 * len(bars))
    for split, colour, left in (("train", FIRST, None), ("test", SECOND, "train")):
        if any(total[split] for _, total in bars):
            starts = [total[left] if left else 0.0 for _, total in bars]
            widths = [total[split] for _, total in bars]
            axes.barh(range(len(bars)), widths, left=starts, color=colour, label=_split_word(split))
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID)
    _legend(axes)
    # Isolated, so that a name from right to left leaves the numbers in their place.
    words = ", ".join(f"\u2068{plain(genre)}\u2069 {minutes[genre].total():.1f}" for genre in shown[:8])
    more = f" and {len(largest) - 8} more genres" if len(largest) > 8 else ""
    return {"title": "Minutes by genre", "svg": _svg(figure, "genre"), "text": f"Minutes: {words}{more}."}


def _bpm_chart(tracks: list[dict], *, auto_tag: bool) -> dict:
    values = [(t["bpm"], "bpm" in t["machine_made"]) for t in tracks if t["bpm"] is not None]
    if not values:
        return {"title": "Tempo", "svg": None, "text": _no_estimate("a BPM", '{"bpm": 120}', auto_tag)}
    groups = [
        ("stated", [bpm for bpm, made in values if not made]),
        ("estimated", [bpm for bpm, made in values if made]),
    ]
    figure = _histogram(groups, steps=(2, 5, 10, 20), unit="BPM")
    text = (
        f"{_spread([bpm for bpm, _ in values], 'BPM', digits=0)} {_coverage(len(values), len(tracks), groups[1][1])}"
    )
    return {"title": "Tempo", "svg": _svg(figure, "bpm"), "text": text}


def _key_chart(tracks: list[dict], *, auto_tag: bool) -> dict:
    from matplotlib.ticker import MaxNLocator

    keyed = [t for t in tracks if t["keyscale"]]
    if not keyed:
        return {"title": "Keys", "svg": None, "text": _no_estimate("a key", '{"keyscale": "E minor"}', auto_tag)}
    counts, others = Counter(), Counter()
    for track in keyed:
        tonic, _, mode = track["keyscale"].partition(" ")
        tonic = SAME_TONIC.get(tonic, tonic)
        known = tonic in CIRCLE_OF_FIFTHS and mode in ("major", "minor")
        (counts if known else others)[(tonic, mode) if known else track["keyscale"]] += 1
    figure, axes = _axes("key (circle of fifths)", "tracks")
    for mode, colour, offset in (("major", FIRST, -0.2), ("minor", SECOND, 0.2)):
        heights = [counts[tonic, mode] for tonic in CIRCLE_OF_FIFTHS]
        axes.bar([i + offset for i in range(12)], heights, width=0.4, color=colour, label=mode)
    axes.set_xticks(range(12), CIRCLE_OF_FIFTHS)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GRID)
    _legend(axes)
    top = ", ".join(f"{' '.join(key)} ({n})" for key, n in sorted(counts.items(), key=lambda i: (-i[1], i[0]))[:3])
    text = f"Most frequent: {top}. " if top else ""
    if others:
        text += f"Not drawn: {', '.join(f'{_shorten(key)} ({n})' for key, n in sorted(others.items())[:8])}. "
    made = [t for t in keyed if "keyscale" in t["machine_made"]]
    return {"title": "Keys", "svg": _svg(figure, "key"), "text": text + _coverage(len(keyed), len(tracks), made)}


def _duration_chart(tracks: list[dict]) -> dict:
    minutes = [t["duration_s"] / 60 for t in tracks]
    figure = _histogram([("tracks", minutes)], steps=(0.1, 0.25, 0.5, 1, 2, 5, 10), unit="minutes")
    return {"title": "Length", "svg": _svg(figure, "duration"), "text": _spread(minutes, "minutes", digits=1)}


def _loudness_chart(tracks: list[dict], *, validated: bool) -> dict:
    values = [t["measured"]["loudness_lufs"] for t in tracks if t["measured"]]
    values = [value for value in values if value is not None]
    if not values:
        text = "Build with --validate-audio to measure the loudness of every track."
        text = "No track is long or loud enough for a loudness to be measured." if validated else text
        return {"title": "Loudness", "svg": None, "text": text}
    figure = _histogram([("tracks", values)], steps=(0.5, 1, 2, 5), unit="LUFS")
    return {"title": "Loudness", "svg": _svg(figure, "loudness"), "text": _spread(values, "LUFS", digits=1)}


def _no_estimate(what: str, example: str, auto_tag: bool) -> str:
    if auto_tag:
        return f"No track has {what}: --auto-tag was sure of none. Write it into song.json, as {example}."
    return f"No track has {what}. Write it into song.json, as {example}, or let --auto-tag estimate it."


def _spread(values: list[float], unit: str, *, digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"Median {middle:.{digits}f} {unit}, from {low:.{digits}f} to {high:.{digits}f}."


def _coverage(known: int, total: int, made: list) -> str:
    estimated = f", {len(made)} of them by a program's estimate" if made else ""
    return f"Known for {known} of {total} tracks{estimated}."


def _shorten(text: str, length: int = 22) -> str:
    text = plain(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _split_word(split: str) -> str:
    return "held out" if split == "test" else split


def _axes(xlabel: str, ylabel: str = "", *, height: float = 2.9):
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and picks a screen

    figure = Figure(figsize=(4.8, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _legend(axes) -> None:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.figure.legend(loc="outside upper right", ncols=2, frameon=False)


def _histogram(groups: list[tuple[str, list[float]]], *, steps: tuple[float, ...], unit: str):
    """Groups stacked in bins as wide as the first step that makes at most 24 of them."""
    from matplotlib.ticker import MaxNLocator

    groups = [(name, values) for name, values in groups if values]
    low = min(min(values) for _, values in groups)
    high = max(max(values) for _, values in groups)
    wider = (steps[-1] * 2**power for power in itertools.count(1))
    step = next(step for step in itertools.chain(steps, wider) if (high - low) / step <= 24)
    first, last = math.floor(low / step), math.floor(high / step) + 1
    spare = max(0, 8 - (last - first))  # a single value is a bar, not a wall
    first, last = first - spare // 2, last + spare - spare // 2
    figure, axes = _axes(unit, "tracks")
    colours = {"estimated": SECOND}
    axes.hist(
        [values for _, values in groups],
        bins=[step * i for i in range(first, last + 1)],
        stacked=True,
        rwidth=0.9,
        color=[colours.get(name, FIRST) for name, _ in groups],
        label=[name for name, _ in groups],
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GRID)
    _legend(axes)
    return figure


def _svg(figure, name: str):
    """The figure for an HTML page: its colours and font are the page's, its ids are the page's only ones."""
    from markupsafe import Markup

    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<g) id="[^"]*"', r"\1", text)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", text)
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    text = re.sub(r'(<svg [^>]*?)\bwidth="[^"]*"|(<svg [^>]*?)\bheight="[^"]*"', r"\1\2", text)
    text = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text)
    for drawn, shown in PAGE_COLOURS.items():
        text = text.replace(drawn, shown)
    return Markup(text.strip())
