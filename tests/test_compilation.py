"""`--torch_compile`: the same gradients and the same adapter, few shapes, nothing compiled again."""

import functools
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import AceStepTransformer1DModel
from safetensors.torch import load_file

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.condition_mask import ConditionMask
from acestep_pipeline.data.batching import BatchLoader, EpochPlanner, condition_bucket
from acestep_pipeline.data.draws import DrawSettings
from acestep_pipeline.data.latent_cache import CachedTrack, Window
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.masked_attention import use_masked_attention
from acestep_pipeline.prompt_fields import PromptFields
from acestep_pipeline.quantization import quantize_base
from acestep_pipeline.training import arguments, base_model, compilation
from acestep_pipeline.training.argument_checks import check_args
from acestep_pipeline.training.compilation import (
    CompiledBlocks,
    check_compile_hardware,
    common_passes,
    compiled_graphs,
)
from acestep_pipeline.training.memory import enable_gradient_checkpointing
from acestep_pipeline.training.offload import BlockOffloading
from tests.training_runs import metrics, train_here

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}  # fmt: skip
WEIGHTS = "pytorch_lora_weights.safetensors"


class Model:
    """A DiT with an adapter whose blocks may be compiled, and its passes."""

    def __init__(
        self, *, device="cpu", backend="aot_eager", dtype=torch.float32, ratio=0.0, base_quantization="none",
        offload=False, **lora,
    ) -> None:  # fmt: skip
        torch.compiler.reset()
        torch.manual_seed(0)
        self.device, self.dtype = torch.device(device), dtype
        self.transformer = AceStepTransformer1DModel(**SHAPE).to(device, dtype).train()
        use_masked_attention(self.transformer)
        quantize_base(self.transformer, base_quantization, device=self.device)
        self.parameters = add_lora(self.transformer, LoraSettings(r=4, lora_alpha=8.0, **lora), seed=0)
        for parameter in self.parameters:
            parameter.detach().add_(0.02 * torch.randn(parameter.shape).to(device))
        self.mask = ConditionMask(self.transformer)
        self.blocks = CompiledBlocks(self.transformer, backend=backend)
        if ratio:
            enable_gradient_checkpointing(self.transformer, ratio)
        if offload:
            BlockOffloading(self.transformer, self.device)

    def batch(self, items: int = 2, frames: int = 60, tokens: int = 7) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(items)
        shapes = {"latents": (frames, 64), "context": (frames, 128), "conditions": (tokens, 64)}
        drawn = {name: torch.randn(items, *shape, generator=generator) for name, shape in shapes.items()}
        drawn |= {
            "mask": torch.arange(tokens) < tokens - torch.arange(items)[:, None],
            "sigmas": torch.rand(items, generator=generator),
        }
        return {name: tensor.to(self.device) for name, tensor in drawn.items()}

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.mask.set(batch["mask"])
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            velocity = self.transformer(
                hidden_states=batch["latents"].to(self.dtype), timestep=batch["sigmas"].to(self.dtype),
                timestep_r=batch["sigmas"].to(self.dtype), encoder_hidden_states=batch["conditions"].to(self.dtype),
                context_latents=batch["context"].to(self.dtype),
            ).sample  # fmt: skip
        return (velocity.float() - batch["latents"]).square().sum()

    def compile(self, *batches: dict[str, torch.Tensor]) -> None:
        passes = [((len(b["latents"]), b["latents"].shape[1], 7), b, 1 / len(batches)) for b in batches]
        self.blocks.compile(passes, forward=self.forward, parameters=self.parameters, precision=self.dtype)


