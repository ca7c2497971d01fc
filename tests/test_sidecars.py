"""The text beside a track: which file is believed, in which encoding and spelling, and what is said about the rest."""

import json
import os
import time

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_pipeline.data.text.fields import text_fields
from acestep_pipeline.data.text.languages import detect_language, normalise_language
from acestep_pipeline.data.text.musical_terms import bpm_in_tag, keyscale_in_tag, parse_keyscale, timesignature_in_tag
from acestep_pipeline.data.text.normalisation import (
    RIGHTS_FIELDS,
    TEXT_FIELDS,
    normalise_lyrics,
    normalise_rights,
    normalise_tags,
    normalise_text,
)
from acestep_pipeline.data.text.sidecars import match_sidecars, read_sidecars
from acestep_pipeline.data.text.tables import read_tables
from acestep_pipeline.data.text.text_files import TextError, decode_text
from acestep_pipeline.data.tracks import Rights, load_tracks

CHORUS = "[chorus]\nWe walked along the river in the evening light\nand never came back home again"


def write_clip(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(os.fsencode(path), np.random.default_rng(0).normal(0, 0.05, 4000), 8000, format="WAV")
    return path


@pytest.fixture
def song(tmp_path):
    return write_clip(tmp_path / "song.wav")


def beside(song, suffix, content):
    path = song.with_name(song.stem + suffix)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_one(folder):
    """The only track of `folder` and the reasons given about it."""
    (track,), problems = load_tracks(folder, show_progress=False)
    return track, [problem.reason for problem in problems]


def sidecar_fields(song):
    matched, unmatched = match_sidecars(os.listdir(song.parent), [song.name])
    assert not unmatched
    return read_sidecars(song.parent, matched[song.name])


def table_fields(folder, tracks=("song.wav", "deep/other.wav")):
    names = os.listdir(folder)
    jsons = [name for name in names if name.endswith(".json")]
    fields, warnings, _ = read_tables(folder, names, jsons, list(tracks))
    return fields, [f"{name}: {warning}" for name, warning in warnings]


# --- Which sidecar is believed


def test_each_sidecar_overrules_the_one_before(song):
    beside(song, ".json", '{"tags": "from json", "lyrics": "json words", "genre": "folk"}')
    assert sidecar_fields(song)[0] == {"tags": "from json", "lyrics": "json words", "genre": "folk"}
    beside(song, ".caption.txt", "from caption")
    assert sidecar_fields(song)[0]["tags"] == "from caption"
    beside(song, ".txt", "from txt")
    assert sidecar_fields(song)[0]["tags"] == "from txt"
    beside(song, ".tags.txt", "from tags.txt")
    beside(song, ".lrc", "[00:01.00]timed words")
    assert sidecar_fields(song)[0]["lyrics"] == "[00:01.00]timed words"
    beside(song, ".lyrics.txt", "sung words")
    assert sidecar_fields(song) == ({"tags": "from tags.txt", "lyrics": "sung words", "genre": "folk"}, [])


def test_sources_fill_each_other_field_by_field(song):
    """Sidecars, then the table, then the tags in the file."""
    with soundfile.SoundFile(song, "w", 8000, 1, format="WAV") as sound:
        sound.title, sound.artist, sound.genre, sound.copyright = "Inner", "Inner Artist", "Polka", "Inner Ltd"
        sound.write(np.random.default_rng(0).normal(0, 0.05, 4000))
    (song.parent / "metadata.csv").write_text("file_name,artist,title,bpm\nsong.wav,Table Artist,Table,100\n")
    beside(song, ".json", '{"title": "Side"}')
    track, reasons = read_one(song.parent)
    assert (track.rights, track.bpm, track.genre) == (Rights("Side", "Table Artist", "Inner Ltd"), 100, "Polka")
    assert reasons == ["it has no tags and trains with its genre alone; describe it in a .tags.txt beside it"]


@pytest.mark.parametrize("name", ["tags", "caption", "prompt", "Caption"])
def test_json_names_tags_in_many_ways(song, name):
    beside(song, ".json", f'{{"{name}": "jazz", "key": "A minor", "Time Signature": 3, "vocal_language": "de"}}')
    track, reasons = read_one(song.parent)
    assert (track.tags, track.keyscale, track.timesignature, track.language) == ("jazz", "A minor", "3", "de")
    assert not reasons


def test_side_steps_text_file_gives_every_field(song):
    beside(song, ".txt", "caption: slow, warm\ngenre: soul\nbpm: 72\nkey: Bb minor\nsignature: 4/4\ncustom_tag: zzz\n"
           "lyrics:\n[Verse]\nTitle: not a field here\nla la\n")  # fmt: skip
    track, reasons = read_one(song.parent)
    assert (track.tags, track.genre, track.bpm, track.keyscale) == ("slow, warm", "soul", 72, "Bb minor")
    assert track.trigger_word == "zzz"
    assert (track.timesignature, track.lyrics) == ("4", "[Verse]\nTitle: not a field here\nla la")
    assert not reasons


@pytest.mark.parametrize(
    ("content", "field", "expected"),
    [
        ("bpm: 90, jazz, piano", "tags", "jazz, piano"),
        ("jazz\nkey: A minor", "tags", "jazz"),
        ("note to self: jazz", "tags", "note to self: jazz"),
        (CHORUS, "lyrics", CHORUS),
        ("[00:12.00] words", "lyrics", "[00:12.00] words"),
        ("caption: long\nstory", "tags", "long, story"),
    ],
)
def test_a_plain_text_file_is_tags_lyrics_or_pairs_by_what_it_holds(song, content, field, expected):
    beside(song, ".txt", content)
    assert getattr(read_one(song.parent)[0], field) == expected


@pytest.mark.parametrize(
    "name", ["SONG.Tags.TXT", "song.wav.tags.txt", "Song.WAV.txt", "song.wav.json", "song.CAPTION"]
)
def test_case_and_double_endings_do_not_matter(song, name):
    (song.parent / name).write_text('{"tags": "jazz"}' if name.endswith("json") else "jazz")
    track, reasons = read_one(song.parent)
    assert (track.tags, reasons) == ("jazz", [])


def test_a_name_in_the_other_unicode_form_is_the_same_name():
    matched, unmatched = match_sidecars(["gro\u0308sse.txt", "gr\u00f6sse.wav"], ["gr\u00f6sse.wav"])
    assert matched == {"gr\u00f6sse.wav": {"text": ["gro\u0308sse.txt"]}} and not unmatched


def test_files_of_one_stem_share_a_sidecar_and_the_closest_name_wins():
    audio = ["song.mp3", "song.flac", "Song.wav", "mix.tags.mp3"]
    names = ["song.txt", "song.mp3.txt", "SONG.lrc", "mix.tags.txt", "mixx.json", "song.v2.txt"]
    matched, unmatched = match_sidecars([*names, *audio], audio)
    assert matched["song.mp3"] == {"text": ["song.mp3.txt", "song.txt"], "lrc": ["SONG.lrc"]}
    assert matched["song.flac"] == {"text": ["song.txt"], "lrc": ["SONG.lrc"]}
    assert matched["Song.wav"] == {"lrc": ["SONG.lrc"]}, "song.txt names other files exactly"
    assert matched["mix.tags.mp3"] == {"text": ["mix.tags.txt"]}
    assert unmatched == ["mixx.json", "song.v2.txt"]


def test_twenty_thousand_tracks_in_one_directory_are_matched_in_a_moment():
    audio = [f"{index:05}.mp3" for index in range(20_000)]
    names = [name.replace("mp3", end) for name in audio for end in ("tags.txt", "json")]
    start = time.process_time()
    matched, unmatched = match_sidecars([*audio, *names], audio)
    assert len(matched) == 20_000 and not unmatched
    assert time.process_time() - start < 10, "seconds; quadratic matching takes minutes"


def test_text_that_belongs_to_no_track_is_named(song, tmp_path):
    for name in ("sing.tags.txt", "LICENSE.md", "README.txt", "requirements-dev.txt", "x.license.txt", ".hidden.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "lyrics").mkdir()
    for index in range(13):
        (tmp_path / "lyrics" / f"{index:02}.txt").write_text("x")
    beside(song, ".tags.txt", "jazz")
    _, problems = load_tracks(tmp_path, show_progress=False)
    said = {problem.track: problem.reason for problem in problems}
    assert said.pop("sing.tags.txt") == "it belongs to no audio file here; is it misspelt?"
    assert said.pop("lyrics") == "3 more text files here belong to no audio file"
    assert said.keys() == {f"lyrics/{index:02}.txt" for index in range(10)}


# --- Encodings and sizes


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", "größe 🎹"), ("utf-8-sig", "größe"), ("utf-16", "größe"), ("utf-32", "größe"), ("cp1252", "Größe"),
        ("latin-1", "ñandú, ¿dónde?"), ("cp1252", "“quoted” – dash…"), ("cp932", "さくらの花が咲いて、君と歩いた"),
        ("euc_jp", "さくらの花が咲いて、君と歩いた"), ("cp1251", "Привет, как дела, моя любовь"),
        ("gb18030", "我走在空荡荡的街道上想着你我的心"), ("cp949", "나는 오늘 밤에도 너를 생각하며 걷는다"),
        ("utf-16-le", "plain words"), ("utf-16-be", "plain words"),
    ],
)  # fmt: skip
def test_text_in_any_encoding_is_read_and_a_guess_is_named(song, encoding, text):
    beside(song, ".tags.txt", "jazz")
    beside(song, ".lyrics.txt", text.encode(encoding))
    track, reasons = read_one(song.parent)
    assert track.lyrics == text
    guessed = encoding not in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
    assert [reason.startswith("song.lyrics.txt is not UTF-8 and was read as ") for reason in reasons] == [
        True
    ] * guessed


