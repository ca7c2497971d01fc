"""What the training script costs beside a bare loop, on the same model, data and batches in the same process.

    python benchmarks/train_step.py --output benchmarks/results/train_step.json

Three loops alternate: the whole script (as `accelerate launch` runs it), a bare loop of forward, backward and AdamW on
batches that lie in memory, and that loop fed the ~770 condition tokens that other trainers pad to. Medians of the time
an update takes are compared, without the first updates of each. Then the script is started anew on a warm cache, and
the time until its first update is done is taken.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PADDED_TOKENS = 770
WARM_UP = 3
# Figure, its limit, whether it is a least or a most, and what it says.
TARGETS = {
    "script_vs_bare": (1.03, "most", "time of an update, the whole script against a bare loop"),
    "padded_vs_trimmed": (1.3, "least", f"time of an update, {PADDED_TOKENS} condition tokens against the real ones"),
    "data_idle": (0.01, "most", "share of the script's time spent waiting for data"),
    "first_update_s": (10.0, "most", "start of the process to the end of the first update, warm cache"),
}


def script_flags(music: Path, output: Path, updates: int, seconds: int) -> list[str]:
    """The script on clips of one length, four in an update."""
    return [
        "--preset", "c", "--pretrained_model_name_or_path", "tiny", "--train_data_dir", str(music),
        "--output_dir", str(output), "--overwrite_output_dir", "--max_train_steps", str(updates),
        "--max_duration_s", str(seconds), "--mixed_precision", "no", "--num_validation_samples", "0", "--cfg_dropout",
        "0", "--dataloader_num_workers", "1",
    ]  # fmt: skip


class Watch:
    """Keeps what the script trained with, and how long it waited for its data."""

    def __init__(self):
        import train_ace_step_lora
        from acestep_pipeline.data import batching
        from acestep_pipeline.training import setup

        self.script, self.waited_s, self.micro_batches = train_ace_step_lora, 0.0, []
        prepare, stream = setup.prepare_inputs, batching.BatchLoader.stream

        def watched_prepare(*args, **kwargs):
            self.inputs = prepare(*args, **kwargs)
            return self.inputs

        def watched_stream(loader, micro_batches, *, num_workers):
            self.loader = loader
            batches, batch = stream(loader, self._remember(micro_batches), num_workers=num_workers), None
            while True:
                del batch  # which takes longer than the next one's coming, and is no waiting
                start = time.perf_counter()
                batch = next(batches, None)
                if self.count >= WARM_UP:
                    self.waited_s += time.perf_counter() - start
                self.count += 1
                if batch is None:
                    return
                yield batch

        setup.prepare_inputs, batching.BatchLoader.stream = watched_prepare, watched_stream

    def _remember(self, micro_batches):
        for micro in micro_batches:
            self.micro_batches.append(micro)
            yield micro

    def run(self, flags: list[str]) -> list[float]:
        """Seconds of each update of the script, the first ones left out."""
        from accelerate.state import AcceleratorState

        self.count, self.micro_batches = 0, []
        AcceleratorState._reset_state(reset_partial_state=True)
        args = self.script.arguments.parse_args(flags)
        self.script.train(args)
        lines = [json.loads(line) for line in (Path(args.output_dir) / "metrics.jsonl").read_text().splitlines()]
        ends = [line["seconds"] for line in lines]
        return [after - before for before, after in zip(ends, ends[1:], strict=False)][WARM_UP:]

    def bare(self, *, pad_to: int | None) -> list[float]:
        """Seconds of each update of a bare loop over the same batches: forward, backward, clip, AdamW."""
        import torch

        inputs = self.inputs
        optimizer = torch.optim.AdamW(inputs.lora_parameters, lr=5e-5)
        updates: dict[int, list] = {}
        for micro in self.micro_batches:
            batch = self.loader.load(micro)
            if pad_to:
                batch.pop("condition_mask", None)
                tokens = batch["encoder_hidden_states"]
                batch["encoder_hidden_states"] = torch.nn.functional.pad(tokens, (0, 0, 0, pad_to - tokens.shape[1]))
            updates.setdefault(micro.update, []).append(batch)
        taken = []
        for batches in updates.values():
            start = time.perf_counter()
            for batch in batches:
                error = self.script.squared_error(
                    inputs.transformer, batch, inputs.condition_mask, inputs.silence_latent, inputs.null_condition_emb
                )
                (error / batch["latents"].numel()).backward()
            torch.nn.utils.clip_grad_norm_(inputs.lora_parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            taken.append(time.perf_counter() - start)
        return taken[WARM_UP:]


def first_update_s(flags: list[str]) -> float:
    """Seconds from the start of `accelerate launch` to the end of the first update."""
    metrics = Path(flags[flags.index("--output_dir") + 1]) / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines"]
    command += ["1", "--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "train_ace_step_lora.py"), *flags]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.02)
    taken = time.perf_counter() - start
    if process.wait() != 0:
        raise SystemExit(f"error: the script failed: {' '.join(command)}")
    return taken


def measure(*, updates: int, repeats: int, seconds: int) -> dict:
    """Every figure, and what it was measured on."""
    import torch

    from acestep_pipeline.data.demo_music import render_demo_dataset

    runs: dict[str, list[float]] = {"script": [], "bare": [], "padded": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACESTEP_CACHE_DIR"] = os.path.join(folder, "cache")
        music, output = Path(folder) / "music", Path(folder) / "output"
        render_demo_dataset(music, duration_s=float(seconds))
        watch = Watch()
        flags = script_flags(music, output, updates, seconds)
        watch.run(flags)  # fills the cache
        watch.waited_s = 0.0
        for _ in range(repeats):
            runs["script"] += watch.run(flags)
            runs["bare"] += watch.bare(pad_to=None)
            runs["padded"] += watch.bare(pad_to=PADDED_TOKENS)
        tokens = [window.num_condition_tokens for track in watch.inputs.tracks for window in track.windows]
        started = first_update_s(script_flags(music, output, 1, seconds))
    median = {name: statistics.median(values) for name, values in runs.items()}
    return {
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate", "peft")},
        "model": "tiny",
        "window_s": seconds,
        "condition_tokens": [min(tokens), max(tokens)],
        "updates": len(runs["script"]),
        "median_s": median,
        "quartiles_s": {name: statistics.quantiles(values, n=4) for name, values in runs.items()},
        "script_vs_bare": median["script"] / median["bare"],
        "padded_vs_trimmed": median["padded"] / median["bare"],
        "data_idle": watch.waited_s / sum(runs["script"]),
        "first_update_s": started,
    }


def describe(result: dict) -> str:
    """The table for a person."""
    lines = []
    for name, (limit, kind, text) in TARGETS.items():
        met = result[name] <= limit if kind == "most" else result[name] >= limit
        sign = "<=" if kind == "most" else ">="
        lines.append(f"{name:<20}{result[name]:>9.3f}  {sign} {limit:<6}{'met' if met else 'MISSED':<8}{text}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--updates", type=int, default=30, help="updates of each run")
    parser.add_argument("--repeats", type=int, default=3, help="how often each loop is run")
    parser.add_argument("--seconds", type=int, default=30, help="length of a window")
    args = parser.parse_args()
    result = measure(updates=args.updates, repeats=args.repeats, seconds=args.seconds)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(describe(result))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