@pytest.mark.parametrize(
    "changes",
    (
        {"lora_dropout": 0.1, "ratio": 0.5},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"use_rslora": True, "target_modules": ("to_q", "down_proj")}, marks=pytest.mark.slow),
        pytest.param({"base_quantization": "nf4"}, marks=pytest.mark.slow),
        pytest.param({"base_quantization": "int8"}, marks=pytest.mark.slow),
        pytest.param({"offload": True}, marks=pytest.mark.slow),
        pytest.param({"rank_pattern": {"cross": 2}}, marks=pytest.mark.slow),
    ),
    ids=str,
)
def test_gradients_are_those_of_plain_blocks(changes):
    model, before = Model(**changes), compiled_graphs()
    names = list(model.transformer.state_dict())
    model.compile(model.batch(2))
    graphs = compiled_graphs() - before
    assert graphs == 2, "the first block's, and the other's"
    assert model.blocks.shapes[0].shape == (2, 60, 7) and model.blocks.shapes[0].difference <= 1e-6
    assert list(model.transformer.state_dict()) == names and not any("_orig_mod" in name for name in names)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for items in (2, 1, 2):  # of 1 item nothing was compiled
            model.forward(model.batch(items)).backward()
        with torch.no_grad():
            model.forward(model.batch(2))
    assert compiled_graphs() - before == graphs and model.blocks.num_recompilations == 0


def test_other_gradients_are_refused(monkeypatch):
    model = Model()
    compiled = []

    def wrong(forward, **options):
        compiled.append(options)
        return lambda *args, **inputs: 1.01 * forward(*args, **inputs)

    monkeypatch.setattr(torch, "compile", wrong)
    model.blocks = CompiledBlocks(model.transformer)
    assert len(compiled) == 2 and compiled[0]["options"] == compilation.OPTIONS
    with pytest.raises(RunError, match="compiled blocks give other gradients .* leave --torch_compile out"):
        model.compile(model.batch())


@pytest.mark.slow
def test_a_shape_whose_compiled_pass_does_not_fit_into_memory_is_not_trained_with():
    """Its gradients were not compared with anything."""
    model = Model()
    plain = model.forward

    def limited(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        error = plain(batch)
        passes.append(batch)
        if len(passes) > 1:  # the first is of plain blocks
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return error

    passes: list = []
    model.forward = limited
    model.compile(model.batch())
    assert len(passes) == 2 and model.blocks.too_large == [(2, 60, 7)] and not model.blocks.shapes
    assert model.blocks.describe(25) == "Compiled nothing: memory did not suffice, so all run as they are."
    torch.compiler.reset()
    before = compiled_graphs()
    plain(model.batch()).backward()
    assert compiled_graphs() == before


@pytest.mark.slow
def test_what_was_compiled_again_stays_counted_when_other_shapes_are_compiled():
    model = Model()
    model.compile(model.batch(1))
    model.transformer.eval()  # which compiled code depends on
    model.forward(model.batch(1)).backward()
    model.transformer.train()
    again = model.blocks.num_recompilations
    model.compile(model.batch(2))
    assert model.blocks.num_recompilations == again > 0


@pytest.mark.slow
def test_what_can_not_be_compiled_is_one_sentence():
    model = Model()

    def break_graph(module, args, kwargs):
        torch._dynamo.graph_break()

    model.transformer.layers[1].self_attn.register_forward_pre_hook(break_graph, with_kwargs=True)
    with pytest.raises(RunError, match=r"^the blocks can't be compiled here \(.*\); leave --torch_compile out\.$"):
        model.compile(model.batch())


@pytest.mark.slow
@pytest.mark.parametrize("lora_dropout", (0.0, 0.1))
def test_inductor_is_right_on_this_cpu(lora_dropout):
    """Whose kernels are wrong where a block's input is transposed, as the first layer leaves it."""
    model = Model(backend="inductor", lora_dropout=lora_dropout, ratio=0.25)
    model.compile(model.batch(2, frames=600))
    assert model.blocks.shapes[0].difference <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)), ids=str)
@pytest.mark.parametrize("ratio", (0.0, 0.5))
def test_inductor_is_right_on_this_gpu(dtype, tolerance, ratio):
    model = Model(device="cuda", backend="inductor", dtype=dtype, lora_dropout=0.1, ratio=ratio)
    model.compile(model.batch(4, frames=1500))
    assert model.blocks.shapes[0].difference <= tolerance
    for _ in range(3):
        model.forward(model.batch(4, frames=1500)).backward()
    assert model.blocks.num_recompilations == 0


@pytest.fixture
def aot_eager(monkeypatch):
    """Graphs that are traced and differentiated as ever, and run as they are: nothing to wait for."""
    torch.compiler.reset()
    monkeypatch.setattr(base_model, "CompiledBlocks", functools.partial(CompiledBlocks, backend="aot_eager"))