@pytest.mark.parametrize("junk", [b"\0", bytes(range(256)), b"\xff\xfe\x00", b"PK\x03\x04" + bytes(50)])
def test_what_is_no_text_is_named_and_the_next_source_is_used(song, junk):
    beside(song, ".tags.txt", junk)
    beside(song, ".txt", "jazz")
    track, (reason,) = read_one(song.parent)
    assert track.tags == "jazz"
    assert reason.startswith("song.tags.txt ") and reason.endswith(" and is left out")


def test_a_file_that_is_too_large_for_text_is_named_and_not_read(song):
    beside(song, ".json", '{"tags": "' + "x" * (1 << 20) + '"}')
    beside(song, ".txt", "jazz")
    track, reasons = read_one(song.parent)
    assert (track.tags, reasons) == ("jazz", ["song.json is larger than 1 MB and is left out"])


def test_a_named_pipe_does_not_stop_the_reading(song):
    os.mkfifo(song.with_name("song.txt"))
    beside(song, ".caption", "jazz")
    track, reasons = read_one(song.parent)
    assert (track.tags, reasons) == ("jazz", ["song.txt is not a regular file and is left out"])


JSON_BOMBS = ["[" * 100_000, '{"a":' * 100_000, '{"bpm": ' + "9" * 100_000 + "}"]


