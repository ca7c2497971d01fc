"""`acestep-lora generate`: what it writes, what it says, and what it refuses."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tinytag import TinyTag

from acestep_pipeline.cli import main
from acestep_pipeline.data.audio import probe_audio, read_audio, write_audio
from acestep_pipeline.data.loudness import LoudnessMeter
from acestep_pipeline.files import sha256
from acestep_pipeline.generation import SamplingSettings, generate
from acestep_pipeline.paths import LORA_WEIGHTS_NAME
from acestep_pipeline.prompt_fields import PromptFields

PEAK = 10 ** (-1 / 20)
MODEL = ("--pretrained_model_name_or_path", "tiny", "--mixed_precision", "no", "--prompt", "lo-fi hip hop")


def run(*argv) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    return caught.value.code or 0


def run_generate(output: Path, *argv, loudness: str = "none") -> int:
    fast = ("--num_inference_steps", "2", "--loudness", loudness)
    length = () if "--src_audio" in argv or "--duration" in argv else ("--duration", "2")
    return run("generate", *MODEL, *fast, *length, "--output", output, *argv)


def loudness_of(path: Path) -> float:
    meter = LoudnessMeter(48_000)
    meter.add(read_audio(path))
    return meter.result()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """1.5 s of mono at 22.05 kHz, as nobody's studio delivers it."""
    path = tmp_path_factory.mktemp("source") / "source.wav"
    noise = np.random.default_rng(0).normal(0, 0.1, (1, 33_075)).astype(np.float32)
    write_audio(path, noise, sample_rate=22_050)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize(("suffix", "container"), [(".wav", "WAV/PCM_24"), (".flac", "FLAC/PCM_24")])
def test_generate_writes_the_format_of_the_suffix(tmp_path, capsys, tiny_pipeline, suffix, container):
    output = tmp_path / "new" / f"out{suffix}"
    lyrics = tmp_path / "lyrics.txt"
    lyrics.write_text("\ufeff[verse]\nGrüße aus Köln\n", encoding="utf-8")
    fields = ("--bpm", "80", "--key", "Am", "--timesignature", "4", "--vocal_language", "German")
    assert run_generate(output, *fields, "--lyrics", lyrics, "--seed", "5") == 0
    info = probe_audio(output)
    assert (info.format, info.sample_rate, info.channels, info.duration_s) == (container, 48_000, 2, 2.0)
    written = read_audio(output)
    assert np.abs(written).max() == pytest.approx(PEAK, abs=1e-5)
    fields = PromptFields(
        prompt="lo-fi hip hop", lyrics="[verse]\nGrüße aus Köln", vocal_language="de", bpm=80, keyscale="A minor",
        timesignature="4", audio_duration=2.0,
    )  # fmt: skip
    expected = generate(tiny_pipeline, fields, SamplingSettings(num_inference_steps=2, seed=5))
    np.testing.assert_allclose(written, expected, rtol=0, atol=2**-22)
    assert f"Wrote {output}" in capsys.readouterr().out
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(output.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "ogg", "opus"])
def test_a_file_says_what_it_was_made_with(tmp_path, adapter_dir, format):
    assert run_generate(tmp_path / "out", "--format", format, "--adapter", f"{adapter_dir}:0.5", "--seed", "7") == 0
    output = tmp_path / f"out.{format}"
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["prompt"] == "lo-fi hip hop" and record["seed"] == 7 and record["base"] == "tiny"
    assert record["num_inference_steps"] == 2 and record["guidance_scale"] == 7.0 and record["audio_duration"] == 2.0
    digest = sha256(adapter_dir / LORA_WEIGHTS_NAME)
    assert record["adapters"] == [{"adapter": str(adapter_dir), "weight": 0.5, "sha256": digest}]
    tags = TinyTag.get(output)
    assert tags.title == "lo-fi hip hop" and json.loads(tags.comment) == record


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3"])
def test_an_empty_prompt_is_written_too(tmp_path, suffix):
    assert run_generate(tmp_path / f"out{suffix}", "--prompt", "") == 0
    assert json.loads((tmp_path / "out.json").read_text())["prompt"] == ""


def test_long_lyrics_stay_out_of_the_tags(tmp_path):
    lyrics = tmp_path / "long.txt"
    lyrics.write_text("[verse]\n" + "la la la\n" * 2000)
    assert run_generate(tmp_path / "out.wav", "--lyrics", lyrics) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    comment = json.loads(TinyTag.get(tmp_path / "out.wav").comment)
    assert len(record["lyrics"]) > 15_000 and comment == record | {"lyrics": "see out.json"}


def test_variations_are_their_seeds_whatever_the_batch(tmp_path):
    assert run_generate(tmp_path / "a.wav", "--variations", "3", "--seed", "4", "--batch_size", "2") == 0
    names = sorted(path.name for path in tmp_path.glob("*.wav"))
    assert names == ["a_seed4.wav", "a_seed5.wav", "a_seed6.wav"]
    assert run_generate(tmp_path / "alone.wav", "--seed", "5") == 0
    together = read_audio(tmp_path / "a_seed5.wav")
    np.testing.assert_allclose(together, read_audio(tmp_path / "alone.wav"), rtol=0, atol=1e-4)
    assert np.abs(together - read_audio(tmp_path / "a_seed4.wav")).max() > 0.05
    assert json.loads((tmp_path / "a_seed6.json").read_text())["seed"] == 6


