#!/usr/bin/env python
"""Whether recipe c fits into 12, 8 and 16 GB, at full size, on a machine that has neither the GPU nor the memory.

    python benchmarks/memory.py              some minutes on a CPU, less than 2 GB of memory

Each target names flags and a limit, for songs of one and of ten minutes. For each, three figures: what
`acestep-lora estimate` predicts; what an update's tensors come to when the real code (DiT, LoRA, checkpointing,
backward pass, clip, AdamW) runs on PyTorch's fake tensors, which have shapes, dtypes and storages but no data, so that
every allocation and release is counted; and the same for the VAE's tiles. Fake tensors follow the CPU's kernels (a
fused attention, float32 dropout masks), so the prediction that is compared with them is for those, unquantised, with
plain AdamW; the one that is held against the limit is for CUDA's kernels and the target's flags. The sizes of
quantised weights and of 8-bit Adam's state are formulas, which `tests/test_quantization.py` and
`tests/test_memory_use.py` hold against real ones.

Then training of real songs with the embedded checkpoint, one process for each length, whose peak memory must not grow
with the song.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import weakref
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.condition_mask import ConditionMask
from acestep_pipeline.data.tracks import Track
from acestep_pipeline.estimation.estimate import USABLE_MEMORY, Estimate, estimate
from acestep_pipeline.estimation.gpus import Gpu
from acestep_pipeline.estimation.memory_use import GIB, Adapter, Batch, Precision, inspect_adapter, predict_update
from acestep_pipeline.estimation.model_shapes import SHAPES
from acestep_pipeline.estimation.other_phases import decoding_tile_bytes, encoding_tile_bytes
from acestep_pipeline.masked_attention import use_masked_attention
from acestep_pipeline.pipeline import tile_audio_coding
from acestep_pipeline.progress import quiet_loading
from acestep_pipeline.training.arguments import parse_args
from acestep_pipeline.training.memory import enable_gradient_checkpointing
from acestep_pipeline.training.optimization import build_optimizer
from train_ace_step_lora import squared_error

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
FRAMES_PER_SECOND = 25


@dataclass(frozen=True)
class Target:
    """Flags of a training of a model (`2b`, `xl`), and the GB (10^9 bytes) that it has to fit into."""

    model: str
    limit_gb: float
    flags: tuple[str, ...]


TARGETS = (
    Target("2b", 12, ("--preset", "c", "--max_duration_s", "60")),
    Target("2b", 12, ("--preset", "c", "--max_duration_s", "60", "--gradient_checkpointing")),
    Target("2b", 12, ("--preset", "vram_12gb")),
    Target("2b", 8, ("--preset", "vram_8gb")),
    Target("xl", 16, ("--preset", "xl_vram_16gb")),
)


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations return while it is active: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.live, self.peak = WeakIdKeyDictionary(), 0, 0

    def count(self, *tensors: object) -> None:
        """Count what is not counted yet, until it is released; anything that is no tensor is passed over."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                size = self.seen[storage] = storage.nbytes()
                self.live += size
                weakref.finalize(storage, self._release, size)
        self.peak = max(self.peak, self.live)

    def _release(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count(*tree_leaves(result))
        return result


@contextlib.contextmanager
def fake_copy(module: torch.nn.Module):
    """Give a module on the meta device parameters and buffers without data that count as a CPU's, and let what runs
    inside make such tensors too."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    part._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield


def bfloat16_transformer(config: dict) -> AceStepTransformer1DModel:
    """On the meta device."""
    with torch.device("meta"), quiet_loading():
        return AceStepTransformer1DModel(**config).to(torch.bfloat16)


def account_update(config: dict, lora: LoraSettings, batch: Batch, *, checkpointing: float, updates: int = 1) -> int:
    """Bytes at the peak of bf16 updates with AdamW, with everything that is there, of a transformer of `config`."""
    transformer = bfloat16_transformer(config)
    use_masked_attention(transformer)
    add_lora(transformer, lora, seed=0)
    width = transformer.config.encoder_hidden_size or transformer.config.hidden_size
    items, frames = batch.items, batch.frames
    with fake_copy(transformer):
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        if checkpointing:
            enable_gradient_checkpointing(transformer, checkpointing)
        condition_mask = ConditionMask(transformer.train())
        optimizer = build_optimizer(parameters, optimizer="adamw", learning_rate=1e-4, adam_beta1=0.9,
                                    adam_beta2=0.999, adam_weight_decay=0.01, adam_epsilon=1e-8)  # fmt: skip
        for parameter in parameters:  # as after the first update
            state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = state | {"step": torch.tensor(0.0)}
        silence, null = torch.zeros(1, 15000, 64), torch.zeros(1, 1, width, dtype=torch.bfloat16)
        live = LiveBytes()
        live.count(*transformer.parameters(), *tree_leaves(dict(optimizer.state)))
        with live:
            for _ in range(updates):
                inputs = {
                    "latents": torch.randn(items, frames, 64),
                    "noise": torch.randn(items, frames, 64),
                    "sigmas": torch.full((items,), 0.5),
                    "encoder_hidden_states": torch.randn(items, batch.condition_tokens, width, dtype=torch.bfloat16),
                    "dropped": torch.zeros(items, dtype=torch.bool),
                }
                with torch.autocast("cpu", torch.bfloat16):
                    loss = squared_error(transformer, inputs, condition_mask, silence, null)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return live.peak


def predict_on_cpu(config: dict, lora: LoraSettings, batch: Batch, *, checkpointing: float) -> tuple[int, Adapter]:
    """What the formulas say of the same, with a CPU's kernels; and the adapter."""
    adapted = bfloat16_transformer(config)
    add_lora(adapted, lora, seed=0)
    adapter = inspect_adapter(adapted, dropout=lora.lora_dropout)
    parts = predict_update(
        bfloat16_transformer(config), adapter, batch, Precision(weight=2, mask=4, shared_keys=True),
        base_quantization="none", gradient_checkpointing=checkpointing, optimizer="adamw",
    )  # fmt: skip
    return sum(parts.values()), adapter


def account_tiles(seconds: float, *, encode: bool, dtype: torch.dtype = torch.float32) -> int:
    """Bytes at the peak of encoding, or decoding, so much audio with the full-size VAE, beside its parameters and the
    audio itself."""
    vae = SHAPES["2b"].build("vae").to(dtype)
    tile_audio_coding(vae)
    with fake_copy(vae), torch.no_grad():
        for part in vae.modules():  # what the weight norm left behind on the meta device
            if hasattr(part, "weight_g"):
                del part.weight
        shape = (1, 2, round(seconds * vae.config.sampling_rate)) if encode else (1, 64, round(seconds * 25))
        given = torch.empty(shape, dtype=dtype)
        live = LiveBytes()
        live.count(*vae.parameters(), given)
        before = live.live
        with live:
            _ = vae.encode(given).latent_dist.mean if encode else vae.decode(given).sample
    return live.peak - before


def estimate_target(target: Target, song_s: float) -> Estimate:
    """`acestep-lora estimate` of eight songs of one length with 1200 letters of lyrics, on a GPU of that memory."""
    args = parse_args([*target.flags, "--train_data_dir", "songs"])
    song = Track("song", Path("song"), "t" * 80, "l" * 1200, "en", "", 120, "C major", "4", song_s, 48000, 2, "")
    size = target.limit_gb * 1e9 / GIB / USABLE_MEMORY
    gpu = Gpu(f"{target.limit_gb:g} GB", size, bf16_tflops=100, fp32_tflops=30, bandwidth_gb_s=500, host_gb_s=20,
              source="")  # fmt: skip
    return estimate(SHAPES[target.model], args, [song] * 8, [], gpu)


def measure_target(target: Target) -> dict:
    """One row: predictions for songs of one and ten minutes against the limit, and formulas against the accounting."""
    args = parse_args([*target.flags, "--train_data_dir", "songs"])
    checkpointing = args.gradient_checkpointing_ratio if args.gradient_checkpointing else 0.0
    lora = LoraSettings(r=args.rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout)
    songs = {}
    for song_s in (60, 600):
        found = estimate_target(target, song_s)
        songs[f"{song_s} s"] = {
            "windows_in_a_pass": found.batch.items, "window_s": found.batch.frames / FRAMES_PER_SECOND,
            "update_gb": sum(found.update.values()) / 1e9, "encoding_gb": found.encoding / 1e9,
            "samples_gb": found.samples / 1e9, "peak_gb": found.peak / 1e9,
            "fits": found.peak <= target.limit_gb * 1e9,
        }  # fmt: skip
    batch = estimate_target(target, 60).batch
    config = SHAPES[target.model].transformer
    predicted, adapter = predict_on_cpu(config, lora, batch, checkpointing=checkpointing)
    accounted = account_update(config, lora, batch, checkpointing=checkpointing)
    return {
        "model": target.model, "flags": " ".join(target.flags), "limit_gb": target.limit_gb, "songs": songs,
        "adapter_parameters": adapter.num_parameters,
        "unquantised_adamw": {"predicted_gb": predicted / 1e9, "accounted_gb": accounted / 1e9,
                              "ratio": predicted / accounted},
    }  # fmt: skip


def measure_tiles() -> list[dict]:
    """The VAE's tiles: what the estimate takes for them, and what they come to, whatever the song's length."""
    rows = []
    for encode, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.bfloat16)):
        predict = encoding_tile_bytes if encode else decoding_tile_bytes
        accounted = {f"{s} s": account_tiles(s, encode=encode, dtype=dtype) / 1e9 for s in (60, 600)}
        row = {"what": "encode" if encode else "decode", "dtype": str(dtype).removeprefix("torch.")}
        predicted = predict(SHAPES["2b"], dtype.itemsize) / 1e9
        rows.append(row | {"predicted_gb": predicted, "accounted_gb": accounted})
    return rows