@pytest.mark.parametrize("content", ['["jazz"]', '"jazz"', "null", "{", "", *JSON_BOMBS])
def test_json_that_is_no_object_is_named(song, content):
    beside(song, ".json", content)
    beside(song, ".tags.txt", "jazz")
    track, reasons = read_one(song.parent)
    assert (track.tags, reasons) == ("jazz", ["song.json is not a JSON object and is left out"])


# --- What the fields become


def test_lists_are_joined_and_other_values_are_named(song):
    beside(song, ".json", '{"tags": ["jazz", "piano", 1980], "lyrics": ["one", "two"], "genre": {"main": "jazz"}, '
           '"title": NaN, "artist": true, "label": [["x"]]}')  # fmt: skip
    track, reasons = read_one(song.parent)
    assert (track.tags, track.lyrics, track.genre, track.rights) == ("jazz, piano, 1980", "one\ntwo", "", Rights())
    assert reasons == [
        f"its {field} is neither text, a number nor a list of them and is left out"
        for field in ("genre", "title", "artist", "rights_holder")
    ]


def test_half_a_surrogate_pair_does_not_reach_the_tokenizer(song):
    beside(song, ".json", r'{"tags": "jazz \ud83d", "lyrics": "\udc00 words", "language": "\ud83d\ude00"}')
    track, _ = read_one(song.parent)
    assert (track.tags, track.lyrics, track.language) == ("jazz ?", "? words", "😀")


def test_a_track_without_tags_takes_its_genre_or_nothing_and_says_so(song):
    reason = "it has no tags and trains with {}; describe it in a .tags.txt beside it"
    assert read_one(song.parent)[1] == [reason.format("an empty caption")]
    beside(song, ".json", '{"genre": "folk"}')
    track, reasons = read_one(song.parent)
    assert (track.tags, reasons) == ("folk", [reason.format("its genre alone")])
    beside(song, ".tags.txt", " ,\n, 120 bpm")
    track, reasons = read_one(song.parent)
    assert (track.tags, track.bpm, reasons) == ("folk", 120, [reason.format("its genre alone")])


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("Jazz, piano,jazz ,PIANO", "Jazz, piano"),
        ("warm  pads\nslow\r\n\n  warm pads", "warm pads, slow"),
        ("a;b; ,c", "a, b, c"),
        ("- lo-fi\n- hip hop\n• #rain\n", "lo-fi, hip hop, rain"),
        ("ジャズ、ピアノ", "ジャズ, ピアノ"),
        ("cafe\u0301, CAF\u00c9", "caf\u00e9"),
        ("Straße, STRASSE", "Straße"),
        (" \n", ""),
    ],
)
def test_tags_are_trimmed_and_not_repeated(tags, expected):
    assert normalise_tags(tags) == expected


