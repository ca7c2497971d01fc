"""What --stratified_timesteps and --antithetic_noise take off the variance of an update's loss and of its gradient.

    python benchmarks/timestep_variance.py --train_data_dir my_music --output benchmarks/results/timestep_variance.json

Updates are drawn as training draws them, each by a seed of its own, so that they are independent: tracks, windows,
posterior samples, dropped conditions, noise and timesteps all vary. Every method draws the same updates. Of the
adapter's gradient the variance is the trace of its covariance: the mean squared distance of an update's gradient from
the gradient that all updates have on average. The interval of a ratio is a bootstrap over updates; that a method draws
nothing wrong on average is tested by swapping its updates with the plain ones at random (`bias_p`: small is biased).

The tiny checkpoint's random weights predict nothing, at no timestep; so all of its DiT is trained first, for as long
as --warm_up_updates says, and the variances are those of the adapter in the model that has come out.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.data.batching import BatchLoader, EpochPlanner
from acestep_pipeline.data.draws import DrawSettings
from acestep_pipeline.data.text.variants import TextOptions
from acestep_pipeline.errors import UsageError, one_sentence_errors
from acestep_pipeline.paths import cache_dir
from acestep_pipeline.training.setup import TrainingInputs, prepare_inputs
from train_ace_step_lora import squared_error

METHODS = {
    "plain": {},
    "stratified": {"stratified_timesteps": True},
    "antithetic": {"antithetic_noise": True},
    "both": {"stratified_timesteps": True, "antithetic_noise": True},
}
RESAMPLES = 2000
# Seeds of the measured updates; those of the warm-up lie below.
FIRST_SEED = 1_000_000


def load_inputs(music: Path, *, seconds: int, max_tracks: int, rank: int) -> TrainingInputs:
    """The tiny model with an adapter, and tracks that are all heard in windows of `seconds`."""
    return prepare_inputs(
        Accelerator(cpu=True, mixed_precision="no"),
        checkpoint={"pretrained_model_name_or_path": "tiny"},
        train_data_dir=str(music),
        dataset_name=None,
        validation_data_dir=None,
        validation_fraction=0.0,
        max_validation_samples=1,
        validation_seed=0,
        max_train_samples=max_tracks,
        min_duration_s=seconds,
        max_duration_s=seconds,
        streaming=False,
        strict=False,
        latent_cache_dir=cache_dir() / "latents",
        text=TextOptions(),
        lora=LoraSettings(r=rank, lora_alpha=2.0 * rank),
        base_quantization="none",
        gradient_checkpointing=0.0,
        offload=False,
        torch_compile=False,
        seed=0,
    )


def drawn_updates(inputs: TrainingInputs, size: int, seeds: range, options: dict) -> Iterator[dict[str, torch.Tensor]]:
    """An update of `size` windows for each seed, as one forward pass."""
    for seed in seeds:
        planner = EpochPlanner(inputs.tracks, seed=seed, effective_batch_size=size, micro_batch_size=size)
        full = [micro for update in planner.plan(0) for micro in update[0] if len(micro.items) == size]
        if not full:
            raise UsageError(f"an update of {size} windows needs {size} tracks, and there are {len(inputs.tracks)}.")
        settings = DrawSettings(seed=seed, cfg_dropout=0.15, items_per_update=size, **options)
        yield BatchLoader(inputs.tracks, settings).load(full[0])


def mean_squared_error(inputs: TrainingInputs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of an update."""
    error = squared_error(
        inputs.transformer, batch, inputs.condition_mask, inputs.silence_latent, inputs.null_condition_emb
    )
    return error / batch["latents"].numel()


def warm_up(inputs: TrainingInputs, *, updates: int, size: int) -> list[float]:
    """Train every weight of the DiT, the adapter's too; returns the losses. The base is frozen again afterwards."""
    everything = list(inputs.transformer.parameters())
    frozen = [parameter for parameter in everything if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(everything, lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, updates))
    losses = []
    for batch in drawn_updates(inputs, size, range(updates), {}):
        loss = mean_squared_error(inputs, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    for parameter in frozen:
        parameter.requires_grad_(False)
    return losses


def losses_and_gradients(inputs: TrainingInputs, batches: Iterator[dict]) -> tuple[np.ndarray, np.ndarray]:
    """`[updates, 1]` and `[updates, parameters]`, float32."""
    losses, gradients = [], []
    for batch in batches:
        loss = mean_squared_error(inputs, batch)
        found = torch.autograd.grad(loss, inputs.lora_parameters)
        losses.append(loss.detach().numpy()[None])
        gradients.append(torch.cat([part.flatten() for part in found]).numpy())
    return np.stack(losses), np.stack(gradients)


def trace_of_covariance(samples: np.ndarray) -> float:
    """Unbiased trace of the covariance matrix of `samples` `[number, dimensions]`: the sum of the variances."""
    return float(samples.var(axis=0, ddof=1, dtype=np.float64).sum())


def variance_ratio(plain: np.ndarray, other: np.ndarray, *, seed: int = 0) -> tuple[float, list[float]]:
    """`trace_of_covariance(other) / trace_of_covariance(plain)`, and its 95 % interval.

    The interval is that of a bootstrap (percentiles) that draws rows of both together, since they are paired.
    """
    number = len(plain)
    weights = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), RESAMPLES) / number
    weights = weights.astype(np.float32)

    def traces(samples: np.ndarray) -> np.ndarray:
        centred = samples - samples.mean(axis=0)
        return weights @ (centred**2).sum(axis=1) - ((weights @ centred) ** 2).sum(axis=1)

    ratios = traces(other) / traces(plain)
    return trace_of_covariance(other) / trace_of_covariance(plain), np.quantile(ratios, (0.025, 0.975)).tolist()