@pytest.mark.slow
def test_a_run_and_its_resumption_end_in_the_same_adapter(aot_eager, demo_dir, tmp_path, capsys):
    settings = {"max_train_steps": 4, "effective_batch_size": 2, "lora_dropout": 0.1, "max_duration_s": 2}
    train_here(demo_dir, tmp_path / "plain", **settings)
    train_here(demo_dir, tmp_path / "whole", torch_compile=True, **settings)
    said = capsys.readouterr().out
    assert "Compiled 1 shapes of forward passes in" in said and "100% of all" in said
    assert "shapes of forward passes in" in (tmp_path / "whole" / "README.md").read_text()
    assert ", 0 recompilations" in said
    cut = tmp_path / "cut"
    train_here(demo_dir, cut, torch_compile=True, checkpointing_steps=2, **settings)
    (cut / WEIGHTS).unlink()
    with pytest.raises(UsageError, match="torch_compile was True and is None"):
        train_here(demo_dir, cut, resume_from_checkpoint=cut / "checkpoint-2", **settings)
    torch.compiler.reset()
    train_here(demo_dir, cut, torch_compile=True, resume_from_checkpoint=cut / "checkpoint-2", **settings)
    assert (cut / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert metrics(cut) == metrics(tmp_path / "whole")
    plain, compiled = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "whole"))
    assert plain.keys() == compiled.keys()
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "whole")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2), "but for masks of dropout"
    assert json.loads((tmp_path / "whole" / "training_args.json").read_text())["arguments"]["torch_compile"] is True


def test_conditions_are_padded_to_few_lengths():
    assert [condition_bucket(tokens, longest=397) for tokens in (1, 64, 65, 200, 257, 397)] == [
        64, 64, 128, 256, 400, 400,
    ]  # fmt: skip


def entry(name: str, frames: int, tokens: int) -> CachedTrack:
    window = Window(0, PromptFields(prompt=name, audio_duration=frames / 25), Path(name), tokens)
    return CachedTrack(name, Path(name), frames, frames, (window,))


def test_the_commonest_shapes_are_compiled_wherever_a_run_begins():
    """Forty tracks of a minute and a hundred of lengths of their own: none of these is common."""
    tracks = [entry(f"minute-{number}", 1500, 60 + number) for number in range(40)]
    tracks += [entry(f"other-{number}", 2000 + 25 * number, 90) for number in range(100)]
    draws = {"seed": 0, "cfg_dropout": 0.0, "items_per_update": 4}
    loader = BatchLoader(tracks, DrawSettings(**draws), bucket_conditions=True)

    def planner() -> EpochPlanner:
        return EpochPlanner(tracks, seed=0, effective_batch_size=4, micro_batch_size=4)

    common = common_passes(planner(), loader)
    shapes = [loader.shape(micro) for micro, _ in common]
    assert shapes[0] == (4, 1500, 104) and all(frames == 1500 for _, frames, _ in shapes)
    shares = [share for _, share in common]
    assert shares == sorted(shares, reverse=True) and all(share >= compilation.LEAST_SHARE for share in shares)
    later = planner()
    later.plan(7)
    assert common_passes(later, loader) == common
    halved = planner()
    halved.frames_in_pass = 3000  # two windows of a minute
    assert loader.shape(common_passes(halved, loader)[0][0])[:2] == (2, 1500)


def test_where_it_can_not_work_is_said_first(monkeypatch):
    check_compile_hardware(torch.device("cpu"), sharded=False)
    with pytest.raises(UsageError, match="--torch_compile is for CUDA and CPU, and this is mps"):
        check_compile_hardware(torch.device("mps"), sharded=False)
    with pytest.raises(UsageError, match="--torch_compile works with one process or DDP"):
        check_compile_hardware(Accelerator(cpu=True).device, sharded=True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="--torch_compile needs a C compiler"):
        check_compile_hardware(torch.device("cpu"), sharded=False)


@pytest.mark.parametrize("flags", (["--use_dora"], ["--adapter_type", "lokr"]))
def test_adapters_whose_layers_can_not_be_compiled_are_refused(flags):
    with pytest.raises(UsageError, match="--torch_compile is for LoRA and rsLoRA"):
        check_args(arguments.parse_args(["--torch_compile", *flags]))