def test_ten_thousand_tags_are_kept_and_said_to_be_many(song):
    beside(song, ".tags.txt", ", ".join(f"tag{index}" for index in range(10_000)))
    track, (reason,) = read_one(song.parent)
    assert track.tags.count(",") == 9_999
    assert reason == "it has 10000 tags, of which the model reads about the first 50; name fewer"


def test_tempo_key_and_time_signature_move_out_of_the_tags(song):
    beside(song, ".tags.txt", "techno, 128bpm, a minor, 4/4, dark")
    track, reasons = read_one(song.parent)
    assert (track.tags, track.bpm, track.keyscale, track.timesignature) == ("techno, dark", 128, "A minor", "4")
    assert not reasons
    beside(song, ".json", '{"bpm": 128, "key": "C minor"}')
    track, reasons = read_one(song.parent)
    assert (track.tags, track.bpm, track.keyscale) == ("techno, dark", 128, "C minor")
    assert reasons == ["its tag 'a minor' contradicts its keyscale C minor and is left out"]


@pytest.mark.parametrize(
    ("tag", "bpm"),
    [("90bpm", 90), ("90 BPM", 90), ("bpm: 90", 90), ("BPM 89.6", 90), ("tempo: 120 bpm", 120), ("500 bpm", None),
     ("90-100 bpm", None), ("90", None), ("bpm", None), ("90s", None), ("120 bpm feel", None)],
)  # fmt: skip
def test_which_tags_are_a_tempo(tag, bpm):
    assert bpm_in_tag(tag) == bpm


@pytest.mark.parametrize(
    ("tag", "keyscale"),
    [("C minor", "C minor"), ("c# min", "C# minor"), ("Am", "A minor"), ("F♯ major", "F# major"),
     ("bb maj", "Bb major"),
     ("key: A minor", "A minor"), ("key of E", "E major"), ("B-flat minor", "Bb minor"), ("D-Dur", "D major"),
     ("Ebm", "Eb minor"), ("key: 8A", "A minor"), ("E", None), ("am", None), ("AM", None), ("minor key", None),
     ("A major chord progression", None), ("8A", None), ("key change", None), ("keys", None), ("D dorian", None),
     ("H minor", None), ("C", None)],
)  # fmt: skip
def test_which_tags_are_a_key(tag, keyscale):
    assert keyscale_in_tag(tag) == keyscale


@pytest.mark.parametrize(
    ("text", "keyscale"),
    [("F#", "F# major"), ("Cm", "C minor"), ("CM", "C major"), ("8A", "A minor"), ("8B", "C major"),
     ("12B", "E major"),
     ("1A", "G# minor"), ("1d", "C major"), ("6m", "G# minor"), ("C minor", "C minor"), ("H", None), ("c", None),
     ("atonal", None), ("13A", None)],
)  # fmt: skip
def test_a_key_field_may_be_written_as_djs_do(text, keyscale):
    assert parse_keyscale(text) == keyscale


def test_a_key_that_is_none_is_named_and_left_out(song):
    beside(song, ".json", '{"tags": "jazz", "keyscale": "D dorian", "bpm": "N/A", "timesignature": "unknown"}')
    track, reasons = read_one(song.parent)
    assert (track.keyscale, track.bpm, track.timesignature) == (None, None, None)
    assert reasons == ["its key 'D dorian' is not a major or minor key such as 'C minor'; left empty"]


@pytest.mark.parametrize(
    ("tag", "beats"), [("4/4", "4"), ("6/8", "6"), ("3/4 time", "3"), ("time signature: 2/4", "2"), ("7/8", None),
                       ("24/7", None), ("4", None), ("12/8", None)]
)  # fmt: skip
def test_which_tags_are_a_time_signature(tag, beats):
    assert timesignature_in_tag(tag) == beats


@pytest.mark.parametrize(
    ("value", "expected"),
    [('"120 BPM"', 120), ('"bpm 96"', 96), ("119.6", 120), ('"30"', 30), ("300", 300), ("null", None), ('""', None)],
)
def test_bpm(song, value, expected):
    beside(song, ".json", f'{{"tags": "jazz", "bpm": {value}}}')
    track, reasons = read_one(song.parent)
    assert (track.bpm, reasons) == (expected, [])


