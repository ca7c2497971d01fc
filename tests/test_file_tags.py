"""Tags inside audio files: every container's own way of saying what a piece is, and damage that hurts nobody."""

import io
import struct

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_pipeline.data.text.file_tags import read_file_tags
from acestep_pipeline.data.tracks import Rights, load_tracks

NOISE = np.random.default_rng(0).normal(0, 0.05, 24_000)
DAMAGED = ["the tags inside the file are damaged and are left out"]
ALL = {"genre": "Techno", "title": "One", "artist": "Ann", "bpm": "128", "keyscale": "Ebm", "isrc": "DEA122400001",
       "rights_holder": "2024 Ann Ltd", "license": "https://example.org/by", "lyrics": "sung words"}  # fmt: skip


def encoded(format_name, **strings):
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 24_000, 1, format=format_name) as sound:
        for name, value in strings.items():
            setattr(sound, name, value)
        sound.write(NOISE)
    return buffer.getvalue()


def vorbis_comment(comments):
    entries = [f"{name}={value}".encode() for name, value in comments]
    body = b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)
    return struct.pack("<I", 4) + b"test" + struct.pack("<I", len(entries)) + body


def flac(*comments, block=None):
    """A FLAC file with a VORBIS_COMMENT block (RFC 9639, 8.6) behind its STREAMINFO."""
    data = encoded("FLAC")
    block = vorbis_comment(comments) if block is None else block
    return b"fLaC" + b"\0" + data[5:42] + bytes([4]) + len(block).to_bytes(3, "big") + block + data[42:]


def id3(*frames, version=4):
    """An ID3v2.3 or 2.4 tag; a frame is (name, content)."""

    def synchsafe(size):
        return bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))

    body = b""
    for name, content in frames:
        size = synchsafe(len(content)) if version == 4 else len(content).to_bytes(4, "big")
        body += name.encode() + size + b"\0\0" + content
    return b"ID3" + bytes([version, 0, 0]) + synchsafe(len(body)) + body


def latin(text):
    return b"\0" + text.encode("latin-1")


def all_frames(genre):
    return [
        ("TCON", latin(genre)), ("TIT2", b"\1" + "One".encode("utf-16")), ("TPE1", latin("Ann")),
        ("TBPM", latin("128")), ("TKEY", latin("Ebm")), ("TSRC", latin("DEA122400001")),
        ("TCOP", latin("2024 Ann Ltd")),
        ("WCOP", b"https://example.org/by"), ("USLT", b"\0eng\0sung words"), ("APIC", bytes(5000)),
    ]  # fmt: skip


def mp4(**atoms):
    """The moov/udta/meta/ilst atoms of an MP4 file with iTunes' names, no audio."""

    def atom(name, body):
        return struct.pack(">I", len(body) + 8) + name + body

    items = b"".join(atom(name, atom(b"data", struct.pack(">II", kind, 0) + value))
                     for name, kind, value in atoms["items"])  # fmt: skip
    meta = atom(b"meta", bytes(4) + atom(b"ilst", items))
    return atom(b"ftyp", b"M4A \0\0\0\0M4A mp42") + atom(b"moov", atom(b"udta", meta))


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("genre", ["Techno", "(18)", "18"])
def test_id3_says_everything_and_its_genre_numbers_are_names(version, genre):
    data = id3(*all_frames(genre), version=version) + encoded("MP3")
    assert read_file_tags(data) == (ALL, [])


def test_vorbis_comments_say_everything():
    comments = [("GENRE", "Techno"), ("TITLE", "One"), ("artist", "Ann"), ("BPM", "128"), ("INITIALKEY", "Ebm"),
                ("ISRC", "DEA122400001"), ("COPYRIGHT", "2024 Ann Ltd"), ("LICENSE", "https://example.org/by"),
                ("LYRICS", "sung words")]  # fmt: skip
    assert read_file_tags(flac(*comments)) == (ALL, [])


def test_mp4_atoms_say_what_they_can():
    data = mp4(items=[(b"\xa9nam", 1, b"One"), (b"\xa9ART", 1, b"Ann"), (b"\xa9gen", 1, b"Techno"),
                      (b"tmpo", 21, struct.pack(">H", 128)), (b"cprt", 1, b"2024 Ann Ltd"),
                      (b"\xa9lyr", 1, b"sung words")])  # fmt: skip
    expected = {name: ALL[name] for name in ("title", "artist", "genre", "bpm", "rights_holder", "lyrics")}
    assert read_file_tags(data) == (expected, [])


@pytest.mark.parametrize("format_name", ["OGG", "FLAC", "WAV", "AIFF"])
def test_what_a_common_program_writes_is_read(format_name):
    data = encoded(format_name, title="One", artist="Ann", copyright="2024 Ann Ltd", genre="Techno")
    fields, warnings = read_file_tags(data)
    names = ("title", "artist", "rights_holder") + (() if format_name == "AIFF" else ("genre",))
    assert fields == {name: ALL[name] for name in names} and not warnings


@pytest.mark.parametrize("container", ["WAV", "AIFF"])
def test_id3_in_a_chunk_is_read(container):
    tag = id3(*all_frames("Techno"))
    data, order = encoded(container), "<I" if container == "WAV" else ">I"
    data += (b"id3 " if container == "WAV" else b"ID3 ") + struct.pack(order, len(tag)) + tag + bytes(len(tag) % 2)
    data = data[:4] + struct.pack(order, len(data) - 8) + data[8:]
    assert read_file_tags(data) == (ALL, [])


