"""`acestep-lora convert-checkpoint`: the original layout on disk, written in diffusers' layout."""

import subprocess
import sys
import types

import pytest
import torch
from diffusers import AceStepPipeline
from safetensors import safe_open

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.checkpoint_conversion import DIT_CLASSES
from acestep_pipeline.cli import main
from acestep_pipeline.estimation.model_shapes import SHAPES
from acestep_pipeline.tiny_checkpoint import build_tokenizer
from tests.original_layout import write_original_checkpoint

COMPONENTS = (*DIT_CLASSES, "vae", "text_encoder")


def convert(*argv) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["convert-checkpoint", *map(str, argv)])
    return caught.value.code or 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_diffusers_loads_what_was_converted(tiny_pipeline, tmp_path, capsys, dtype):
    tiny_pipeline.to(dtype)
    source = write_original_checkpoint(tiny_pipeline, tmp_path / "original")
    directory = tmp_path / "new" / "converted"
    assert convert(source, directory) == 0
    said = capsys.readouterr()
    assert f"Wrote {directory}" in said.out and "not expected" not in said.err
    converted = AceStepPipeline.from_pretrained(directory, dtype=dtype)
    for component in COMPONENTS:
        state = getattr(converted, component).state_dict()
        expected = getattr(tiny_pipeline, component).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected), component
        files = list((directory / component).glob("*.safetensors"))
        with safe_open(files[0], "pt") as file:
            assert all(file.get_tensor(name).dtype == dtype for name in file.keys()), "the precision is kept"
    settings = {"prompt": "lo-fi", "audio_duration": 1.0, "num_inference_steps": 1, "guidance_scale": 1.0}
    settings |= {"output_type": "latent", "shift": 1.0}

    def latents(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**settings, generator=torch.Generator().manual_seed(0)).audios

    assert torch.equal(latents(converted), latents(ACEStepPipeline.from_pretrained(source, torch_dtype=dtype)))
    assert list(directory.parent.iterdir()) == [directory]
    ours = ACEStepPipeline.from_pretrained(directory, torch_dtype=dtype)
    assert ours.transformer.config.timestep_mu == -0.4, "what training reads is kept"


def test_wrong_usage_is_one_line(tiny_pipeline, tiny_dir, tmp_path, capsys):
    source = write_original_checkpoint(tiny_pipeline, tmp_path / "original")
    weights = source / "acestep-v15-base" / "model.safetensors"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()

    def refusal(*argv) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert convert(*argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error

    assert "nothing to convert" in refusal(tiny_dir, tmp_path / "new")
    assert "not an empty folder" in refusal(source, tmp_path / "taken")
    assert "can't be written" in refusal(source, weights / "new")
    assert "no ACE-Step 1.5 checkpoint" in refusal(tmp_path / "taken", tmp_path / "new")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "download it again" in refusal(source, tmp_path / "new")


@pytest.mark.slow
def test_the_2b_model_converts_within_little_more_than_its_size(tmp_path):
    """With random weights, in a process of its own whose peak is measured; it takes 10 GB of disk."""
    shape = SHAPES["2b"]
    modules = {name: shape.build(name) for name in ("transformer", "condition_encoder", "text_encoder", "vae")}
    with torch.device("meta"):
        modules |= {name: DIT_CLASSES[name]() for name in ("audio_tokenizer", "audio_token_detokenizer")}
    generator = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        modules[name] = module.to(torch.bfloat16).to_empty(device="cpu")
        for tensor in modules[name].state_dict().values():
            tensor.copy_(torch.randn(1, generator=generator))
    pipeline = types.SimpleNamespace(**modules, tokenizer=build_tokenizer())
    source = write_original_checkpoint(pipeline, tmp_path / "original")
    del pipeline, modules
    size = sum(path.stat().st_size for path in source.rglob("*.safetensors"))
    assert size > 4e9
    code = (
        "import resource, sys; from acestep_pipeline.cli import main\n"
        "try: main(['convert-checkpoint', *sys.argv[1:]])\n"
        "finally: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "converted")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f"{size / 1e9:.2f} GB converted with a peak of {peak / 1e9:.2f} GB, {peak / size:.2f} of it")
    assert peak <= 1.2 * size
    converted = sum(path.stat().st_size for path in (tmp_path / "converted").rglob("*.safetensors"))
    assert converted == pytest.approx(size, rel=1e-3)