@pytest.mark.parametrize(
    "value", ['"abc"', "5", "0", "301", "NaN", "Infinity", "1e400", "true", '"120-130"', "9" * 4000]
)
def test_a_bpm_that_cannot_be_is_named_and_left_out(song, value):
    beside(song, ".json", f'{{"tags": "jazz", "bpm": {value}}}')
    track, (reason,) = read_one(song.parent)
    assert track.bpm is None and len(reason) < 150
    assert reason.startswith("its bpm ") and reason.endswith(" is not between 30 and 300; left empty")


@pytest.mark.parametrize(
    ("value", "expected"),
    [('"4/4"', "4"), ('" 6 / 8 "', "6"), ("3", "3"), ("4.0", "4"), ('"2"', "2"), ("null", None)],
)
def test_time_signature(song, value, expected):
    beside(song, ".json", f'{{"tags": "jazz", "timesignature": {value}}}')
    track, reasons = read_one(song.parent)
    assert (track.timesignature, reasons) == (expected, [])


def test_a_time_signature_the_model_does_not_know_is_named_and_left_out(song):
    beside(song, ".json", '{"tags": "jazz", "timesignature": "5"}')
    track, reasons = read_one(song.parent)
    assert track.timesignature is None
    assert reasons == ["its time signature '5' is not 2, 3, 4 or 6; left empty"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"custom_tag": "zzz"}, ("jazz", "zzz", "")),
        ({"custom_tag": "zzz", "tag_position": "append"}, ("jazz", "zzz", "append")),
        ({"trigger_word": " zzz ", "trigger_position": "Replace"}, ("jazz", "zzz", "replace")),
        ({"genre": "bop", "prompt_override": "genre"}, ("bop", "", "")),
    ],
)
def test_a_track_may_have_a_trigger_word_of_its_own(song, values, expected):
    beside(song, ".json", json.dumps({"caption": "jazz"} | values))
    track, reasons = read_one(song.parent)
    assert (track.tags, track.trigger_word, track.trigger_position) == expected
    assert not reasons or "prompt_override" in values, "only the genre is no description"


def test_a_position_that_cannot_be_is_named(song):
    beside(song, ".json", '{"tags": "jazz", "custom_tag": "zzz", "tag_position": "middle"}')
    track, reasons = read_one(song.parent)
    assert (track.trigger_word, track.trigger_position) == ("zzz", "")
    assert reasons == ["its trigger_position 'middle' is not prepend, append, replace; left empty"]


# --- Lyrics and language


@pytest.mark.parametrize(
    "lyrics", ["", " \n", "[Instrumental]", "instrumental", "(INSTRUMENTAL)", "[inst]", "{Instrumental}"]
)
def test_no_lyrics_means_instrumental(lyrics):
    assert normalise_lyrics(lyrics) == "[Instrumental]"


def test_an_empty_lyrics_file_says_that_nobody_sings(song):
    beside(song, ".json", '{"tags": "jazz", "lyrics": "json words"}')
    assert read_one(song.parent)[0].lyrics == "json words"
    beside(song, ".lyrics.txt", " \n")
    assert read_one(song.parent)[0].lyrics == "[Instrumental]"


def test_is_instrumental_is_believed_over_the_lyrics_beside_it(song):
    beside(song, ".json", '{"tags": "jazz", "lyrics": "noise of a transcriber", "is_instrumental": true}')
    assert read_one(song.parent)[0].lyrics == "[Instrumental]"


def test_lyrics_keep_their_structure_and_have_unix_line_ends():
    timed = "[00:12.34]One\r\n[00:15.00]<00:15.10>two\rthree\u2028[Chorus]"
    assert normalise_lyrics(timed) == "[00:12.34]One\n[00:15.00]<00:15.10>two\nthree\n[Chorus]"


@pytest.mark.parametrize(
    ("text", "code"),
    [("English", "en"), ("eng", "en"), ("en-US", "en"), ("EN_us", "en"), ("zh-Hans", "zh"), ("zh-yue", "yue"),
    ("ja", "ja"), ("Deutsch", "de"), ("", "unknown"), ("und", "unknown"), ("Klingon", "klingon"), ("no", "no"),
     ("nb", "no")],
)  # fmt: skip
def test_a_language_has_one_code(text, code):
    assert normalise_language(text) == code == normalise_language(code)