def test_several_genres_are_tags_and_the_first_is_the_genre(tmp_path):
    (tmp_path / "a.flac").write_bytes(flac(("GENRE", "Techno"), ("GENRE", "Dub"), ("genre", "dub;Ambient")))
    (tmp_path / "b.mp3").write_bytes(id3(("TCON", latin("Rock\0Metal"))) + encoded("MP3"))
    tracks, problems = load_tracks(tmp_path, show_progress=False)
    assert [(track.genre, track.tags) for track in tracks] == [
        ("Techno", "Techno, Dub, Ambient"),
        ("Rock", "Rock, Metal"),
    ]
    assert not problems


def test_a_files_tags_become_a_track(tmp_path):
    (tmp_path / "a.mp3").write_bytes(id3(*all_frames("Techno")) + encoded("MP3"))
    ((track,), problems) = load_tracks(tmp_path, show_progress=False)
    assert (track.tags, track.genre, track.bpm, track.keyscale) == ("Techno", "Techno", 128, "Eb minor")
    assert track.lyrics == "sung words"
    assert track.rights == Rights("One", "Ann", "2024 Ann Ltd", "DEA122400001", "https://example.org/by")
    assert [problem.reason for problem in problems] == [
        "it has no tags and trains with its genre alone; describe it in a .tags.txt beside it"
    ]


def test_placeholders_are_nothing_and_timed_lyrics_go_first():
    synced = b"\0eng\2\1\0" + b"one\0" + struct.pack(">I", 1500) + b"two\0" + struct.pack(">I", 62_250)
    frames = [("TBPM", latin("0")), ("TKEY", latin("o")), ("USLT", b"\0eng\0plain"), ("SYLT", synced)]
    fields, warnings = read_file_tags(id3(*frames) + encoded("MP3"))
    assert fields.keys() == {"lyrics"} and not warnings
    assert "[00:01.50]one" in fields["lyrics"] and "[01:02.25]two" in fields["lyrics"]


def test_a_contact_is_a_source_only_where_it_is_a_site():
    assert read_file_tags(flac(("CONTACT", "https://example.org")))[0] == {"source": "https://example.org"}
    assert read_file_tags(flac(("CONTACT", "ann@example.org")))[0] == {}


@pytest.mark.parametrize(
    "block",
    [
        struct.pack("<I", 4) + b"test" + struct.pack("<II", 1, 0xFFFFFFFF) + b"TITLE=x",
        struct.pack("<I", 4) + b"test" + struct.pack("<I", 0xFFFFFFFF),
        struct.pack("<I", 4),
        b"",
    ],
)
def test_damaged_tags_are_a_warning_and_cost_no_memory(tmp_path, block):
    (tmp_path / "a.flac").write_bytes(flac(block=block))
    (tmp_path / "a.tags.txt").write_text("jazz")
    (tmp_path / "b.flac").write_bytes(flac(("TITLE", "whole")))
    (tmp_path / "b.tags.txt").write_text("jazz")
    assert read_file_tags((tmp_path / "a.flac").read_bytes()) == ({}, DAMAGED)
    tracks, problems = load_tracks(tmp_path, show_progress=False)
    kept = {track.id: (track.tags, track.rights.title) for track in tracks}
    assert kept["b.flac"] == ("jazz", "whole")
    # libsndfile may refuse the audio behind such a block: then that is the reason, and the warning is not needed.
    (problem,) = problems
    assert problem.track == "a.flac" and problem.skipped != (kept.get("a.flac") == ("jazz", ""))


def test_a_bare_dataset_is_asked_for_its_files_tags_and_a_described_one_is_not(tmp_path):
    audio = {"bytes": flac(("GENRE", "Techno"), ("TITLE", "One")), "path": "a.flac"}
    for name, columns in (("bare", {}), ("described", {"tags": "jazz", "genre": None})):
        dataset = Dataset.from_list([{"audio": audio, **columns}]).cast_column("audio", Audio(decode=False))
        dataset.save_to_disk(tmp_path / name)
    ((bare,), _), ((described,), problems) = (
        load_tracks(tmp_path / name, show_progress=False) for name in ("bare", "described")
    )
    assert (bare.genre, bare.tags, bare.rights.title) == ("Techno", "Techno", "One")
    assert (described.genre, described.tags, described.rights.title, problems) == ("", "jazz", "", [])


heads = st.sampled_from([
    id3(*all_frames("(18)")), flac(("TITLE", "x"), ("LYRICS", "y" * 300))[:400], encoded("OGG", title="One")[:600],
    encoded("WAV", title="One", genre="x")[-90:], mp4(items=[(b"\xa9nam", 1, b"One"), (b"gnre", 0, b"\0\1")]),
    b"RIFF\xff\xff\xff\xffWAVELIST\xff\xff\xff\x7fINFO", b"FORM\0\0\1\0AIFFNAME\x7f\xff\xff\xff", b"",
])  # fmt: skip


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(head=heads, patches=st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=4)), max_size=4),
       tail=st.binary(max_size=60))  # fmt: skip
def test_no_bytes_are_too_broken_to_ask(head, patches, tail):
    data = bytearray(head + tail)
    for position, patch in patches:
        data[position : position + len(patch)] = patch
    fields, warnings = read_file_tags(bytes(data))
    assert all(isinstance(value, str) and value for value in fields.values())
    assert warnings in ([], DAMAGED)
