"""From a prompt to audio files, and the commands `generate` and `tiny-checkpoint`."""

import math
import shutil

import numpy as np
import pytest
import torch

from acestep_pipeline import ACEStepPipeline, __version__
from acestep_pipeline.cli import main
from acestep_pipeline.data.audio import read_audio
from acestep_pipeline.errors import UsageError
from acestep_pipeline.generation import SamplingSettings, generate, write_comparison
from acestep_pipeline.prompt_fields import PromptFields

FIELDS = PromptFields(prompt="lo-fi hip hop", bpm=80, keyscale="A minor", timesignature="4", audio_duration=2.0)
SAMPLING = SamplingSettings(num_inference_steps=2, seed=5)
PEAK = 10 ** (-1 / 20)


# ---------------------------------------------------------------------------------------------------------------------
# generate() and write_comparison()


def test_same_seed_same_audio(tiny_pipeline):
    first = generate(tiny_pipeline, FIELDS, SAMPLING)
    assert first.shape == (2, 2 * 48_000)
    assert first.dtype == np.float32
    assert np.abs(first).max() == pytest.approx(PEAK, rel=1e-5)
    torch.rand(3)
    assert np.array_equal(generate(tiny_pipeline, FIELDS, SAMPLING), first)
    other = generate(tiny_pipeline, FIELDS, SamplingSettings(num_inference_steps=2, seed=6))
    assert not np.allclose(other, first, atol=1e-2)


def test_duration_sets_the_length(tiny_pipeline):
    fields = PromptFields(prompt="waltz", timesignature="3", audio_duration=1.0)
    assert generate(tiny_pipeline, fields, SAMPLING).shape == (2, 48_000)


def test_every_field_reaches_the_model(tiny_pipeline):
    """Changing any one of the fields or settings changes the audio."""
    given = {**FIELDS.__dict__, "audio_duration": 1.0}
    reference = generate(tiny_pipeline, PromptFields(**given), SAMPLING)
    changes = {"prompt": "metal", "lyrics": "[verse]\nla", "vocal_language": "de", "bpm": 81, "keyscale": "C major"}
    for name, value in {**changes, "timesignature": "3"}.items():
        fields = PromptFields(**{**given, name: value})
        assert not np.array_equal(generate(tiny_pipeline, fields, SAMPLING), reference), name
    for name, value in {"num_inference_steps": 3, "guidance_scale": 1.0, "shift": 3.0}.items():
        sampling = SamplingSettings(**{**SAMPLING.__dict__, name: value})
        assert not np.array_equal(generate(tiny_pipeline, PromptFields(**given), sampling), reference), name


def test_defaults_follow_the_variant():
    assert SamplingSettings(seed=3).resolved(is_turbo=True) == SamplingSettings(8, 1.0, 3.0, 3)
    assert SamplingSettings(seed=3).resolved(is_turbo=False) == SamplingSettings(50, 7.0, 1.0, 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", 0),
        ("guidance_scale", -0.5),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("shift", 0.0),
        ("shift", math.nan),
    ],
)
def test_impossible_settings_name_the_flag(field, value):
    with pytest.raises(UsageError, match=f"--{field} must be .*{value}"):
        SamplingSettings(**{field: value})


@pytest.mark.parametrize("is_turbo", [True, False])
def test_given_settings_win_over_the_variants(is_turbo):
    given = SamplingSettings(num_inference_steps=4, guidance_scale=0.0, shift=2.0, seed=1)
    assert given.resolved(is_turbo=is_turbo) == given
    assert SamplingSettings(num_inference_steps=4).resolved(is_turbo=is_turbo).num_inference_steps == 4


def test_comparison_writes_both_and_leaves_the_adapter_active(tiny_pipeline, adapter_dir, tmp_path):
    without = generate(tiny_pipeline, FIELDS, SAMPLING)
    tiny_pipeline.load_lora_weights(adapter_dir, adapter_name="adapter")
    adapted = generate(tiny_pipeline, FIELDS, SAMPLING)
    paths = write_comparison(tiny_pipeline, FIELDS, SAMPLING, tmp_path / "new" / "folder", "lofi")
    assert [path.name for path in paths] == ["lofi_with_adapter.wav", "lofi_without_adapter.wav"]
    for path, expected in zip(paths, (adapted, without), strict=True):
        np.testing.assert_allclose(read_audio(path), expected, rtol=0, atol=2**-22)
    assert np.abs(adapted - without).max() > 0.05
    assert np.array_equal(generate(tiny_pipeline, FIELDS, SAMPLING), adapted)


# ---------------------------------------------------------------------------------------------------------------------
# Other commands


def run(*argv) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    return caught.value.code or 0


def test_debug_shows_the_error_itself(tmp_path):
    with pytest.raises(Exception, match="--output"):
        main(["--debug", "generate", "--prompt", "x", "--output", str(tmp_path / "out.m4a")])


def test_tiny_checkpoint_command(tmp_path, capsys, tiny_pipeline):
    directory = tmp_path / "new" / "tiny"
    assert run("tiny-checkpoint", directory) == 0
    said = capsys.readouterr().out
    assert f"Wrote {directory}" in said
    assert "MB" in said
    written = ACEStepPipeline.from_pretrained(directory)
    for key, tensor in tiny_pipeline.transformer.state_dict().items():
        assert torch.equal(written.transformer.state_dict()[key], tensor), key
    assert run("tiny-checkpoint", directory) == 2
    error = capsys.readouterr().err
    assert str(directory) in error
    assert error.count("\n") == 1


def test_version_and_help(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"acestep-lora {__version__}\n"
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("generate", "cache", "tiny-checkpoint", "doctor"))
    assert run("generate", "--help") == 0
    assert "--compare" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [(), ("no-such-command",), ("generate",), ("generate", "--prompt", "x", "--nope")])
def test_unknown_usage_is_status_2(argv, capsys):
    assert run(*argv) == 2
    assert "usage: acestep-lora" in capsys.readouterr().err


def test_cache_command_encodes_once_and_names_what_it_left_out(demo_dir, tmp_path, capsys):
    music = tmp_path / "music"
    shutil.copytree(demo_dir, music)
    (music / "empty.wav").touch()
    argv = ("cache", "--pretrained_model_name_or_path", "tiny", "--train_data_dir", music, "--min_duration_s", "1",
            "--latent_cache_dir", tmp_path / "cache")  # fmt: skip
    assert run(*argv) == 0
    said = capsys.readouterr().out
    assert "skipped  empty.wav: the file is empty" in said and "6 tracks" in said
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(written) == 13, "latents and conditions of six tracks, and the facts of the encoders"
    assert run(*argv) == 0
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
