"""Peak memory of whole trainings (caching, updates, samples), each in a process of its own.

On a GPU the process may have no more than the limit that its flags are for, so that it trains as it would on a GPU of
that size: the limit less what CUDA itself takes goes to PyTorch's allocator, whose peak is reported. On a CPU it is
the process' resident memory, with glibc told to give back every buffer of a MiB at once: otherwise what it keeps for
later, up to a GB, says more about its heap than about the training.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.errors import RunError
from acestep_pipeline.estimation.model_shapes import ModelShape
from acestep_pipeline.hardware import default_device
from acestep_pipeline.progress import quiet_loading
from acestep_pipeline.tiny_checkpoint import tiny_checkpoint_path
from benchmarks.random_models import random_module
from benchmarks.training_measure import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
COMPONENTS = ("transformer", "condition_encoder", "text_encoder", "vae")
MARK = "peaks: "


@dataclass(frozen=True)
class Training:
    """A training of a model (`tiny`, or a published shape with random weights) on so many songs of one length, with
    flags, on a GPU of so many GB (10^9 bytes; None: of any size)."""

    model: str
    songs: int
    song_s: int
    flags: str
    limit_gb: float | None = None


def write_checkpoint(shape: ModelShape, folder: Path) -> Path:
    """A checkpoint in diffusers' layout with random weights, in bfloat16, with the embedded checkpoint's tokenizer.

    It is made in main memory, so that this process takes nothing of the GPU that another is measured on.
    """
    torch.manual_seed(0)
    with quiet_loading():
        components = ACEStepPipeline.from_pretrained(tiny_checkpoint_path()).components
        for name in COMPONENTS:
            components[name] = random_module(shape.build(name), device=torch.device("cpu"), dtype=torch.bfloat16)
        # Codes of audio are for covers alone.
        components |= {"audio_tokenizer": None, "audio_token_detokenizer": None}
        ACEStepPipeline(**components).save_pretrained(folder)
    return folder


def write_songs(folder: Path, *, songs: int, seconds: int) -> None:
    """Files of noise, with tags and lyrics that come to some 400 condition tokens."""
    folder.mkdir()
    for number in range(songs):
        generator = np.random.default_rng(number)
        with soundfile.SoundFile(folder / f"song{number}.flac", "w", 48_000, 2) as file:
            for _ in range(seconds):
                file.write(generator.normal(0, 0.1, (48_000, 2)))
        (folder / f"song{number}.tags.txt").write_text("noise music, slow, wide, dark")
        (folder / f"song{number}.lyrics.txt").write_text("[verse]\n" + "a line about the rain and the road\n" * 8)


def measure_training(training: Training, checkpoint: str) -> dict:
    """Peaks in bytes; or `out_of_memory`.

    Raises:
        RunError: the training failed otherwise.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_songs(folder / "music", songs=training.songs, seconds=training.song_s)
        flags = [*training.flags.split(), "--pretrained_model_name_or_path", checkpoint, "--train_data_dir",
                 str(folder / "music"), "--output_dir", str(folder / "output"), "--latent_cache_dir",
                 str(folder / "cache"), "--max_train_steps", "4"]  # fmt: skip
        command = [sys.executable, __file__, str(training.limit_gb or 0), *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode and "out of memory" in done.stderr.lower():
        return {"out_of_memory": True}
    if done.returncode:
        raise RunError(f"training with {training.flags} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.rpartition(MARK)[2])


def train_within(limit_bytes: float, flags: list[str]) -> dict[str, int]:
    """Train in this process, with no more than so many bytes of a GPU (0: all of it); the peaks."""
    from train_ace_step_lora import arguments, train

    on_gpu = default_device().type == "cuda"
    if on_gpu and limit_bytes:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit_bytes - outside_allocator()) / total))
    train(arguments.parse_args(flags))
    if not on_gpu:
        return {"resident_bytes": peak_bytes(torch.device("cpu"))}
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "outside_bytes": outside_allocator(),
    }


def outside_allocator() -> int:
    """What of the GPU's memory is taken and not PyTorch's: CUDA's context, and other processes, if there are any."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


if __name__ == "__main__":
    print(MARK + json.dumps(train_within(1e9 * float(sys.argv[1]), sys.argv[2:])))
