"""The ways to generate that `generate.py` compares: plain diffusers and `ACEStepPipeline`, on the same weights.

All of them share one DiT's tensors, but for those of the fused one; each has modules, adapter layers and compiled
blocks of its own. Encoders and VAE have the published shapes where the DiT has, and are small where it is.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AceStepPipeline, AutoencoderOobleck
from diffusers.pipelines.ace_step import AceStepConditionEncoder

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora, save_lora
from acestep_pipeline.estimation import model_shapes
from acestep_pipeline.estimation.model_shapes import SHAPES
from acestep_pipeline.hardware import default_device
from acestep_pipeline.progress import quiet_loading
from acestep_pipeline.tiny_checkpoint import tiny_checkpoint_path
from acestep_pipeline.training.compilation import compiled_graphs
from benchmarks.random_models import condition_width, random_module, transformer_shape

NAMES = ("jazz", "lofi", "metal", "waltz")
LYRICS = "[verse]\n" + "\n".join(f"line {line} of a song about the rain and the road" for line in range(12))
PROMPTS = [f"{mood} piece with drums, bass and a warm lead, close and dry, live in a small room" for mood in (
    "a calm", "a dark and slow", "an energetic", "a bright", "a very quiet, nearly silent", "a happy", "a wild", "a",
)]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is generated: by a model of `random_models.SIZES`, as its variant, so many prompts of one length; `decoded`
    says whether to audio, or to latents alone. Adapters are LoRAs of `rank` on all attention layers."""

    size: str = "2b"
    variant: str = "base"
    seconds: int = 60
    steps: int = 27
    guidance: float = 7.0
    prompts: int = 1
    decoded: bool = True
    rank: int = 64


@dataclass(frozen=True)
class Way:
    """How: with diffusers' pipeline or ours, one adapter, several (one for each prompt) or none, folded into the
    weights or not, and with blocks compiled or not. `equals` is the way that it ought to sound like."""

    plain: bool = False
    adapters: Sequence[int] = ()
    fused: bool = False
    compiled: bool = False
    equals: str | None = None


WAYS = {
    "diffusers": Way(plain=True),
    "diffusers_compiled": Way(plain=True, compiled=True, equals="diffusers"),
    "diffusers_adapter": Way(plain=True, adapters=(0,)),
    "ours": Way(equals="diffusers"),
    "compiled": Way(compiled=True, equals="diffusers"),
    "adapter": Way(adapters=(0,), equals="diffusers_adapter"),
    "adapter_compiled": Way(adapters=(0,), compiled=True, equals="diffusers_adapter"),
    "fused": Way(adapters=(0,), fused=True, equals="diffusers_adapter"),
    "fused_compiled": Way(adapters=(0,), fused=True, compiled=True, equals="diffusers_adapter"),
    # Of eight prompts: four adapters, two prompts of each behind one another, or all in turn.
    "adapters_in_pairs": Way(adapters=(0, 0, 1, 1, 2, 2, 3, 3)),
    "adapters_in_turn": Way(adapters=(0, 1, 2, 3) * 2),
}


