"""`acestep-lora estimate`, as it is typed."""

import re
import time

import pytest
import torch

from acestep_pipeline.cli import main
from acestep_pipeline.errors import UsageError
from acestep_pipeline.estimation import this_machine
from acestep_pipeline.estimation.compute_time import Work, pass_seconds
from acestep_pipeline.estimation.gpus import GPUS, Gpu, find_gpu
from acestep_pipeline.estimation.memory_use import Batch, Precision
from acestep_pipeline.estimation.model_shapes import SHAPES, choose_shape, num_parameters
from acestep_pipeline.presets import load_preset, preset_names
from acestep_pipeline.training.arguments import parse_args
from acestep_pipeline.training.settings import choose_sources

SIZES = {"vram_8gb": "rtx 3070", "vram_12gb": "rtx 3060", "vram_16gb": "rtx 4060 ti", "vram_24gb": "rtx 3090"}
XL_SIZES = {"xl_vram_16gb": "rtx 4080", "xl_vram_24gb": "rtx 4090"}


def say(capsys, *flags) -> tuple[int, str, str]:
    """Exit status and what was printed."""
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", *map(str, flags)])
    printed = capsys.readouterr()
    return stopped.value.code, printed.out, printed.err


def test_shapes_have_as_many_parameters_as_the_published_models():
    counts = {name: num_parameters(shape.build("transformer")) for name, shape in SHAPES.items()}
    assert counts == {"2b": 1_575_458_880, "xl": 4_168_897_088}
    assert round(num_parameters(SHAPES["2b"].build("text_encoder")) / 1e6) == 596


def test_the_shape_is_a_folder_s_own_or_that_of_the_name(tiny_dir):
    assert choose_shape(None, str(tiny_dir)).build("transformer").config.hidden_size == 64
    assert choose_shape(None, "ACE-Step/acestep-v15-xl-base-diffusers").name == "xl"
    assert choose_shape(None, "ACE-Step/acestep-v15-base").name == "2b"


