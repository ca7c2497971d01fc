"""An update's gradient is the same however it is divided among forward passes and processes."""

import pytest
import soundfile
import torch
from safetensors.torch import load_file

from tests.gradient_probe import watched_gradients
from tests.training_runs import ROOT, start, train_here

PLAIN = {"max_train_steps": 1, "lora_dropout": 0, "effective_batch_size": 4}
EVERYTHING = PLAIN | {
    "timestep_distribution": "mix",
    "weighting_scheme": "min_snr",
    "stratified_timesteps": True,
    "antithetic_noise": True,
}


@pytest.fixture(scope="module")
def unequal_dir(demo_dir, tmp_path_factory):
    """Four tracks of two lengths, and in each length conditions of two lengths: latents and tokens both differ."""
    folder = tmp_path_factory.mktemp("unequal")
    for number, clip in enumerate(sorted(demo_dir.glob("*.wav"))[:4]):
        samples, rate = soundfile.read(clip)
        duration_s = 2 + number // 2
        soundfile.write(folder / f"{number}.wav", samples[: duration_s * rate], rate)
        (folder / f"{number}.tags.txt").write_text(
            "piano" + number % 2 * ", warm pads, drums, bass, energetic, bright"
        )
    return folder


def gradient(data, output, **settings) -> torch.Tensor:
    with watched_gradients() as seen:
        train_here(data, output, **settings)
    (only,) = seen
    return only


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(PLAIN, id="plain", marks=pytest.mark.slow),
        pytest.param(EVERYTHING, id="weighted, stratified, antithetic"),
    ],
)
def test_one_forward_pass_of_four_or_four_of_one(unequal_dir, tmp_path, settings):
    together = gradient(unequal_dir, tmp_path / "4x1", **settings)
    assert_same(gradient(unequal_dir, tmp_path / "1x4", gradient_accumulation_steps=4, **settings), together)
    other_items = gradient(unequal_dir, tmp_path / "seed", seed=1, **settings)
    assert (other_items - together).norm() > 0.1 * together.norm(), "other draws differ, or this shows nothing"


def test_the_launchers_accumulation_does_not_divide_the_loss(unequal_dir, tmp_path, monkeypatch):
    alone = gradient(unequal_dir, tmp_path / "alone", **PLAIN)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert torch.equal(gradient(unequal_dir, tmp_path / "told", **PLAIN), alone)


@pytest.mark.slow
def test_four_processes(unequal_dir, tmp_path):
    process = start(
        unequal_dir,
        tmp_path / "run",
        script=ROOT / "tests" / "gradient_probe.py",
        config="ddp.yaml",
        launch_flags=["--num_processes", "4", "--main_process_port", "0"],
        **PLAIN,
    )
    log, _ = process.communicate(timeout=300)
    assert process.returncode == 0, log
    alone = gradient(unequal_dir, tmp_path / "alone", gradient_accumulation_steps=4, **PLAIN)
    for rank in range(4):
        assert_same(load_file(tmp_path / f"gradients-{rank}.safetensors")["0"], alone)