def test_loudness_is_levelled_as_far_as_peaks_allow(tmp_path, capsys):
    for target in ("-30", "-14", "0"):
        assert run_generate(tmp_path / f"at{target}.wav", loudness=target) == 0
    assert loudness_of(tmp_path / "at-30.wav") == pytest.approx(-30, abs=0.05)
    loudest = tmp_path / "at0.wav"
    assert np.abs(read_audio(loudest)).max() == pytest.approx(PEAK, abs=1e-4)
    record = json.loads(loudest.with_suffix(".json").read_text())
    assert record["loudness_lufs"] == pytest.approx(loudness_of(loudest), abs=0.05) and record["loudness_lufs"] < 0
    assert f"Wrote {loudest}  ({record['loudness_lufs']:.1f} LUFS: more would clip)" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def test_generate_compares_and_weighs_the_adapter(tmp_path, adapter_dir):
    base, full, half, zero = (tmp_path / f"{name}.wav" for name in ("base", "full", "half", "zero"))
    adapter = tmp_path / "take:two"  # a colon of its own
    adapter.symlink_to(adapter_dir)
    assert run_generate(base) == 0
    assert run_generate(full, "--adapter", adapter, "--compare") == 0
    assert run_generate(half, "--adapter", f"{adapter}:0.5") == 0
    assert run_generate(zero, "--adapter", f"{adapter}:0.0") == 0
    written = sorted(path.name for path in tmp_path.glob("*.wav"))
    assert written == ["base.wav", "full.wav", "full_without_adapter.wav", "half.wav", "zero.wav"]
    assert np.array_equal(read_audio(tmp_path / "full_without_adapter.wav"), read_audio(base))
    assert json.loads((tmp_path / "full_without_adapter.json").read_text())["adapters"] == []
    assert np.array_equal(read_audio(zero), read_audio(base))
    distances = [np.abs(read_audio(path) - read_audio(base)).mean() for path in (half, full)]
    assert 0.001 < distances[0] < distances[1]


