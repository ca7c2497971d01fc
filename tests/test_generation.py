"""From a prompt to audio files, and the commands `generate` and `tiny-checkpoint`."""

import math
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from acestep_pipeline import ACEStepPipeline, __version__
from acestep_pipeline.adapters import LoraSettings, add_lora, save_lora
from acestep_pipeline.cli import main
from acestep_pipeline.data.audio import probe_audio, read_audio
from acestep_pipeline.errors import UsageError
from acestep_pipeline.generation import SamplingSettings, generate, write_comparison
from acestep_pipeline.prompt_fields import PromptFields

FIELDS = PromptFields(prompt="lo-fi hip hop", bpm=80, keyscale="A minor", timesignature="4", audio_duration=2.0)
SAMPLING = SamplingSettings(num_inference_steps=2, seed=5)
PEAK = 10 ** (-1 / 20)


@pytest.fixture(scope="module")
def adapter_dir(tiny_dir, tmp_path_factory) -> Path:
    """An adapter that is heard."""
    transformer = ACEStepPipeline.from_pretrained(tiny_dir).transformer
    add_lora(transformer, LoraSettings(r=4, lora_alpha=8.0), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    directory = tmp_path_factory.mktemp("adapter")
    save_lora(transformer, directory)
    return directory


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
# The command


def run(*argv) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    return caught.value.code or 0


def run_generate(output: Path, *argv) -> int:
    model = ("--pretrained_model_name_or_path", "tiny", "--mixed_precision", "no", "--prompt", "lo-fi hip hop")
    fast = ("--duration", "2", "--num_inference_steps", "2")
    return run("generate", *model, *fast, "--output", output, *argv)


@pytest.mark.parametrize(("suffix", "container"), [(".wav", "WAV/PCM_24"), (".flac", "FLAC/PCM_24")])
def test_generate_writes_the_format_of_the_suffix(tmp_path, capsys, tiny_pipeline, suffix, container):
    output = tmp_path / "new" / f"out{suffix}"
    lyrics = tmp_path / "lyrics.txt"
    lyrics.write_text("\ufeff[verse]\nGrüße aus Köln\n", encoding="utf-8")
    fields = ("--bpm", "80", "--keyscale", "A minor", "--timesignature", "4", "--vocal_language", "de")
    assert run_generate(output, *fields, "--lyrics", lyrics, "--seed", "5") == 0
    info = probe_audio(output)
    assert (info.format, info.sample_rate, info.channels, info.duration_s) == (container, 48_000, 2, 2.0)
    written = read_audio(output)
    assert np.abs(written).max() == pytest.approx(PEAK, abs=1e-5)
    fields = PromptFields(**{**FIELDS.__dict__, "lyrics": "[verse]\nGrüße aus Köln", "vocal_language": "de"})
    expected = generate(tiny_pipeline, fields, SAMPLING)
    np.testing.assert_allclose(written, expected, rtol=0, atol=2**-22)
    assert f"Wrote {output}" in capsys.readouterr().out
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(output.stat().st_mode) == 0o666 & ~umask


def test_generate_compares_and_scales_the_adapter(tmp_path, adapter_dir):
    base, full, half, zero = (tmp_path / f"{name}.wav" for name in ("base", "full", "half", "zero"))
    adapter = tmp_path / "take:two"  # a colon of its own
    adapter.symlink_to(adapter_dir)
    assert run_generate(base) == 0
    assert run_generate(full, "--adapter", adapter, "--compare") == 0
    assert run_generate(half, "--adapter", f"{adapter}:0.5") == 0
    assert run_generate(zero, "--adapter", f"{adapter}:0.0") == 0
    written = sorted(path.name for path in tmp_path.glob("*.*"))
    assert written == ["base.wav", "full.wav", "full_without_adapter.wav", "half.wav", "zero.wav"]
    assert (tmp_path / "full_without_adapter.wav").read_bytes() == base.read_bytes()
    assert np.array_equal(read_audio(zero), read_audio(base))
    distances = [np.abs(read_audio(path) - read_audio(base)).mean() for path in (half, full)]
    assert 0.001 < distances[0] < distances[1]


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("out.m4a", (), "--output"),
        ("out", (), "--output"),
        ("out.wav", ("--duration", "0"), "--duration"),
        ("out.wav", ("--duration", "601"), "--duration"),
        ("out.wav", ("--duration", "nan"), "--duration"),
        ("out.wav", ("--num_inference_steps", "0"), "--num_inference_steps"),
        ("out.wav", ("--shift", "-1"), "--shift"),
        ("out.wav", ("--guidance_scale", "-1"), "--guidance_scale"),
        ("out.wav", ("--bpm", "0"), "--bpm"),
        ("out.wav", ("--compare",), "--compare needs --adapter"),
        ("out.wav", ("--lyrics", "no-such-lyrics.txt"), "no-such-lyrics.txt"),
        ("out.wav", ("--adapter", "./no-such-adapter"), "no-such-adapter"),
        ("out.wav", ("--adapter", "./no-such-adapter:0.5"), "no-such-adapter"),
        ("out.wav", ("--pretrained_model_name_or_path", "./no-such-model"), "no-such-model"),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_no_file(tmp_path, capfd, name, argv, said):
    assert run_generate(tmp_path / name, *argv) == 2
    stderr = capfd.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert said in stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path, capfd):
    (tmp_path / "file").write_text("in the way")
    assert run_generate(tmp_path / "file" / "out.wav", "--pretrained_model_name_or_path", "./no-such-model") == 2
    stderr = capfd.readouterr().err
    assert stderr.count("\n") == 1 and "--output" in stderr and "no-such-model" not in stderr


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
    assert len(written) == 12, "latents and conditions of six tracks"
    assert run(*argv) == 0
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}


def test_generate_in_bf16(tmp_path, monkeypatch, tiny_pipeline):
    """Forced here, where it is slow: every component must take what the one before it gives."""
    from acestep_pipeline import hardware

    monkeypatch.setattr(hardware, "bf16_is_fast", lambda device: True)
    model = ("--pretrained_model_name_or_path", "tiny", "--prompt", "lo-fi hip hop")
    argv = ("--duration", "2", "--num_inference_steps", "2", "--output", tmp_path / "bf16.wav")
    assert run("generate", *model, *argv) == 0
    assert run_generate(tmp_path / "fp32.wav") == 0
    bf16, fp32 = (read_audio(tmp_path / name) for name in ("bf16.wav", "fp32.wav"))
    assert 0 < np.abs(bf16 - fp32).max() and np.corrcoef(bf16[0], fp32[0])[0, 1] > 0.9
