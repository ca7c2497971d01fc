"""The page and the card that a dataset build leaves: complete, safe whatever the names are, the same every time."""

import copy
import html
import itertools
import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from acestep_pipeline.data.building.report_card import escape_markdown, hub_license, render_card
from acestep_pipeline.data.building.report_page import WAVEFORM_ALPHABET, render_report

VOID = {"meta", "link", "input", "br", "hr", "img", "source"}
HOSTILE = [
    "</script><script>alert(1)</script>.ogg",
    '"><img src=x onerror=alert(1)>.ogg',
    "a | b `c` *d* [e](javascript:f) _g_ <h>.ogg",
    "夜に駆ける 🎸.ogg",
    "שיר \u202eעברי.ogg",
    "two\\nlines & more.ogg",
    "{{ 7 * 7 }} {% raw %}.ogg",
    "<!-- <script x.ogg",
    "</script x.ogg",
]


def measured(loudness: float | None = -14.2) -> dict:
    return {"duration_s": 90.0, "peak_db": -0.3, "rms_db": -15.0, "loudness_lufs": loudness, "clipped": 0.0,
            "leading_silence_s": 0.0, "trailing_silence_s": 0.0, "dc_offset": 0.0, "bandwidth_hz": 19000.0,
            "waveform": [level % 100 for level in range(120)]}  # fmt: skip


def track(id: str, **changes) -> dict:
    return {"id": id, "tags": "heavy metal, guitar", "language": "unknown", "genre": "metal", "bpm": 120,
            "keyscale": "E minor", "timesignature": "4", "duration_s": 90.0, "sample_rate": 44100, "channels": 2,
            "sha256": "0" * 64, "has_lyrics": False, "split": "train", "sampling_weight": 1.0, "machine_made": [],
            "estimates": {}, "title": "", "artist": "", "rights_holder": "Obsidian Shell", "isrc": "",
            "license": "CC-BY-SA-3.0", "source": "Elysia", "measured": measured()} | changes  # fmt: skip


def content(tracks: list[dict], findings: list[tuple[str, str, str]] = (), **changes) -> dict:
    genres: dict[str, dict] = {}
    for one in tracks:
        total = genres.setdefault(one["genre"] or "(no genre)", {"tracks": 0, "minutes": 0.0, "weight": 1.0})
        total["tracks"] += 1
        total["minutes"] += one["duration_s"] / 60
    options = {"genre_from_folder": True, "auto_tag": False, "captioner": None, "balance": 0.0, "holdout": 0.1,
               "min_duration_s": 0.0, "link": False}  # fmt: skip
    found = [{"track": name, "severity": severity, "reason": reason} for name, severity, reason in findings]
    return {"version": "0.1.0", "fingerprint": "ab" * 32, "validated": True, "sources": ["my_music"],
            "options": options, "genres": genres, "findings": found, "tracks": tracks} | changes  # fmt: skip


