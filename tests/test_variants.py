"""What a track is told in: trigger words, orders of tags, no tags; as strings, in the cache, and in real runs."""

import json
import shutil
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep_pipeline import cli
from acestep_pipeline.conditioning import encode_condition
from acestep_pipeline.data import batching, latent_cache
from acestep_pipeline.data.batching import DrawSettings, draw_wording
from acestep_pipeline.data.text.variants import (
    TextOptions,
    describe_wordings,
    is_prose,
    make_wordings,
    place_trigger,
    tag_orders,
)
from acestep_pipeline.data.tracks import find_audio_files
from acestep_pipeline.errors import UsageError
from tests.training_runs import metrics, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
ON = {"trigger_word": "zxqmood", "tag_shuffle": 3, "caption_dropout": 0.25}


# --- Strings


@pytest.mark.parametrize(
    ("position", "expected"),
    [("prepend", "zzz, jazz, piano"), ("append", "jazz, piano, zzz"), ("replace", "zzz")],
)
def test_the_trigger_word_goes_where_it_is_told(position, expected):
    assert make_wordings("jazz, piano", TextOptions("zzz", position)).given == expected
    own = make_wordings("jazz, piano", TextOptions("other"), trigger_word="zzz", trigger_position=position)
    assert own.given == expected, "a track's own wins"
    assert make_wordings("jazz, piano", TextOptions("", position), trigger_word="zzz").given == expected
    assert place_trigger("", "zzz", position) == "zzz"
    assert place_trigger("jazz, piano", "", position) == "jazz, piano"


def test_a_tag_that_is_the_trigger_word_is_told_once():
    assert place_trigger("jazz, ZZZ, piano", "zzz", "prepend") == "zzz, jazz, piano"


def test_orders_are_distinct_keyed_and_grow():
    tags = list("abcde")
    three, ten = tag_orders(tags, 3, key="0/x"), tag_orders(tags, 10, key="0/x")
    assert three[0] == tags and ten[:3] == three and len({tuple(order) for order in ten}) == 10
    assert all(sorted(order) == tags for order in ten)
    assert tag_orders(tags, 10, key="0/x") == ten != tag_orders(tags, 10, key="1/x")
    assert len(tag_orders(["a", "b", "c"], 50, key="")) == 6, "there are no more"
    assert tag_orders([], 5, key="") == [[]] and tag_orders(["a"], 5, key="") == [["a"]]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.integers(1, 30), st.sampled_from(["prepend", "append"]))
def test_wordings_are_the_same_tags_with_the_trigger_in_its_place(tags, number, position):
    options = TextOptions("zzz", position, tag_shuffle=number, caption_dropout=0.1)
    told = make_wordings(", ".join(tags), options, key="x")
    prompts = [told.given, *told.shuffled]
    assert len(set(prompts)) == len(prompts) <= number
    for prompt in prompts:
        words = prompt.split(", ")
        assert words.pop(0 if position == "prepend" else -1) == "zzz" and sorted(words) == sorted(tags)
    assert told.without_tags == "zzz"


@pytest.mark.parametrize(
    ("tags", "prose"),
    [
        ("techno, driving, four on the floor, acid bass", False),
        ("drum & bass, feat.X, R&B, 1980s", False),
        ("A slow ballad. It builds up, then fades", True),
        ("a mellow track, soft piano, and a warm bass", True),
        ("a driving electronic track with pulsing synths, punchy drums", True),
        ("mellow, slow.", True),
        ("静かなピアノ。夜", True),
        ("", False),
    ],
)
def test_sentences_are_recognised_and_stay_as_they_are(tags, prose):
    assert is_prose(tags) is prose
    if prose:
        assert make_wordings(tags, TextOptions(tag_shuffle=5)).shuffled == ()