def test_gpus_are_found_by_what_people_call_them():
    for name, full in (("RTX 3060 12GB", "RTX 3060 12GB"), ("h100", "H100 SXM 80GB"), ("rtx3090", "RTX 3090 24GB"),
                       ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 16GB"), ("4060", "RTX 4060 8GB")):  # fmt: skip
        assert find_gpu(name).name == full
    assert all(find_gpu(gpu.name) == gpu and gpu.source for gpu in GPUS)
    with pytest.raises(
        UsageError, match="'a100' is more than one of the known GPUs; give one of: A100 40GB, A100 80GB"
    ):
        find_gpu("a100")
    with pytest.raises(UsageError, match="'voodoo' is none of the known GPUs; give one of: RTX 3060 12GB, "):
        find_gpu("voodoo")


@pytest.mark.parametrize(("preset", "gpu"), (SIZES | XL_SIZES).items())
def test_each_memory_preset_fits_its_gpu_with_its_longest_windows(preset, gpu, capsys, monkeypatch, demo_dir):
    long = lambda track, *rest: 25 * load_preset(preset)["max_duration_s"]  # noqa: E731
    monkeypatch.setattr("acestep_pipeline.estimation.estimate.crop_frames", long)
    size = "xl" if preset in XL_SIZES else "2b"
    status, out, _ = say(capsys, "--preset", preset, "--gpu", gpu, "--config", size, "--data", demo_dir,
                         "--min_duration_s", 1)  # fmt: skip
    assert status == 0 and "It fits" in out and "Not yet measured on GPUs" in out, out
    assert f"1 x {load_preset(preset)['max_duration_s']} s" in out


def test_the_largest_passes_that_fit_are_taken_and_more_gpus_share_them(capsys, demo_dir, monkeypatch):
    """Six windows of 60 s in an update: all in one pass where there is memory, fewer where there is not."""
    monkeypatch.setattr("acestep_pipeline.estimation.estimate.crop_frames", lambda *rest: 25 * 60)
    flags = ("--data", demo_dir, "--min_duration_s", 1, "--config", "2b", "--preset", "c")
    flags += ("--effective_batch_size", 6, "--num_validation_samples", 0)
    for gpu, others, size in (("h100", (), 6), ("rtx 4080", (), 3), ("rtx 4080", ("--num_processes", 6), 1),
                              ("rtx 3070", (), 1)):  # fmt: skip
        _, out, _ = say(capsys, *flags, "--gpu", gpu, *others)
        assert f"forward passes of up to {size} x 60 s)" in out, out
    assert say(capsys, *flags, "--gpu", "h100", "--num_processes", 0)[0] == 2
    times = [
        float(re.search(r"Time: ([\d.]+) s", say(capsys, *flags, "--gpu", "rtx 3090", "--num_processes", n)[1])[1])
        for n in (1, 2)
    ]
    assert 1.7 < times[0] / times[1] < 2, "two take turns, and add their gradients"


def test_what_else_is_kept_and_done_counts(capsys, demo_dir):
    flags = ("--data", demo_dir, "--min_duration_s", 1, "--config", "2b", "--gpu", "rtx 4090", "--rank", 64)

    def part(name, *others):
        return float(re.search(rf"{name} +([\d.]+)", say(capsys, *flags, *others)[1])[1])

    assert part("adapter  ", "--ema_decay", 0.999) == pytest.approx(2 * part("adapter  "), abs=0.011)
    base = part("base weights")
    assert 0.25 * base > part("base weights", "--offload") > 0.02 * base
    assert part("Samples at the end:", "--offload") < part("Samples at the end:") - 2
    assert "validations" not in say(capsys, *flags)[1]
    _, out, _ = say(capsys, *flags, "--validation_fraction", 0.4, "--offload")
    assert " and 2 held out" in out and "validations " in out and "of 31.5 GB/s)" in out


def test_an_xl_preset_takes_the_xl_model(capsys, demo_dir, monkeypatch):
    monkeypatch.delenv("ACESTEP_MODEL", raising=False)
    for preset, model in (("xl_vram_16gb", "xl"), ("vram_16gb", "2b")):
        argv = ["estimate", "--preset", preset, "--data", str(demo_dir), "--min_duration_s", "1", "--gpu", "h100"]
        with pytest.raises(SystemExit):
            main(argv)
        assert f"Model {model}:" in capsys.readouterr().out
        args = parse_args(["--preset", preset, "--train_data_dir", str(demo_dir)])
        assert ("XL base" in choose_sources(args)["Model"]) == (model == "xl")


def test_every_memory_preset_is_tried_above():
    assert {name for name in preset_names() if "vram" in name} == SIZES.keys() | XL_SIZES.keys()


def test_what_does_not_fit_is_told_a_preset_that_does(capsys, demo_dir):
    flags = ("--data", demo_dir, "--min_duration_s", 1, "--config", "xl", "--preset", "c")
    status, out, _ = say(capsys, *flags, "--gpu", "rtx 4060 ti", "--num_validation_samples", 0, "--rank", 512)
    assert status == 1 and "It does not fit" in out
    assert "--preset xl_vram_16gb fits" in out or "No preset makes it fit" in out
    status, out, _ = say(capsys, *flags, "--gpu", "rtx 3070")
    assert status == 1 and "No preset makes it fit there" in out


def test_without_a_gpu_all_are_listed_and_unknown_flags_are_refused(capsys, demo_dir):
    status, out, _ = say(capsys, "--data", demo_dir, "--min_duration_s", 1, "--pretrained_model_name_or_path", "tiny")
    assert status == 0 and all(gpu.name in out for gpu in GPUS)
    status, _, err = say(capsys, "--data", demo_dir, "--gpu", "voodoo")
    assert status == 2 and "is none of the known GPUs" in err
    status, _, err = say(capsys, "--data", demo_dir, "--no_such_flag", 1)
    assert status == 2 and "no_such_flag" in err


def test_this_machine_is_measured_and_no_share_is_taken_off_what_it_reaches(capsys, demo_dir, monkeypatch):
    monkeypatch.setattr(this_machine, "_BATCH", Batch(1, 50, 20))
    monkeypatch.setattr(this_machine, "_COPIED_BYTES", 16 << 20)
    flags = ("--data", demo_dir, "--min_duration_s", 1, "--config", "2b", "--preset", "smoke")
    _, out, _ = say(capsys, *flags, "--gpu", "this", "--mixed_precision", "no")
    assert "1 x this machine (" in out and "published" not in out
    teraflops = float(re.search(r"Measured just now: ([\d.e-]+) TFLOP/s", out)[1])
    rows, weight = torch.randn(750, 2048), torch.randn(2048, 2048)
    started = time.perf_counter()
    for _ in range(3):
        rows @ weight
    assert teraflops < 20 * 3 * 2 * 750 * 2048**2 / (time.perf_counter() - started) / 1e12, "of a wrong order"
    work = Work(flops=1e15, bytes_moved=1e9, kernels=0)
    figures = {"bf16_tflops": None, "fp32_tflops": 10.0, "bandwidth_gb_s": 100.0, "host_gb_s": 10.0, "source": ""}
    measured = Gpu("a", 8, measured=True, **figures)
    assert pass_seconds(work, measured, Precision(weight=4)) == pytest.approx(100 + 0.01)
    assert pass_seconds(work, Gpu("b", 8, **figures), Precision(weight=4)) > 200