def bias(plain: np.ndarray, other: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """How far the mean of `other` is from that of `plain`, both `[number, dimensions]` and paired by row.

    Returns:
        The distance's square, freed of what chance adds to it (so that it may be negative), over the squared mean of
        `plain`; and the p-value: how often the distance is at least as large when each pair is swapped or not at
        random, which changes nothing in distribution if the means are the same.
    """
    number = len(plain)
    differences = other - plain
    distance = float((differences.mean(axis=0, dtype=np.float64) ** 2).sum())
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), (RESAMPLES, number)) / number
    swapped = ((signs @ differences) ** 2).sum(axis=1)
    p_value = (1 + int((swapped >= distance).sum())) / (RESAMPLES + 1)
    size = float((plain.mean(axis=0, dtype=np.float64) ** 2).sum()) - trace_of_covariance(plain) / number
    return (distance - trace_of_covariance(differences) / number) / size, p_value


def compare(inputs: TrainingInputs, *, size: int, updates: int) -> dict:
    """Every method against plain draws, on updates of `size` windows."""
    seeds = range(FIRST_SEED, FIRST_SEED + updates)
    drawn = {
        name: losses_and_gradients(inputs, drawn_updates(inputs, size, seeds, options))
        for name, options in METHODS.items()
    }
    result = {}
    for part, what in enumerate(("loss", "gradient")):
        plain = drawn["plain"][part]
        result[what] = {
            "plain": {"variance": trace_of_covariance(plain),
                      "squared_mean": float((plain.mean(axis=0, dtype=np.float64) ** 2).sum())},
        }  # fmt: skip
        for name in list(METHODS)[1:]:
            ratio, interval = variance_ratio(plain, drawn[name][part])
            share, p_value = bias(plain, drawn[name][part])
            result[what][name] = {"variance_ratio": ratio, "interval_95": interval, "bias_squared_share": share,
                                  "bias_p": p_value}  # fmt: skip
    return result


def measure(
    music: Path, *, sizes: list[int], updates: int, warm_up_updates: int, seconds: int, max_tracks: int, rank: int
) -> dict:
    """Every figure, and what it was measured on."""
    inputs = load_inputs(music, seconds=seconds, max_tracks=max_tracks, rank=rank)
    losses = warm_up(inputs, updates=warm_up_updates, size=min(16, len(inputs.tracks)))
    tenth = max(1, len(losses) // 10)
    return {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "numpy")},
        "model": "tiny",
        "tracks": len(inputs.tracks),
        "window_s": seconds,
        "adapter_parameters": sum(parameter.numel() for parameter in inputs.lora_parameters),
        "warm_up": {"updates": len(losses), "first_loss": float(np.mean(losses[:tenth])) if losses else None,
                    "last_loss": float(np.mean(losses[-tenth:])) if losses else None},
        "updates": updates,
        "effective_batch_size": {size: compare(inputs, size=size, updates=updates) for size in sizes},
    }  # fmt: skip


def describe(result: dict) -> str:
    """The table for a person."""
    lines = [f"{'windows':>7}  {'method':11}{'variance of the loss':>24}{'of the gradient':>24}{'bias p':>16}"]
    for size, found in result["effective_batch_size"].items():
        for name in list(METHODS)[1:]:
            loss, gradient = found["loss"][name], found["gradient"][name]
            columns = [
                f"{part['variance_ratio']:.3f} ({part['interval_95'][0]:.3f} to {part['interval_95'][1]:.3f})"
                for part in (loss, gradient)
            ]
            p_values = f"{loss['bias_p']:.3f}, {gradient['bias_p']:.3f}"
            lines.append(f"{size:>7}  {name:11}{columns[0]:>24}{columns[1]:>24}{p_values:>16}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, required=True, help="folder of music, or a dataset")
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16], help="windows in an update")
    parser.add_argument("--updates", type=int, default=2000, help="independent updates of each size and method")
    parser.add_argument("--warm_up_updates", type=int, default=1500, help="updates that train the whole DiT first")
    parser.add_argument("--seconds", type=int, default=10, help="length of a window")
    parser.add_argument("--max_tracks", type=int, default=48, help="use at most so many tracks")
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapter")
    args = parser.parse_args()
    result = measure(
        args.train_data_dir,
        sizes=args.sizes,
        updates=args.updates,
        warm_up_updates=args.warm_up_updates,
        seconds=args.seconds,
        max_tracks=args.max_tracks,
        rank=args.rank,
    )
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(describe(result))


if __name__ == "__main__":
    with one_sentence_errors():
        main()