def shared_copy(module: torch.nn.Module) -> torch.nn.Module:
    """Modules of its own on the same parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


class Bench:
    """The models of a case, adapters in a folder, and a pipeline for each way, made when it is asked for."""

    def __init__(self, case: Case, folder: Path) -> None:
        """Build all of it: bfloat16 on a GPU, float32 on a CPU."""
        self.case, self.device = case, default_device()
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        shape = transformer_shape(case.size) | {"model_version": case.variant}
        self.transformer = model_shapes.random_transformer(shape, device=self.device, dtype=self.dtype)
        self.transformer.eval().requires_grad_(False)
        self.components = self._components(shape)
        self.files = self._write_adapters(folder)
        self.pipelines: dict[str, AceStepPipeline] = {}

    def _components(self, shape: dict) -> dict:
        """What a pipeline has beside the DiT."""
        with quiet_loading():
            tiny = AceStepPipeline.from_pretrained(tiny_checkpoint_path())
        if self.case.size in SHAPES:
            parts = {name: SHAPES[self.case.size].build(name) for name in ("vae", "text_encoder", "condition_encoder")}
        else:
            # Narrow within: the 750 frames of a reference would else cost more than two blocks of the DiT.
            narrow = {"intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
            narrow["hidden_size"] = condition_width(self.transformer)
            with torch.device("meta"), quiet_loading():
                parts = {
                    "vae": AutoencoderOobleck(
                        **SHAPES["2b"].vae | {"decoder_channels": 4, "channel_multiples": [1, 1, 1, 1, 1]}
                    ),
                    "condition_encoder": AceStepConditionEncoder(
                        **narrow, text_hidden_dim=tiny.text_encoder.config.hidden_size,
                        num_lyric_encoder_hidden_layers=1, num_timbre_encoder_hidden_layers=1,
                    ),
                }  # fmt: skip
        built = {name: random_module(part, device=self.device, dtype=self.dtype) for name, part in parts.items()}
        if "text_encoder" not in built:
            built["text_encoder"] = tiny.text_encoder.to(self.device, self.dtype)
        # Codes of audio are for covers alone, and would stay on the CPU.
        return tiny.components | built | {"audio_tokenizer": None, "audio_token_detokenizer": None}

    def _write_adapters(self, folder: Path) -> list[Path]:
        """Directories as training leaves them, with random weights."""
        transformer = shared_copy(self.transformer)
        add_lora(transformer, LoraSettings(r=self.case.rank, lora_alpha=2.0 * self.case.rank), seed=0)
        for name in NAMES:
            for parameter_name, parameter in transformer.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.normal_(parameter.data, std=0.01)
            save_lora(transformer, folder / name)
        return [folder / name for name in NAMES]

    def pipeline(self, way: str) -> AceStepPipeline:
        """That of a way of `WAYS`, ready to generate."""
        if way not in self.pipelines:
            self.pipelines[way] = self._build(WAYS[way])
        return self.pipelines[way]

    def _build(self, how: Way) -> AceStepPipeline:
        transformer = copy.deepcopy(self.transformer) if how.fused else shared_copy(self.transformer)
        # Ours sets the VAE's tiles, and XL's timbre token: not to be shared with diffusers'.
        own = {name: shared_copy(self.components[name]) for name in ("vae", "condition_encoder")}
        components = self.components | own | {"transformer": transformer}
        pipeline = (AceStepPipeline if how.plain else ACEStepPipeline)(**components)
        pipeline.set_progress_bar_config(disable=True)
        if how.compiled and how.adapters and not how.fused:
            pipeline.enable_lora_hotswap(target_rank=self.case.rank, target_modules="attention")
        for number in dict.fromkeys(how.adapters):
            pipeline.load_lora_weights(self.files[number], adapter_name=NAMES[number])
        if how.fused:
            pipeline.fuse_lora()
        if how.compiled:
            transformer._repeated_blocks = ["AceStepTransformerBlock"]  # ours does this itself
            transformer.compile_repeated_blocks(fullgraph=True)
        return pipeline

    def generate(self, way: str, *, decoded: bool | None = None, **options) -> torch.Tensor:
        """One generation: audio `[prompts, 2, samples]`, or latents `[prompts, frames, 64]`."""
        case, how = self.case, WAYS[way]
        prompts = PROMPTS[: case.prompts]
        if len(how.adapters) > 1:
            options["adapters"] = [NAMES[number] for number in how.adapters]
        return self.pipeline(way)(
            prompts, lyrics=[LYRICS] * len(prompts), audio_duration=float(case.seconds),
            num_inference_steps=case.steps, guidance_scale=case.guidance,
            generator=[torch.Generator().manual_seed(number) for number in range(len(prompts))],
            output_type="pt" if (case.decoded if decoded is None else decoded) else "latent", **options,
        ).audios  # fmt: skip

    def swap_adapter(self, way: str) -> int:
        """Another adapter in the place of the first, and another weight, each followed by a generation; the number of
        graphs that had to be compiled for it."""
        pipeline, before = self.pipeline(way), compiled_graphs()
        pipeline.load_lora_weights(self.files[1], adapter_name=NAMES[0], hotswap=True)
        self.generate(way, decoded=False)
        pipeline.set_adapters(NAMES[0], 0.5)
        self.generate(way, decoded=False)
        return compiled_graphs() - before
