"""The examples with adapters, run as a user would, on the tiny checkpoint."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.data.audio import read_audio
from tests.test_adapters import save_trained

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COMMON = ["--pretrained_model_name_or_path", "tiny", "--duration", "1", "--steps", "5"]


@pytest.fixture(scope="module")
def adapters(tiny_dir, tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("jazz", "lofi")):
        save_trained(tiny_dir, root / name, LoraSettings(r=2 + seed, lora_alpha=6.0), seed)
    return [f"--adapter=jazz={root / 'jazz'}", f"--adapter=lofi={root / 'lofi'}"]


def run(monkeypatch, name: str, *argv: str) -> None:
    """`python examples/<name>.py …`, in this process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def heard(output: Path) -> dict[str, np.ndarray]:
    return {path.stem: read_audio(path) for path in sorted(output.iterdir(), key=lambda path: path.stem)}


@pytest.fixture(scope="module")
def swapped(adapters, tmp_path_factory) -> dict[str, np.ndarray]:
    """What the first example wrote."""
    output = tmp_path_factory.mktemp("swapped")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "hot_swap", *adapters, *COMMON, "--output", str(output))
    return heard(output)


def test_hot_swap(swapped):
    assert list(swapped) == ["jazz", "jazz-and-lofi", "jazz-then-lofi", "lofi", "neither"]
    assert len({clip.tobytes() for clip in swapped.values()}) == 5


def test_mixed_batch_is_hot_swap_one_by_one(monkeypatch, adapters, tmp_path, swapped):
    run(monkeypatch, "mixed_batch", *adapters, *COMMON, "--output", str(tmp_path))
    mixed = heard(tmp_path)
    assert list(mixed) == ["0-jazz", "1-lofi", "2-jazz-half", "3-lofi-half", "4-without"]
    # The first has the same prompt and seed in both.
    np.testing.assert_allclose(mixed["0-jazz"], swapped["jazz"], atol=1e-3)
    assert len({clip.tobytes() for clip in mixed.values()}) == 5


def test_with_and_without(monkeypatch, adapters, tmp_path, capsys, swapped):
    prompts = ["--prompt", "a slow blues", "--prompt", "solo piano, and much more to say about how it sounds"]
    run(monkeypatch, "with_and_without", adapters[0], *COMMON, *prompts, "--output", str(tmp_path))
    pairs = heard(tmp_path)
    assert list(pairs) == ["0-A-with", "0-B-without", "1-A-with", "1-B-without"]
    np.testing.assert_allclose(pairs["0-A-with"], swapped["jazz"], atol=1e-3)
    np.testing.assert_allclose(pairs["0-B-without"], swapped["neither"], atol=1e-3)
    assert capsys.readouterr().out.count("of the loudness (RMS) of B") == 2


def test_interpolation_begins_with_one_and_ends_with_the_other(monkeypatch, adapters, tmp_path, swapped):
    run(monkeypatch, "interpolate", *adapters, *COMMON, "--points", "3", "--output", str(tmp_path))
    between = list(heard(tmp_path).values())
    assert len(between) == 3
    np.testing.assert_array_equal(between[0], swapped["jazz"])
    np.testing.assert_array_equal(between[2], swapped["lofi"])
    assert not np.allclose(between[1], between[0], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("hot_swap", ["--adapter", "jazz=missing"], "at least 2 adapters"),
        ("mixed_batch", ["--adapter", "jazz"], "--adapter jazz: write NAME=PATH"),
        ("with_and_without", ["--adapter", "jazz=./missing"], "./missing does not exist"),
        ("interpolate", ["--adapter", "a=b", "--adapter", "b=c", "--points", "1"], "--points must be at least 2"),
    ],
)
def test_wrong_use_is_one_sentence(monkeypatch, capsys, name, argv, said):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, name, *argv, *COMMON)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error