def test_what_will_not_work_as_hoped_is_said():
    tracks = [("zzz, slow", "", ""), ("a long sentence, and more", "soul", "own"), ("loud", "", "")]
    said = [f"{flag}: {reason}" for flag, reason in describe_wordings(tracks, TextOptions("zzz", tag_shuffle=2))]
    assert len(said) == 3
    assert said[0].startswith("--trigger_word zzz: 1 of 3 tracks have it among their tags already")
    assert said[1] == "--trigger_word zzz: 1 of 3 tracks have a trigger word of their own and keep that"
    assert said[2] == "--tag_shuffle 2: 1 of 3 tracks are described in sentences, which stay as they are"
    for word in ("Jazz", "soul"):
        assert any("ordinary word" in reason for _, reason in describe_wordings(tracks, TextOptions(word)))
    assert not describe_wordings([("loud", "rock", "")], TextOptions("zxqmood"))
    assert not describe_wordings(tracks, TextOptions())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trigger_position": "middle"}, "--trigger_position must be prepend, append, replace, not 'middle'"),
        ({"tag_shuffle": 0}, "--tag_shuffle must be in"),
        ({"caption_dropout": 1.5}, "--caption_dropout must be in"),
        ({"trigger_word": " , "}, "--trigger_word ' , ' holds no word"),
        ({"trigger_word": "x", "trigger_position": "replace", "tag_shuffle": 2}, "leaves no tags"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(demo_dir, tmp_path, changes, named):
    with pytest.raises(UsageError, match=named.replace("(", r"\(")):
        train_here(demo_dir, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_prompt_by_hand_gets_the_trigger_word_if_it_lacks_it():
    assert TextOptions("zzz").with_trigger("slow") == "zzz, slow"
    assert TextOptions("zzz", "append").with_trigger("slow") == "slow, zzz"
    assert TextOptions("zzz").with_trigger("slow ZZZ thing") == "slow ZZZ thing"
    assert TextOptions().with_trigger("slow") == "slow"


# --- Real runs


@pytest.fixture
def music(demo_dir, tmp_path):
    """Three tracks: tags, tags and a trigger word of its own, and a caption in sentences."""
    folder, names = tmp_path / "music", [file.name for file in find_audio_files(demo_dir)][:3]
    folder.mkdir()
    for name in names:
        shutil.copy(demo_dir / name, folder)
    rows = [
        {"file_name": names[0], "tags": "techno, dark, acid", "bpm": 128},
        {
            "file_name": names[1],
            "tags": "slow, warm, strings, choir",
            "custom_tag": "ownword",
            "tag_position": "append",
        },
        {"file_name": names[2], "tags": "A slow song. It ends"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def told(monkeypatch):
    """What items are told, in their order."""
    fields, load_condition = [], batching.load_condition
    monkeypatch.setattr(
        batching, "load_condition", lambda window: fields.append(window.fields) or load_condition(window)
    )
    return fields


@pytest.fixture
def encoded(monkeypatch):
    """What is encoded."""
    told = []
    monkeypatch.setattr(
        latent_cache,
        "encode_condition",
        lambda pipeline, fields: told.append(fields) or encode_condition(pipeline, fields),
    )
    return told


def run(music, output, **changes):
    train_here(music, output, **{"max_duration_s": 2, "latent_cache_dir": output.parent / "cache", **changes})
    return (output / WEIGHTS).read_bytes()


def test_the_cache_holds_every_wording_once_and_cards_say_how_to_prompt(music, tmp_path, encoded, told, capsys):
    output = tmp_path / "out"
    samples = {"num_validation_samples": 1, "validation_duration_s": 2, "validation_inference_steps": 1}
    command = ["cache", "--pretrained_model_name_or_path", "tiny", "--train_data_dir", str(music), "--min_duration_s",
               "1", "--max_duration_s", "2", "--latent_cache_dir", str(tmp_path / "cache"),
               "--mixed_precision", "no"]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--trigger_word", "zxqmood", "--tag_shuffle", "3", "--caption_dropout", "0.25"])
    assert ended.value.code == 0
    assert "--tag_shuffle 3: 1 of 3 tracks are described in sentences" in capsys.readouterr().out
    assert len(encoded) == len(set(encoded)) == (3 + 1) + (3 + 1) + (1 + 1)
    assert len(list((tmp_path / "cache").rglob("conditions-*/*"))) == len(encoded)
    expected = {"techno, dark, acid", "slow, warm, strings, choir", "A slow song. It ends"}
    prompts = {fields.prompt for fields in encoded}
    assert {f"zxqmood, {tags}" for tags in expected if "choir" not in tags} < prompts
    assert {"slow, warm, strings, choir, ownword", "zxqmood", "ownword"} < prompts
    encoded.clear()
    run(music, output, max_train_steps=2, validation_prompt="rain", **ON, **samples)
    assert not encoded, "a cache made ahead is complete"
    said = capsys.readouterr().out
    assert "--prompt 'zxqmood, techno, dark, acid'" in said.splitlines()[-1]
    card = (output / "README.md").read_text()
    assert "Begin the prompt with `zxqmood`\n(2 of the training tracks were told so)." in card
    assert "End the prompt with `ownword`\n(1 of the training tracks were told so)." in card
    assert "| zxqmood, rain |" in card
    saved = json.loads((output / "training_args.json").read_text())
    assert {name: saved["arguments"][name] for name in ON} == ON
    assert saved["trigger_words"][0] == {"trigger_word": "zxqmood", "trigger_position": "prepend", "tracks": 2}


def test_wordings_are_drawn_as_often_as_asked_and_all_else_stays(music, tmp_path, told):
    run(music, tmp_path / "out", max_train_steps=300, rank=1, **ON)
    counts = Counter(fields.prompt for fields in told if fields.bpm == 128)
    assert sum(counts.values()) == 100 and len(counts) == 4
    dropped = counts.pop("zxqmood") + sum(fields.prompt == "zxqmood" for fields in told if fields.bpm is None)
    dropped += sum(fields.prompt == "ownword" for fields in told)
    assert 52 <= dropped <= 98, "a quarter of 300: a standard deviation of 7.5"
    assert all(10 <= count <= 42 for count in counts.values()), "a third of three quarters of 100 each"
    assert all(prompt.startswith("zxqmood, ") for prompt in counts)
    assert {fields.audio_duration for fields in told} == {2.0}


def test_shares_of_wordings_over_many_updates():
    window = latent_cache.Window(0, None, None, 0, (1, 2, 3), 4)
    settings = DrawSettings(seed=0, cfg_dropout=0.5, tag_shuffle=4, caption_dropout=0.2)
    drawn = [draw_wording(window, settings, update, slot) for update in range(1000) for slot in range(4)]
    counts = Counter("given" if each is window else each for each in drawn)
    assert counts.pop(4) == pytest.approx(800, abs=100)
    assert set(counts) == {"given", 1, 2, 3} and all(count == pytest.approx(800, abs=100) for count in counts.values())
    plain = DrawSettings(seed=0, cfg_dropout=0.5)
    assert all(draw_wording(window, plain, update, 0) is window for update in range(100)), "off unless asked for"


def test_off_is_as_if_it_were_not_there_and_on_is_not(music, tmp_path, told):
    settings = {"max_train_steps": 4, "lora_dropout": 0.1}
    plain = run(music, tmp_path / "plain", **settings)
    prompts = told.copy()
    assert plain == run(
        music, tmp_path / "off", tag_shuffle=1, caption_dropout=0, trigger_position="append", **settings
    )
    assert [fields.prompt for fields in told[4:]] == [fields.prompt for fields in prompts]
    told.clear()
    assert plain != run(music, tmp_path / "dropped", caption_dropout=1, **settings)
    assert {fields.prompt for fields in told} <= {"", "ownword"}
    sure = [(line["update"], line["lr"]) for line in metrics(tmp_path / "plain")]
    assert sure == [(line["update"], line["lr"]) for line in metrics(tmp_path / "dropped")]


def test_all_options_resume_to_the_bit_and_divide(music, tmp_path, told):
    settings = {
        "max_train_steps": 8,
        "lora_dropout": 0,
        "gradient_accumulation_steps": 4,
        "checkpointing_steps": 4,
        **ON,
    }
    output = tmp_path / "out"
    whole, lines, heard = run(music, output, **settings), metrics(output), told.copy()
    told.clear()
    assert run(music, output, resume_from_checkpoint=output / "checkpoint-4", **settings) == whole
    assert metrics(output) == lines and told == heard[-len(told) :]
    with pytest.raises(UsageError, match="tag_shuffle was 3 and is 2"):
        run(music, output, resume_from_checkpoint="latest", **{**settings, "tag_shuffle": 2})
    told.clear()
    run(music, tmp_path / "4x1", **{**settings, "gradient_accumulation_steps": 1, "train_batch_size": 4})
    assert Counter(told) == Counter(heard)
    for a, b in zip(lines, metrics(tmp_path / "4x1"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