class Page(HTMLParser):
    """A page's elements, its text outside scripts and styles, and whether what was opened was closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.problems: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes something else")

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])

    def rows(self) -> list[dict]:
        """The table's rows, by the names that the page's own script gives their values."""
        names = json.loads(f"[{re.search(r'const names = .(.*?).;', self.scripts[1], re.DOTALL)[1]}]")
        return [dict(zip(names, row, strict=True)) for row in self.data["rows"]]


@pytest.fixture(scope="module")
def ordinary() -> dict:
    estimate = {
        "bpm": {"value": 96, "confidence": 0.83, "accepted": True, "by": "librosa 0.11.0"},
        "keyscale": {"value": "D minor", "confidence": 0.41, "accepted": False, "by": "librosa 0.11.0"},
    }
    tracks = [
        track("metal/a.ogg", title="Starfall", artist="Obsidian Shell"),
        track("metal/b.ogg", split="test", measured=measured(-9.0)),
        track("electronic/c.ogg", genre="electronic", bpm=96, keyscale=None, machine_made=["bpm"], estimates=estimate,
              license="GPL-2.0-or-later", rights_holder="", source="", has_lyrics=True, language="no"),
    ]  # fmt: skip
    findings = [
        ("metal/broken.ogg", "error", "the file is truncated"),
        ("metal/copy of it.ogg", "error", "it is an exact copy of metal/a.ogg"),
        ("metal/other copy.ogg", "error", "it is an exact copy of metal/b.ogg"),
        ("metal/a.ogg", "warning", "it is clipped: 0.3 % of its samples are cut off"),
        ("metal/b.ogg", "warning", "it is clipped: 1.7 % of its samples are cut off"),
        ("metal/b.ogg", "note", "it is mono"),
    ]
    return content(tracks, findings)


@pytest.fixture(scope="module")
def page(ordinary) -> Page:
    return Page(render_report(ordinary, {"metal/a.ogg": "audio/a.ogg"}))


def test_the_page_is_well_formed_and_asks_for_nothing_else(page):
    assert page.problems == []
    loaded = [attributes[name] for _, attributes in page.elements for name in ("src", "href") if name in attributes]
    assert loaded and all(address.startswith("#") for address in loaded)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_equal_content_gives_equal_bytes(ordinary):
    again = copy.deepcopy(ordinary)
    urls = {"metal/a.ogg": "audio/a.ogg"}
    assert render_report(ordinary, urls) == render_report(again, dict(urls))
    assert render_card(ordinary) == render_card(again)
    assert ordinary == again  # and it was not written to


def test_the_page_begins_with_numbers_and_every_finding(page, ordinary):
    for words in (
        "Tracks 3 1 held out",
        "Music 4.5 min",
        "Genres 2",
        "Rejected 3",
        "With a warning 2",
        "abababababab",
    ):
        assert words in page.text
    assert "-14.2 LUFS" in page.text  # the median of -14.2, -14.2 and -9
    order = [page.text.index(words) for words in ("Rejected (3)", "Warnings (2)", "Notes (1)", "Minutes by genre")]
    assert order == sorted(order)
    for finding in ordinary["findings"]:
        assert finding["track"] in page.text and finding["reason"] in page.text


def test_reasons_that_differ_in_numbers_and_names_are_one_group(page):
    summaries = re.findall(r"(\d+) × (.+?) metal/", page.text)
    assert ("2", "it is an exact copy of …") in summaries
    assert ("2", "it is clipped: … % of its samples are cut off") in summaries
    assert ("1", "the file is truncated") in summaries  # alone, it keeps its own words


def test_each_track_is_a_row_with_all_that_is_known(page):
    first, second, third = page.rows()
    assert (first["title"], first["artist"], first["duration"], first["loudness"]) == (
        "Starfall",
        "Obsidian Shell",
        90.0,
        -14.2,
    )
    assert (first["url"], second["url"], second["split"]) == ("audio/a.ogg", "", "test")
    assert page.data["genres"][third["genre"]] == "electronic"
    assert page.data["licences"][third["licence"]] == "GPL-2.0-or-later"
    assert [(severity, page.data["reasons"][i]) for severity, i in second["findings"]] == [
        ("warning", "it is clipped: 1.7 % of its samples are cut off"), ("note", "it is mono")]  # fmt: skip


def test_a_program_s_values_are_marked_with_their_confidence(page):
    first, _, third = page.rows()
    assert (first["bpmShown"], first["keyShown"]) == ("120", "E minor")
    assert (third["bpmShown"], third["bpm"]) == ("≈96 (83 %)", 96)
    assert (third["keyShown"], third["key"]) == ("D minor? (41 %)", None)


def test_the_waveform_survives_its_short_form(page):
    levels = [WAVEFORM_ALPHABET.index(letter) / 63 for letter in page.rows()[0]["waveform"]]
    assert levels == pytest.approx([(level % 100) / 99 for level in range(120)], abs=1 / 63)


def test_hostile_names_stay_text():
    tracks = [track(name, title=name, artist=name, genre=name, tags=name, license=name, source=name)
              for name in HOSTILE]  # fmt: skip
    findings = [(f"rejected {name}", "error", f"it is like {name}") for name in HOSTILE]
    text = render_report(content(tracks, findings, sources=HOSTILE), {name: name for name in HOSTILE})
    hostile, harmless = Page(text), Page(render_report(content([track("a.ogg")]), {}))
    assert hostile.problems == []
    assert "<" not in hostile.scripts[0]  # whatever a browser takes for the end of a script begins with it
    for tag in ("script", "img", "h"):
        assert sum(name == tag for name, _ in hostile.elements) == sum(name == tag for name, _ in harmless.elements)
    assert not [name for _, attributes in hostile.elements for name in attributes if name.startswith("on")]
    for name, row in zip(HOSTILE, hostile.rows(), strict=True):
        assert row["id"] == row["title"] == row["url"] == name
        assert f"rejected {' '.join(name.split())}" in hostile.text
    assert "49" not in hostile.text.split("At a glance")[0]


def test_line_ends_and_halves_of_surrogates_can_be_written_as_utf_8():
    strange = content([track("a\nb\ud800.ogg", title="c\x00\x1b[31m", license="d\r\ne", genre="\udfff")])
    strange["findings"] = [{"track": "x\ud800", "severity": "error", "reason": "bad \udc80 name"}]
    page = Page(render_report(strange, {}))
    assert page.rows()[0]["id"] == "a\\nb\\ud800.ogg"
    assert "x\\ud800" in page.text
    render_report(strange, {}).encode()
    assert "d\\\\r\\\\ne" in render_card(strange)
    render_card(strange).encode()


def test_every_chart_is_drawn_with_text_that_can_be_read(page):
    assert [tag for tag, _ in page.elements].count("svg") == 5
    for words in ("minutes", "BPM", "key (circle of fifths)", "LUFS", "held out", "estimated", "electronic"):
        assert any(words == word.strip() for word in page.words), words
    assert "Median 120 BPM, from 96 to 120. Known for 3 of 3 tracks, 1 of them by a program's estimate." in page.text
    assert "Most frequent: E minor (2). Known for 2 of 3 tracks." in page.text


@pytest.mark.parametrize(
    ("auto_tag", "validated", "words"),
    [
        (False, False, ["let --auto-tag estimate it", "Build with --validate-audio to measure"]),
        (True, True, ["--auto-tag was sure of none", "No track is long or loud enough"]),
    ],
)
def test_a_chart_without_data_says_how_to_get_it(auto_tag, validated, words):
    bare = track("a.ogg", bpm=None, keyscale=None, measured=measured(None) if validated else None)
    bare = content([bare], validated=validated)
    bare["options"]["auto_tag"] = auto_tag
    page = Page(render_report(bare, {}))
    assert [tag for tag, _ in page.elements].count("svg") == 2
    assert all(sentence in page.text for sentence in words)
    assert ("Build again with --validate-audio" in page.text) is not validated


def test_extreme_values_and_other_modes_are_drawn():
    tracks = [
        track("a", bpm=30, keyscale="D dorian", duration_s=0.2),
        track("b", bpm=300, keyscale="G# minor", duration_s=36_000),
    ]
    tracks += [track(f"g{i}", genre=f"genre {i:02d} $x_{i}$ with a long name") for i in range(40)]
    page = Page(render_report(content(tracks), {}))
    assert page.problems == []
    assert "Not drawn: D dorian (1)." in page.text
    assert "23 more" in page.words  # of 41 genres, 18 have a bar of their own
    assert "11 h 00 min" in page.text
    assert any(word.startswith("genre 00 $x_0$") for word in page.words)


def test_the_page_of_thousands_of_tracks_stays_small():
    tracks = [track(f"metal/{i:05d}.ogg") for i in range(2000)]
    findings = [(f"metal/{i:05d}.ogg", "warning", f"it ends with {i}.0 s of silence") for i in range(2000)]
    text = render_report(content(tracks, findings), {one["id"]: f"audio/{one['id']}" for one in tracks})
    assert len(text.encode()) < 2000 * 1000  # 20 MB for 20,000
    assert text.count("<audio") == 0  # a player is made when it is asked for


# --- the card -------------------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def cells(card: str, heading: str) -> list[list[str]]:
    """The first table below a heading, its cells as Markdown shows them."""
    lines = card.split(f"{heading}\n", 1)[1].splitlines()
    below = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    table = itertools.takewhile(lambda line: line.startswith("|"), below)
    return [[shown(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def shown(markdown: str) -> str:
    return html.unescape(re.sub(r"\\([!-/:-@[-`{-~])", r"\1", markdown))


def test_the_card_begins_with_what_the_hub_reads(ordinary):
    fields = front_matter(render_card(ordinary))
    assert fields == {"license": "other", "license_name": "see-sources-and-licences", "language": ["no"],
                      "task_categories": ["text-to-audio"], "tags": ["music", "ace-step"],
                      "size_categories": ["n<1K"]}  # fmt: skip
    many = content([track(f"{i}.ogg") for i in range(1000)])
    assert front_matter(render_card(many))["size_categories"] == ["1K<n<10K"]
    assert front_matter(render_card(many))["license"] == "cc-by-sa-3.0"


@pytest.mark.parametrize(
    ("stated", "identifier"),
    [
        (["CC-BY-SA-3.0", "CC BY-SA 3.0", "http://creativecommons.org/licenses/by-sa/3.0/"], "cc-by-sa-3.0"),
        (["https://creativecommons.org/publicdomain/zero/1.0/"], "cc0-1.0"),
        (["GPL-2.0-only"], "gpl-2.0"),
        (["GPL-2.0-or-later"], "other"),
        (["CC-BY-4.0", "CC-BY-3.0"], "other"),
        (["CC-BY-4.0", ""], "other"),
        (["All rights reserved"], "other"),
        (["https://creativecommons.org/licenses/by-sa/3.0/de/"], "other"),
    ],
)
def test_one_licence_of_all_tracks_is_the_card_s_licence(stated, identifier):
    assert hub_license([track("a", license=text) for text in stated]) == identifier


def test_the_card_counts_by_genre_split_and_rights(ordinary):
    card = render_card(ordinary)
    assert ["metal", "2", "3.0", "1", "1.00"] in cells(card, "## What is in it")
    assert "| train | 2 | 3.0 |" in card and "| test | 1 | 1.5 |" in card
    assert "| (instrumental) | 2 |" in card and "| no | 1 |" in card
    assert cells(card, "## Sources and licences")[2:] == [
        ["Elysia", "Obsidian Shell", "CC-BY-SA-3.0", "2", "3.0"],
        ["(not stated)", "(not stated)", "GPL-2.0-or-later", "1", "1.5"],
    ]
    assert ["bpm", "1", "librosa 0.11.0", "83 %"] in cells(card, "### Written by programs")
    assert ["it is an exact copy of …", "2"] in cells(card, "### Rejected")
    assert "- metal/copy of it.ogg: it is an exact copy of metal/a.ogg" in card


def test_tracks_without_rights_are_named_up_to_two_hundred():
    few, many = (content([track(f"{i:03d}.ogg", license=" ", rights_holder="") for i in range(n)]) for n in (200, 205))
    assert "### Tracks without a stated licence: 200" in render_card(few)
    assert "more, which" not in render_card(few)
    card = render_card(many)
    assert "### Tracks without a stated rights holder: 205" in card
    assert card.count("- 199.ogg") == 2 and "- 200.ogg" not in card
    assert card.count("- and 5 more, which `report.json` names.") == 2
    complete = render_card(content([track("a.ogg")]))
    assert "### Tracks without a stated licence: 0\n\nEvery track has one." in complete


def test_what_the_build_can_t_know_is_left_for_the_user(ordinary):
    summary = render_card(ordinary).split("## Summary of the content used for training")[1]
    assert "Article 53(1)(d) of Regulation (EU) 2024/1689" in summary
    rows = dict(row[:2] for row in cells(summary, "### 1. General information"))
    blanks = [name for name, value in rows.items() if value.startswith("**to be filled in by you**")]
    assert [name[:3] for name in blanks] == ["1.1", "1.1", "1.2", "1.2", "1.2", "1.3"]
    assert rows["1.3 Modalities"] == "audio, text"
    assert rows["1.3 Size, audio"].startswith("0.07 hours (range of the template: less than 10 000 hours)")
    assert ["3.1 Tracks without a stated licence", "0 of 3, named above"] in cells(
        summary, "### 3. Processing of the data"
    )


def test_the_card_tells_how_to_load_and_train(ordinary):
    card = render_card(ordinary)
    assert "accelerate launch train_ace_step_lora.py --preset c --train_data_dir DIR" in card
    assert 'dataset["train"][0]' in card and '["bytes"]' in card
    linked = content([track("a.ogg")])
    linked["options"]["link"] = True
    assert "track = dataset[0]" in render_card(linked) and '["path"]' in render_card(linked)
    for block in re.findall(r"```python\n(.*?)```", card + render_card(linked), re.DOTALL):
        compile(block, "card", "exec")


def test_hostile_names_don_t_break_the_card():
    tracks = [
        track(name, genre=name, license="", rights_holder=name, source="1. one\n# two | three") for name in HOSTILE
    ]
    card = render_card(content(tracks, [(name, "error", f"bad: {name}") for name in HOSTILE], sources=HOSTILE))
    rights = cells(card, "## Sources and licences")[2:]
    assert {tuple(row[:2]) for row in rights} == {("1. one\\n# two | three", name) for name in HOSTILE}
    assert all(len(row) == 5 for row in rights)
    named = card.split("### Tracks without a stated licence")[1].split("###")[0]
    assert [shown(line[2:]) for line in named.splitlines() if line.startswith("- ")] == HOSTILE
    assert not re.search(r"(?<!\\)<(script|img|h|!--)", card)


@pytest.mark.parametrize("text", ["1. one", "- two", "# three", "+ four", "> five", "=== six", "10) seven", "2.5"])
def test_a_name_is_never_a_list_a_heading_or_a_rule(text):
    escaped = escape_markdown(text)
    assert shown(escaped) == text
    assert not re.match(r"\d+[.)] |[-+#>=]", escaped)
