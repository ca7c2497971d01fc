#!/usr/bin/env python
"""What adapters cost while generating, beside plain diffusers without any on the same weights.

    python benchmarks/generate.py            on two CPU cores: some minutes

The DiT has the 2 B model's width (2048) and block, with random float32 weights, but 2 blocks instead of 24: time per
block is what counts, and all blocks are alike. Encoders and VAE are small; latents are not decoded, which would take
the same time with adapters as without and hide what they cost. Adapters are rank 64 on all attention layers. Runs
alternate, and ratios are medians over the rounds, of wall-clock time and of this process's CPU time (which other
processes disturb less).
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel
from diffusers.pipelines.ace_step import AceStepConditionEncoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora, save_lora
from acestep_pipeline.progress import quiet_loading
from acestep_pipeline.tiny_checkpoint import LATENT_CHANNELS, tiny_checkpoint_path

RESULTS = Path(__file__).parent / "results" / "generate.json"
NAMES = ("jazz", "lofi", "metal", "waltz")
LYRICS = "[verse]\n" + "\n".join(f"line {line} of a song about the rain and the road" for line in range(12))
PROMPTS = [f"{mood} piece with drums, bass and a warm lead, close and dry, live in a small room" for mood in (
    "a calm", "a dark and slow", "an energetic", "a bright", "a very quiet, nearly silent", "a happy", "a wild", "a",
)]  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--blocks", type=int, default=2, help="of the DiT (default: %(default)s)")
    p.add_argument("--rank", type=int, default=64, help="of the adapters (default: %(default)s)")
    p.add_argument("--duration", type=float, default=60.0, help="seconds of audio, one prompt (default: %(default)s)")
    p.add_argument("--batch-duration", type=float, default=20.0, help="the same, eight prompts (default: %(default)s)")
    p.add_argument("--steps", type=int, default=1, help="of each generation, guided (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="generations of each kind (default: %(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    return p.parse_args(argv)


def main() -> None:
    """Measure, print and write the results file."""
    args = parse_args()
    plain, ours = pipelines(args.blocks)
    with tempfile.TemporaryDirectory() as root:
        files = write_adapters(ours.transformer, Path(root), rank=args.rank)
        names = list(files)
        one = {"audio_duration": args.duration, "num_inference_steps": args.steps}
        eight = {"audio_duration": args.batch_duration, "num_inference_steps": args.steps}

        def with_adapter() -> None:
            generate(ours, PROMPTS[:1], **one)

        def eight_with(adapters: list[str]) -> Callable[[], None]:
            return lambda: generate(ours, PROMPTS, adapters=adapters, **eight)

        # Plain diffusers runs on a DiT of its own without adapter layers, with the same weights.
        ours.load_lora_weights(files["jazz"], adapter_name="jazz")
        cases = {"plain": lambda: generate(plain, PROMPTS[:1], **one), "one_adapter": with_adapter}
        result = {"one_adapter": compare(cases, rounds=args.rounds)}
        ours.fuse_lora()
        cases = {"plain": lambda: generate(plain, PROMPTS[:1], **one), "fused": with_adapter}
        result["fused"] = compare(cases, rounds=args.rounds)
        ours.unfuse_lora()
        for name in names[1:]:
            ours.load_lora_weights(files[name], adapter_name=name)
        ours.set_adapters("jazz")
        cases = {
            "eight_prompts_one_adapter": lambda: generate(ours, PROMPTS, **eight),
            "four_adapters_in_pairs": eight_with([name for name in names for _ in range(2)]),
            "four_adapters_in_turn": eight_with(names * 2),
        }
        result["batch"] = compare(cases, rounds=args.rounds)
    config = ours.transformer.config
    result |= {
        "size": f"{args.blocks} blocks of width {config.hidden_size}, rank {args.rank}, float32",
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "load_average_after": os.getloadavg()[0],
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {args.output}")


def pipelines(blocks: int) -> tuple[AceStepPipeline, ACEStepPipeline]:
    """diffusers' and ours, each with a DiT of its own of the same weights; all other components are shared."""
    torch.manual_seed(0)
    channels = {"in_channels": 3 * LATENT_CHANNELS, "audio_acoustic_hidden_dim": LATENT_CHANNELS}
    with quiet_loading():
        ours = ACEStepPipeline.from_pretrained(tiny_checkpoint_path())
        transformer = AceStepTransformer1DModel(num_hidden_layers=blocks, model_version="base", **channels)
        condition_encoder = AceStepConditionEncoder(
            text_hidden_dim=ours.text_encoder.config.hidden_size,
            timbre_hidden_dim=LATENT_CHANNELS,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
        )
        ours.register_modules(transformer=transformer.eval(), condition_encoder=condition_encoder.eval())
        own = AceStepTransformer1DModel.from_config(transformer.config).eval()
        own.load_state_dict(transformer.state_dict())
        plain = AceStepPipeline(**(ours.components | {"transformer": own}))
    for pipeline in (plain, ours):
        pipeline.set_progress_bar_config(disable=True)
    return plain, ours


def write_adapters(transformer: torch.nn.Module, root: Path, *, rank: int) -> dict[str, Path]:
    """Adapter directories with random weights, by name; the transformer is as it was."""
    add_lora(transformer, LoraSettings(r=rank, lora_alpha=2.0 * rank), seed=0)
    for name in NAMES:
        for parameter_name, parameter in transformer.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter.data, std=0.01)
        save_lora(transformer, root / name)
    transformer.unload_lora()
    return {name: root / name for name in NAMES}


def generate(pipeline: AceStepPipeline, prompts: list[str], **options) -> None:
    """One generation, to latents, with guidance."""
    generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    lyrics = [LYRICS] * len(prompts)
    pipeline(prompts, lyrics=lyrics, guidance_scale=7.0, generator=generators, output_type="latent", **options)


def compare(cases: dict[str, Callable[[], None]], *, rounds: int) -> dict:
    """Seconds of each case and its ratio to the first, medians over the rounds after one to warm up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        # In turn from the front and from the back, so that a drift of the machine's speed cancels.
        for name in list(cases)[:: -1 if number % 2 else 1]:
            start = time.perf_counter(), time.process_time()
            cases[name]()
            took = time.perf_counter() - start[0], time.process_time() - start[1]
            if number:
                seconds[name].append(took)
    first = next(iter(cases))
    result = {}
    for name, values in seconds.items():
        row = {
            "wall_s": statistics.median(wall for wall, _ in values),
            "cpu_s": statistics.median(cpu for _, cpu in values),
        }
        pairs = list(zip(values, seconds[first], strict=True))
        row["wall_ratio"] = round(statistics.median(mine[0] / other[0] for mine, other in pairs), 3)
        row["cpu_ratio"] = round(statistics.median(mine[1] / other[1] for mine, other in pairs), 3)
        result[name] = row
        print(f"{name:28}{row['wall_s']:8.2f} s{row['wall_ratio']:8.3f}{row['cpu_ratio']:8.3f}", flush=True)
    return result


if __name__ == "__main__":
    main()