@pytest.mark.parametrize(
    ("lyrics", "code"),
    [
        (CHORUS, "en"),
        ("Ich gehe durch die leere Straße und denke nur an dich, mein Herz", "de"),
        ("さくらの花が咲いて、君と歩いた道を思い出す。夏の終わりに、二人で見た海の色をまだ覚えている", "ja"),
        ("나는 오늘 밤에도 너를 생각하며 걷는다 사랑해 그리고 다시 너를 만나고 싶어 매일매일 기다린다 너를", "ko"),
        ("la la la oh oh oh", "unknown"),
        ("[verse of a very long structure tag that is not sung by anyone at all, is it]\nla", "unknown"),
        ("[Instrumental]", "unknown"),
    ],
)
def test_the_language_of_enough_words_is_detected(lyrics, code):
    assert detect_language(lyrics) == code


def test_a_detected_language_is_marked_and_a_given_one_is_kept(song):
    beside(song, ".tags.txt", "folk")
    beside(song, ".lyrics.txt", CHORUS)
    track, _ = read_one(song.parent)
    assert (track.language, track.machine_made) == ("en", ("language",))
    beside(song, ".json", '{"language": "Scots"}')
    track, _ = read_one(song.parent)
    assert (track.language, track.machine_made) == ("scots", ())


# --- Rights


def test_rights_go_by_several_names(song):
    beside(
        song, ".json", '{"tags": "x", "title": " A \\n B ", "label": "L", "ISRC": "de-a12-24-00001", "Licence": "CC0"}'
    )
    track, reasons = read_one(song.parent)
    assert track.rights == Rights(title="A B", rights_holder="L", isrc="DEA122400001", license="CC0")
    assert not reasons


@pytest.mark.parametrize("isrc", ["12345", "DE-A12-24-0001", "1E-A12-24-00001", "DE-A12-24-00001 and more"])
def test_an_isrc_that_is_none_is_named_and_left_out(isrc):
    rights, (warning,) = normalise_rights({"isrc": isrc})
    assert rights["isrc"] == ""
    assert warning == f"its ISRC {isrc!r} is not of the form CC-XXX-YY-NNNNN; left empty"


# --- Tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_csv_may_be_written_by_any_spreadsheet(tmp_path, delimiter, encoding):
    rows = (("File", "Artist", "BPM", "Key"), ("song.wav", "Größe", "190", "D major"), ("OTHER.WAV", "", "", "Am"))
    text = "\r\n".join(delimiter.join(row) for row in rows)
    (tmp_path / "export.csv").write_bytes(text.encode(encoding))
    fields, warnings = table_fields(tmp_path)
    assert fields == {
        "song.wav": {"artist": "Größe", "bpm": "190", "keyscale": "D major"},
        "deep/other.wav": {"keyscale": "Am"},
    }
    assert len(warnings) == (encoding == "cp1252")


@pytest.mark.parametrize("value", [3, "3", 3.0, "3.0", " 3 "])
@pytest.mark.parametrize("name", ["repeats", "num_repeats", "Repeats"])
def test_a_track_says_how_often_it_is_heard(song, name, value):
    beside(song, ".json", json.dumps({"tags": "jazz", name: value}))
    track, reasons = read_one(song.parent)
    assert track.repeats == 3 and not reasons


def test_a_table_says_how_often_tracks_are_heard(song):
    write_clip(song.parent / "deep" / "other.wav")
    (song.parent / "metadata.csv").write_text("file_name,tags,repeats\nsong.wav,jazz,4\ndeep/other.wav,jazz,\n")
    tracks, problems = load_tracks(song.parent, show_progress=False)
    assert {track.id: track.repeats for track in tracks} == {"song.wav": 4, "deep/other.wav": 1}
    assert not problems


@pytest.mark.parametrize("value", [0, -1, 1e9, 2.5, "often", "1e999", 1001, "3,5"])
def test_repeats_that_cannot_be_are_named_and_count_as_one(song, value):
    beside(song, ".json", json.dumps({"tags": "jazz", "repeats": value}))
    track, reasons = read_one(song.parent)
    assert track.repeats == 1
    assert reasons == [f"its repeats {value!r} is not a whole number from 1 to 1000; it counts as 1"]


def test_tables_fill_each_other_in_a_fixed_order(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "song.wav", "title": "jsonl"}\n')
    (tmp_path / "metadata.csv").write_text("file_name,title,artist\nsong.wav,csv,csv\n")
    (tmp_path / "export.csv").write_text("File,Artist,BPM\nsong.wav,export,90\n")
    sample = {"filename": "song.wav", "bpm": 91, "genre": "folk"}
    (tmp_path / "any name.json").write_text(json.dumps({"samples": [sample]}))
    fields, warnings = table_fields(tmp_path)
    assert fields == {"song.wav": {"title": "jsonl", "artist": "csv", "bpm": "90", "genre": "folk"}}
    assert not warnings