def test_two_adapters_add_up(tmp_path, adapter_dir):
    adapters = ("--adapter", f"{adapter_dir}:0.25", "--adapter", f"{adapter_dir}:0.75")
    assert run_generate(tmp_path / "two.wav", *adapters) == 0
    assert run_generate(tmp_path / "one.wav", "--adapter", adapter_dir) == 0
    np.testing.assert_allclose(read_audio(tmp_path / "two.wav"), read_audio(tmp_path / "one.wav"), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks with audio


@pytest.mark.parametrize(
    "task",
    [
        ("cover", "--cover_strength", "0.5"),
        ("repaint", "--repaint_start", "0.5", "--repaint_end", "1"),
        ("extract", "--track_name", "vocals"),
        ("lego", "--track_name", "drums"),
        ("complete", "--track_classes", "drums, bass"),
    ],
    ids=lambda task: task[0],
)
def test_tasks_take_audio_of_any_kind(tmp_path, source, tiny_pipeline, task):
    from acestep_pipeline.data.audio import to_stereo

    name, *flags = task
    reference = ("--reference_audio", source) if name == "cover" else ()  # 30 s to encode
    argv = ("--src_audio", source, *reference, "--task", name, *flags, "--seed", "3")
    assert run_generate(tmp_path / "out.wav", *argv) == 0
    written = read_audio(tmp_path / "out.wav")
    assert written.shape == (2, 72_000), "as long as its source, though that is no whole number of latent frames"
    audio = torch.from_numpy(to_stereo(read_audio(source)))
    audio = torch.nn.functional.pad(audio, (0, -audio.shape[1] % 1920))
    values = {flag[2:]: value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    expected = tiny_pipeline(
        prompt="lo-fi hip hop", lyrics="[Instrumental]", vocal_language="unknown", audio_duration=1.5,
        num_inference_steps=2, guidance_scale=7.0, shift=1.0, generator=torch.Generator().manual_seed(3),
        src_audio=audio, reference_audio=audio if reference else None, task_type=name,
        audio_cover_strength=float(values.get("cover_strength", 1)), track_name=values.get("track_name"),
        repainting_start=float(values.get("repaint_start", 0)), repainting_end=float(values.get("repaint_end", -1)),
        complete_track_classes=["drums", "bass"] if name == "complete" else None,
    ).audios[0, :, :72_000].numpy()  # fmt: skip
    np.testing.assert_allclose(written, expected, rtol=0, atol=1e-4)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["task"]["task_type"] == name and record["task"]["src_audio"] == str(source)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what ends


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("out.m4a", (), "--output"),
        ("out", (), "--output"),
        ("out.wav", ("--duration", "0"), "--duration"),
        ("out.wav", ("--duration", "3000"), "--duration"),
        ("out.wav", ("--duration", "nan"), "--duration"),
        ("out.wav", ("--num_inference_steps", "0"), "--num_inference_steps"),
        ("out.wav", ("--shift", "-1"), "--shift"),
        ("out.wav", ("--guidance_scale", "-1"), "--guidance_scale"),
        ("out.wav", ("--bpm", "0"), "--bpm"),
        ("out.wav", ("--key", "H major"), "'H major' is no key"),
        ("out.wav", ("--language", "klingon"), "'klingon' is none that the model knows"),
        ("out.wav", ("--variations", "0"), "--variations"),
        ("out.wav", ("--batch_size", "0"), "--batch_size"),
        ("out.wav", ("--seed", "-1"), "--seed"),
        ("out.wav", ("--loudness", "loud"), "--loudness"),
        ("out.wav", ("--loudness", "nan"), "--loudness"),
        ("out.wav", ("--compare",), "--compare needs --adapter"),
        ("out.wav", ("--lyrics", "no-such-lyrics.txt"), "no-such-lyrics.txt"),
        ("out.wav", ("--adapter", "./no-such-adapter"), "no-such-adapter"),
        ("out.wav", ("--adapter", "./no-such-adapter:0.5"), "no-such-adapter"),
        ("out.wav", ("--adapter", "{adapter}:-3"), "between -2 and 2"),
        ("out.wav", ("--adapter", "{adapter}:nan"), "must be a finite number"),
        ("out.wav", ("--pretrained_model_name_or_path", "./no-such-model"), "no-such-model"),
        ("out.wav", ("--task", "remix"), "--task must be one of text2music, cover,"),
        ("out.wav", ("--task", "cover"), "--task cover needs --src_audio"),
        ("out.wav", ("--src_audio", "{source}"), "add --task"),
        ("out.wav", ("--task", "cover", "--src_audio", "{source}", "--duration", "9"), "--duration"),
        ("out.wav", ("--task", "cover", "--src_audio", "no.wav"), "--src_audio no.wav can't be read"),
        ("out.wav", ("--reference_audio", "{text}"), "can't be read"),
        ("out.wav", ("--task", "cover", "--src_audio", "{source}", "--cover_strength", "2"), "--cover_strength"),
        ("out.wav", ("--task", "cover", "--src_audio", "{source}", "--track_name", "bass"), "--track_name is for"),
        ("out.wav", ("--task", "repaint", "--src_audio", "{source}", "--repaint_start", "9"), "lies behind"),
        ("out.wav", ("--task", "repaint", "--src_audio", "{source}", "--repaint_end", "0"), "--repaint_end"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_leaves_no_file(tmp_path, capfd, adapter_dir, source, name, argv, said):
    text = source.with_name("text.wav")
    text.write_text("this is not a wave")
    argv = [argument.format(adapter=adapter_dir, source=source, text=text) for argument in argv]
    # A model that isn't there: everything else is refused before it is looked for.
    missing = () if "no-such-model" in said else ("--pretrained_model_name_or_path", "./no-such-model")
    assert run_generate(tmp_path / name, *missing, *argv) == 2
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


def test_ctrl_c_leaves_the_finished_files(tmp_path):
    command = [sys.executable, "-m", "acestep_pipeline.cli", "generate", *MODEL, "--duration", "2"]
    command += ["--num_inference_steps", "2", "--variations", "500", "--output", str(tmp_path / "out.wav")]
    code = "import sys; from acestep_pipeline.cli import main; main(sys.argv[1:])"
    command[1:3] = ["-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("*.json"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    finished = sorted(path for path in tmp_path.iterdir() if path.suffix == ".wav")
    assert f"Stopped: {len(finished)} of 500 files are finished." in stderr and "Traceback" not in stderr
    assert all(len(soundfile.read(path)[0]) == 96_000 for path in finished)
    assert all(path.suffix in (".wav", ".json") for path in tmp_path.iterdir())


def test_ctrl_c_while_a_file_is_written_waits_for_it(tmp_path, monkeypatch, capfd):
    from acestep_pipeline import files

    def interrupted(path, text, write=files.write_text):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        write(path, text)

    monkeypatch.setattr(files, "write_text", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert run_generate(tmp_path / "out.wav", "--variations", "3") == 130
    assert "Stopped: 1 of 3 files are finished." in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out_seed0.json", "out_seed0.wav"]
    assert signal.getsignal(signal.SIGINT) is before


def test_generate_in_bf16(tmp_path, monkeypatch):
    """Forced here, where it is slow: every component must take what the one before it gives."""
    from acestep_pipeline import hardware

    monkeypatch.setattr(hardware, "bf16_is_fast", lambda device: True)
    model = ("--pretrained_model_name_or_path", "tiny", "--prompt", "lo-fi hip hop", "--loudness", "none")
    argv = ("--duration", "2", "--num_inference_steps", "2", "--output", tmp_path / "bf16.wav")
    assert run("generate", *model, *argv) == 0
    assert run_generate(tmp_path / "fp32.wav") == 0
    bf16, fp32 = (read_audio(tmp_path / name) for name in ("bf16.wav", "fp32.wav"))
    assert 0 < np.abs(bf16 - fp32).max() and np.corrcoef(bf16[0], fp32[0])[0, 1] > 0.9
