"""Hearing the adapter while it trains, in a pipeline of its own: the training is the same, to the bit, without."""

import contextlib
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from ..adapters.trainable import save_lora
from ..data.audio import write_audio
from ..generation import SamplingSettings, generate
from ..paths import LORA_WEIGHTS_NAME
from ..progress import quiet_loading
from ..prompt_fields import PromptFields
from .run_directory import PARTIAL_PREFIX, PREVIEW_PREFIX, SAMPLES_DIR, naming_failed_writes
from .validation import load_pipeline


@contextlib.contextmanager
def randomness_kept(device: torch.device) -> Iterator[None]:
    """Leave every global random generator, of Python, numpy, the CPU and `device`, as it was."""
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


class Previewer:
    """Generates the prompts with the adapter as it is, every `steps` updates, into `samples/preview-<update>/`.

    Never the model that trains: that one has dropout, float32 adapters in a base of another precision and perhaps
    wrappers of several processes, all of which generating would have to change and put back. The adapter goes through
    a file into a pipeline that is loaded for it and let go of again, which costs memory meanwhile.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        steps: int | None,
        checkpoint: dict,
        device: torch.device,
        weight_dtype: torch.dtype,
        one_by_one: bool,
        prompts: Sequence[PromptFields],
        num_inference_steps: int | None,
        seed: int,
    ) -> None:
        """Take the run's directory, the updates between previews (None: there are none), and how to generate, as
        `write_final_report` does."""
        self.directory = Path(output_dir) / SAMPLES_DIR
        self.output_dir = Path(output_dir)
        self.steps = steps
        self.checkpoint = checkpoint
        self.device, self.weight_dtype, self.one_by_one = device, weight_dtype, one_by_one
        self.prompts = prompts
        self.num_inference_steps = num_inference_steps
        self.seed = seed

    def is_due(self, update: int) -> bool:
        """Whether to listen now that so many updates are done."""
        return self.steps is not None and update % self.steps == 0

    def write(self, transformer: torch.nn.Module, *, update: int) -> None:
        """Generate with the adapter that `transformer` has now; on the main process alone.

        Raises:
            RunError: the disk is full.
        """
        finished = self.directory / f"{PREVIEW_PREFIX}{update}"
        partial = finished.with_name(f"{PARTIAL_PREFIX}{finished.name}")
        shutil.rmtree(partial, ignore_errors=True)
        with randomness_kept(self.device), naming_failed_writes(self.output_dir, SAMPLES_DIR):
            partial.mkdir(parents=True)
            if update:  # before the first one an adapter changes nothing
                save_lora(transformer, partial)
            with quiet_loading():
                pipeline = load_pipeline(
                    self.checkpoint,
                    partial if update else None,
                    device=self.device,
                    weight_dtype=self.weight_dtype,
                    one_by_one=self.one_by_one,
                )
            pipeline.set_progress_bar_config(disable=True)
            (partial / LORA_WEIGHTS_NAME).unlink(missing_ok=True)
            for index, fields in enumerate(self.prompts):
                sampling = SamplingSettings(num_inference_steps=self.num_inference_steps, seed=self.seed + index)
                waveform = generate(pipeline, fields, sampling)
                write_audio(partial / f"sample-{index}.wav", waveform, sample_rate=pipeline.sample_rate)
            shutil.rmtree(finished, ignore_errors=True)
            os.replace(partial, finished)
            del pipeline
            clear_device_cache(garbage_collection=True)