def test_the_official_trainers_dataset_is_read(song):
    other = write_clip(song.parent / "deep" / "other.wav")
    common = {"raw_lyrics": "", "formatted_lyrics": "", "duration": 1, "labeled": True, "prompt_override": None}
    samples = [
        {"audio_path": "./datasets/mine/song.wav", "filename": "song.wav", "caption": "slow, warm", "genre": "soul",
         "lyrics": "", "bpm": 72, "keyscale": "C minor", "timesignature": "4", "language": "unknown", **common},
        {"audio_path": "C:\\music\\deep\\OTHER.wav", "filename": "other.wav", "caption": "loud", "lyrics": CHORUS,
         "bpm": None, "is_instrumental": False, "custom_tag": "own", **common},
        {"audio_path": "/music/gone.wav", "filename": "gone.wav", "caption": "x"},
        "no sample",
    ]  # fmt: skip
    metadata = {"name": "mine", "custom_tag": "zzz", "tag_position": "append", "all_instrumental": True}
    (song.parent / "my dataset.json").write_text(json.dumps({"metadata": metadata, "samples": samples}))
    tracks, problems = load_tracks(song.parent, show_progress=False)
    triggers = {track.id: (track.trigger_word, track.trigger_position) for track in tracks}
    assert triggers == {"song.wav": ("zzz", "append"), "deep/other.wav": ("own", "append")}
    told = {track.id: (track.tags, track.genre, track.bpm, track.keyscale, track.lyrics) for track in tracks}
    assert told["song.wav"] == ("slow, warm", "soul", 72, "C minor", "[Instrumental]")
    assert told["deep/other.wav"] == ("loud", "", None, None, CHORUS)
    assert {f"{problem.track}: {problem.reason}" for problem in problems} == {
        "/music/gone.wav: it is in the folder's table but not there",
        "my dataset.json: sample 4 is not a row with a file_name and is left out",
    }
    assert other.is_file()