def train_song(minutes: float, folder: Path, *, window_s: int) -> dict:
    """Train the embedded checkpoint on one song of noise bursts, in a process of its own; its peak memory in MB."""
    import numpy as np
    import soundfile

    music = folder / f"music-{minutes:g}"
    music.mkdir()
    generator = np.random.default_rng(0)
    with soundfile.SoundFile(music / "song.flac", "w", 48000, 2) as file:
        for _ in range(round(minutes * 60)):
            file.write(generator.normal(0, 0.1, (48000, 2)))
    flags = ["--preset", "c", "--pretrained_model_name_or_path", "tiny", "--train_data_dir", str(music),
             "--output_dir", str(folder / f"output-{minutes:g}"), "--max_train_steps", "4", "--max_duration_s",
             str(window_s), "--effective_batch_size", "1", "--num_validation_samples", "0",
             "--latent_cache_dir", str(folder / "cache")]  # fmt: skip
    code = (
        "import sys, train_ace_step_lora as t; t.train(t.arguments.parse_args(sys.argv[1:])); "
        "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"error: training failed: {done.stderr[-2000:]}")
    peak_kb = int(done.stdout.rpartition("peak ")[2])
    return {"song_min": minutes, "window_s": window_s, "peak_mb": peak_kb * 1024 / 1e6}


def describe(result: dict) -> str:
    """The tables for a person, as in docs/training.md."""
    lines = ["| model | flags | limit | song of 60 s: update, peak | of 600 s: update, peak | fits |"]
    for row in result["targets"]:
        cells = [f"{song['update_gb']:.1f}, {song['peak_gb']:.1f} GB" for song in row["songs"].values()]
        fits = "yes" if all(song["fits"] for song in row["songs"].values()) else "NO"
        lines += [f"| {row['model']} | {row['flags']} | {row['limit_gb']} GB | {' | '.join(cells)} | {fits} |"]
    for row in result["targets"]:
        ours = row["unquantised_adamw"]
        sizes = f"{ours['predicted_gb']:.3f}, accounted {ours['accounted_gb']:.3f} GB = {ours['ratio']:.3f}"
        lines += [f"{row['model']} {row['flags']}: predicted {sizes} (unquantised, AdamW, a CPU's kernels)"]
    for row in result["tiles"]:
        accounted = ", ".join(f"{size:.3f} GB of {length}" for length, size in row["accounted_gb"].items())
        lines += [f"{row['what']} {row['dtype']}: predicted {row['predicted_gb']:.3f} GB, accounted {accounted}"]
    for row in result["songs"]:
        lines += [f"training a song of {row['song_min']:g} min (tiny, CPU): {row['peak_mb']:.0f} MB at the peak"]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--minutes", type=float, nargs="+", default=[1, 3, 10], help="lengths of the songs that are trained"
    )
    p.add_argument("--window_s", type=int, default=30, help="length of a training window of these")
    p.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    args = p.parse_args()
    result = {
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "targets": [measure_target(target) for target in TARGETS],
        "tiles": measure_tiles(),
    }
    with tempfile.TemporaryDirectory() as folder:
        result["songs"] = [train_song(minutes, Path(folder), window_s=args.window_s) for minutes in args.minutes]
    result["benchmark_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(describe(result))


if __name__ == "__main__":
    main()
