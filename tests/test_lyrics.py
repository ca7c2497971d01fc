"""Timed lyrics: what is LRC, and which words are sung in a window."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_pipeline.data.latent_cache import plan_windows
from acestep_pipeline.data.text.lyrics import LONGEST_LINE_S, cut_to_window, is_timed, lines_beyond

SONG = """\ufeff[ar:Die Funkhäuser]
[ti: Nachts]
[length: 02:00]
[00:00.00][Intro]
[00:10.00][Verse 1]
[00:10.00]Grüße aus dem Funkhaus
[00:14.50]<00:14.50>Wir <00:15.20>senden <00:16.00>noch
[00:19.00]
[Chorus]
[00:20.00][01:20.00]Heute Nacht
[00:25.00][01:25.00]sind alle wach

[00:30.00]
[00:50.00][Verse 2]
[01:00.00]Und morgen
[01:05.00]schlafen wir
[01:50.00][Outro]
"""


def cut(text, start_s=0.0, end_s=120.0, *, song_s=120.0):
    return cut_to_window(text, start_s, end_s, song_s=song_s)


def seconds(time_s):
    return f"[{int(time_s) // 60:02}:{time_s % 60:05.2f}]"


# --- What is timed


@pytest.mark.parametrize(
    "text",
    [
        SONG,
        "[0:01]a\n[0:02]b",
        "[00:01.5]a\r\n[00:02.5]b",
        "[00:01:50] a\n  [00:02:50] b",
        "[ 00:01.00 ] a\n[123:02.000] b",
    ],
)
def test_lines_with_stamps_are_timed(text):
    assert is_timed(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[Instrumental]",
        "[verse]\nla la\n[chorus]\nla",
        "[00:10.00]only one line has a stamp\nand this has none",
        "[00:75.00]no such second\n[00:76.00]nor this",
        "we met at [00:10] and [00:20]\nnot at [00:30]",
        "10:00 a\n11:00 b",
        "[1:2:3:4]a\n[x:10]b\n[10]c",
    ],
)
def test_other_lyrics_are_not_and_come_back_as_they_are(text):
    assert not is_timed(text)
    assert cut(text, 30.0, 60.0) == text
    assert lines_beyond(text, 1.0) == 0


# --- What is sung


def test_a_whole_song_is_all_of_its_lines_without_stamps():
    assert cut(SONG) == (
        "[Intro]\n[Verse 1]\nGrüße aus dem Funkhaus\nWir senden noch\n[Chorus]\nHeute Nacht\nsind alle wach\n"
        "[Verse 2]\nUnd morgen\nschlafen wir\n[Chorus]\nHeute Nacht\nsind alle wach\n[Outro]"
    )


@pytest.mark.parametrize(
    ("start_s", "end_s", "expected"),
    [
        (10.0, 20.0, "[Verse 1]\nGrüße aus dem Funkhaus\nWir senden noch"),
        (13.0, 23.0, "[Verse 1]\nWir senden noch\n[Chorus]\nHeute Nacht"),
        (12.0, 22.0, "[Verse 1]\nGrüße aus dem Funkhaus\nWir senden noch"),
        (25.0, 45.0, "[Chorus]\nsind alle wach"),
        (85.0, 105.0, "[Chorus]\nsind alle wach"),
        (30.0, 60.0, "[Instrumental]"),
        (0.0, 10.0, "[Instrumental]"),
        (95.0, 120.0, "[Instrumental]"),
        (40.0, 70.0, "[Verse 2]\nUnd morgen\nschlafen wir"),
        (62.0, 82.0, "[Verse 2]\nUnd morgen\nschlafen wir"),
        (62.6, 82.6, "[Verse 2]\nschlafen wir\n[Chorus]\nHeute Nacht"),
        (20.0, 22.0, "[Chorus]\nHeute Nacht"),
        (22.0, 24.0, "[Chorus]\nHeute Nacht"),
    ],
)
def test_a_window_has_the_lines_that_are_heard_in_it_under_their_structure_tag(start_s, end_s, expected):
    assert cut(SONG, start_s, end_s) == expected


def test_lines_are_sorted_by_time_whatever_their_order_in_the_file():
    assert cut("[00:20]c\n[00:05]a\n[00:10]b") == "a\nb\nc"


def test_an_offset_moves_every_stamp_and_a_positive_one_makes_them_earlier():
    text = "[offset:{}]\n[00:10.00]a\n[00:20.00]b\n[00:30.00]"
    assert cut(text.format("+2000"), 8.0, 18.0) == "a"
    assert cut(text.format("2000"), 18.0, 28.0) == "b"
    assert cut(text.format("-2000"), 22.0, 32.0) == "b"
    assert cut(text.format("-2000"), 8.0, 12.0) == "[Instrumental]"
    assert cut(text.format("99999"), 0.0, 10.0) == "a\nb", "none begins before the song"


def test_a_line_before_a_solo_is_not_sung_through_it():
    text = "[00:10]a\n[01:00]b\n[01:05]"
    assert cut(text, 10.0 + LONGEST_LINE_S, 60.0) == "[Instrumental]"
    assert cut(text, 10.0, 40.0) == "a"


def test_the_last_line_sounds_to_the_end_of_the_song_however_near():
    assert cut("[00:10]a\n[01:59.90]b", 60.0, 120.0) == "b"


def test_two_languages_under_one_stamp_stay_together():
    text = "[00:10]guten Morgen\n[00:10]good morning\n[00:14]Ende\n[00:14]end\n[00:18]"
    assert cut(text, 5.0, 13.0) == "guten Morgen\ngood morning"


def test_words_without_a_stamp_go_on_with_the_line_before_them():
    text = "[00:10.00]\n[Verse]\none\ntwo\nthree\n[00:40.00]\n[Chorus]\nfour\n[00:50.00]"
    assert cut(text) == "[Verse]\none\ntwo\nthree\n[Chorus]\nfour"
    assert cut(text, 20.0, 40.0) == "[Verse]\none\ntwo\nthree", "three lines may last three times as long"
    assert cut(text, 42.0, 60.0) == "[Chorus]\nfour"
    assert cut("before any stamp\n[00:10]a\n[00:20]b", 0.0, 10.0) == "before any stamp"


def test_a_malformed_stamp_is_no_lyric_and_no_structure_tag():
    assert cut("[00:00][by:me]\n[00:10.00]a\n[00:99.00]b\n[00:20.00]c [00:21.x] <0:22>d") == "a\nb\nc [00:21.x] d"


def test_a_tag_and_words_on_one_line_are_two():
    assert cut("[00:10.00][Chorus] la la\n[00:14.00][Bridge: soft] lo") == "[Chorus]\nla la\n[Bridge: soft]\nlo"


def test_stamps_without_words_are_instrumental():
    assert cut("[00:10.00]\n[00:20.00]\n[00:30.00][Solo]") == "[Instrumental]"


def test_lines_after_the_end_are_counted():
    assert lines_beyond(SONG, 120.0) == 0
    assert lines_beyond(SONG, 85.0) == 1
    assert lines_beyond(SONG, 80.0) == 2
    assert "sind alle wach" not in cut(SONG, 60.0, 85.0, song_s=85.0)


# --- Whatever the lyrics


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 2999), min_size=2, max_size=40, unique=True),
    st.integers(1000, 3000),
    st.integers(20, 600),
)
def test_every_line_is_in_one_of_the_windows_that_cover_the_song(tenths, song, crop):
    """Times in tenths of a second; each line is a word of its own."""
    crop = min(crop, song)
    text = "\n".join(f"{seconds(time / 10)}word{time}" for time in tenths)
    heard = set()
    for start in plan_windows(song, crop):
        words = cut(text, start / 10, (start + crop) / 10, song_s=song / 10).split()
        times = [int(word.removeprefix("word")) for word in words if word != "[Instrumental]"]
        assert times == sorted(times) and all(time < start + crop for time in times)
        heard.update(times)
    sung = {time for time in tenths if time < song}
    assert heard == sung
    assert lines_beyond(text, song / 10) == len(tenths) - len(sung)


PIECES = st.sampled_from(
    ["[00:10.00]", "[01:00]", "[99:59.999]", "[00:61]", "<00:11.5>", "[", "]", "[[", "<", "[Chorus]", "[ar:x]", "\n"]
    + ["[offset:-5]", "[offset:x]", "[offset:99999999999]", "la la", "\u2028", "\r", "\x00", "🎵", "[]", ":", "٣", " "]
)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)),
    st.floats(0, 600),
    st.floats(0.04, 600),
    st.floats(0.04, 600),
)
def test_no_text_breaks_it_and_no_stamp_is_left(text, start_s, duration_s, song_s):
    words = cut(text, start_s, start_s + duration_s, song_s=song_s)
    assert words or not text
    lines_beyond(text, song_s)
    if is_timed(text):
        assert not is_timed(words)
        assert "[00:10.00]" not in words and "<00:11.5>" not in words