def test_a_name_that_several_files_have_needs_its_path(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,bpm\nsong.wav,90\nb/song.wav,91\nx/a/song.wav,92\n")
    fields, warnings = table_fields(tmp_path, tracks=("a/song.wav", "b/song.wav"))
    assert fields == {"b/song.wav": {"bpm": "91"}, "a/song.wav": {"bpm": "92"}}
    assert warnings == ["song.wav: it is in the folder's table, and 2 files have that name: give the path"]


@pytest.mark.parametrize(
    ("content", "warning", "rows"),
    [
        ("no,such,columns\n1,2,3\n", "has no column that names files", 0),
        ("", "has no column that names files", 0),
        ("file_name,bpm\nsong.wav,90,extra\n", "line 2 has 3 cells, more than the header's 2; the first count", 1),
        ("file_name,bpm\nsong.wav,90\nsong.wav,91\n", "line 3 names song.wav again; the first row counts", 1),
        ('file_name,bpm\nsong.wav,90\n"other.wav,91\nx,2\n', "line 3 opens a quote that is never closed", 1),
        ('"file_name,bpm\nsong.wav,90\n', "line 1 opens a quote that is never closed", 0),
        ('file_name,tags\n"song.wav,' + "x" * 200_000, "line 2 opens a quote that is never closed", 0),
        ("file_name,bpm\n,90\nsong.wav\n", "line 2 is not a row with a file_name", 1),
    ],
)  # fmt: skip
def test_a_csv_with_faults_loses_no_more_than_the_fault(tmp_path, content, warning, rows):
    (tmp_path / "metadata.csv").write_text(content)
    fields, (said,) = table_fields(tmp_path)
    assert said.startswith(f"metadata.csv: {warning}")
    assert len(fields) == rows


def test_a_thousand_bad_rows_are_not_a_thousand_lines(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("{\n" * 1000 + '{"file_name": "song.wav", "bpm": 90}\n')
    fields, warnings = table_fields(tmp_path)
    assert fields == {"song.wav": {"bpm": 90}}
    assert len(warnings) == 21 and warnings[-1].endswith("980 more of its rows are left out for such reasons")


# --- Anything at all

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
terms = st.sampled_from(
    ["90bpm", "bpm: 9", "Am", "key: c", "4/4", "- #a", "n/a", "true", "instrumental", "DE-A12-24-00001"]
)
anything = st.recursive(
    scalars | terms,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
NAMES = (
    "tags", "Caption", "lyrics", "genre", "bpm", "key", "time signature", "language", "isrc", "label", "custom_tag",
    "tag_position", "sampling_weight", "repeats", "machine_made", "is_instrumental", "title",
)  # fmt: skip
names = st.sampled_from(NAMES)
fuzz = settings(max_examples=120, derandomize=True, deadline=None, database=None)


def check_types(values):
    fields, warnings = normalise_text(values)
    assert fields.keys() == TEXT_FIELDS | {
        "machine_made",
        "sampling_weight",
        "repeats",
        "trigger_word",
        "trigger_position",
    }
    for name in ("tags", "lyrics", "language", "genre"):
        fields[name].encode()
    assert fields["lyrics"] and fields["language"]
    assert fields["bpm"] is None or (type(fields["bpm"]) is int and 30 <= fields["bpm"] <= 300)
    assert fields["keyscale"] is None or parse_keyscale(fields["keyscale"]) == fields["keyscale"]
    assert fields["timesignature"] in (None, "2", "3", "4", "6")
    assert type(fields["repeats"]) is int and 1 <= fields["repeats"] <= 1000
    assert fields["sampling_weight"] > 0 and isinstance(fields["machine_made"], tuple)
    rights, more = normalise_rights(values)
    assert rights.keys() == set(RIGHTS_FIELDS)
    assert all(isinstance(text, str) and "\n" not in text for text in rights.values())
    assert all(isinstance(warning, str) for warning in warnings + more)
    return fields, rights


@fuzz
@given(st.dictionaries(names, anything, max_size=8))
def test_any_json_value_becomes_fields_of_the_right_types_that_stay_as_they_are(values):
    fields, rights = check_types(text_fields(values, []))
    row = {**fields, **rights, "machine_made": list(fields["machine_made"])}
    assert check_types(text_fields(row, [])) == (fields, rights)


@fuzz
@given(st.text() | st.lists(terms | st.text(max_size=8)).map(",".join))
def test_normalising_twice_changes_nothing(text):
    assert normalise_tags(normalise_tags(text)) == normalise_tags(text)
    assert normalise_lyrics(normalise_lyrics(text)) == normalise_lyrics(text)
    assert normalise_language(normalise_language(text)) == normalise_language(text)


@fuzz
@given(
    st.binary(max_size=200)
    | st.text().map(lambda text: text.encode("utf-16"))
    | st.binary(max_size=9).map(lambda b: b * 9)
)
def test_any_bytes_are_text_or_are_refused(data):
    try:
        text, _ = decode_text(data)
    except TextError:
        return
    assert "\0" not in text
    text.encode()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(content=st.binary(max_size=300) | st.text(max_size=200).map(str.encode) | anything.map(repr).map(str.encode)
       | st.dictionaries(names, anything, max_size=4).map(json.dumps).map(str.encode),
       end=st.sampled_from([".tags.txt", ".txt", ".caption", ".lyrics.txt", ".lrc", ".json"]))  # fmt: skip
def test_any_sidecar_is_read_or_named(scratch, content, end):
    path = scratch / f"song{end}"
    path.write_bytes(content)
    matched, _ = match_sidecars([path.name, "song.wav"], ["song.wav"])
    fields, warnings = read_sidecars(scratch, matched["song.wav"])
    check_types(fields)
    assert all(len(warning.splitlines()) == 1 for warning in warnings)


cells = st.sampled_from(["song.wav", "x/song.wav", "90", 'a "b"', '"', "", "\r", "tags", "file_name", "Am"]) | st.text(
    max_size=5
)
lines = st.lists(st.lists(cells, max_size=4).map(",".join), max_size=6).map(
    lambda rows: "file_name,tags\n" + "\n".join(rows)
)
samples = st.fixed_dictionaries(
    {"samples": st.lists(anything | st.dictionaries(names | st.just("filename"), anything, max_size=4), max_size=4)}
)


@fuzz
@given(content=st.binary(max_size=200) | lines.map(str.encode) | samples.map(json.dumps).map(str.encode),
       name=st.sampled_from(["metadata.csv", "metadata.jsonl", "any.csv", "any.json"]))  # fmt: skip
def test_any_table_is_read_or_named(scratch, content, name):
    (scratch / name).write_bytes(content)
    jsons = [name] if name.endswith(".json") else []
    fields, warnings, _ = read_tables(scratch, [name], jsons, ["song.wav"])
    assert fields.keys() <= {"song.wav"}
    check_types(fields.get("song.wav", {}))
    assert all(len(warning.splitlines()) == 1 for _, warning in warnings)
