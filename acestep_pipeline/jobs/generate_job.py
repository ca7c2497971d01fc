"""Generation jobs: a base model that stays in memory, and a library of adapters that are switched for each job."""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from ..adapters.library import AdapterLibrary
from ..commands.generate import write_clip
from ..errors import RunError
from ..generation import SamplingSettings, generate_variations
from ..hardware import bf16_is_fast, default_device
from ..paths import default_model
from ..pipeline import ACEStepPipeline
from ..prompt_fields import INSTRUMENTAL, PromptFields, known_bpm, known_keyscale, known_language
from ..version import __version__
from .schema import GenerationJob

PROGRESS_INTERVAL_S = 1.0


class Stopped(RunError):
    """The job was cancelled."""


class Generator:
    """The worker's base model, loaded once, and its adapters. One job at a time; the others wait."""

    def __init__(self, *, adapters: str, model: str | None = None, max_resident: int = 8) -> None:
        """Load the base model.

        Args:
            adapters: where the adapters are; looked at when a job names the first (see `AdapterLibrary`).
            model: the checkpoint; None: `ACESTEP_MODEL`, else /model, else the published one.
            max_resident: how many adapters are kept in memory.

        Raises:
            UsageError: the model can't be loaded.
        """
        import torch

        started = time.monotonic()
        device = default_device()
        self.model = default_model(model)[0]
        dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
        self.pipeline = ACEStepPipeline.from_pretrained(self.model, torch_dtype=dtype).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self._adapters, self._max_resident = adapters, max_resident
        self._library: AdapterLibrary | None = None
        self._lock = threading.Lock()
        self.load_s = round(time.monotonic() - started, 3)

    def generate(
        self, job: GenerationJob, directory: Path, *, emit: Callable[[dict], None], stop: threading.Event
    ) -> dict:
        """Write the job's clips, each with its record beside it, into `directory`.

        Args:
            emit: gets `{"event": "progress", "step", "of", "eta_s"}`.
            stop: when it is set, the job ends after the step that it is in.

        Raises:
            UsageError: a field's value is none that the model knows, or there is no such adapter.
            Stopped: the job was cancelled.
        """
        fields = PromptFields(
            prompt=job.prompt,
            lyrics=(job.lyrics or "").strip() or INSTRUMENTAL,
            vocal_language=known_language(job.vocal_language),
            bpm=None if job.bpm is None else known_bpm(job.bpm),
            keyscale=None if job.keyscale is None else known_keyscale(job.keyscale),
            timesignature=job.timesignature,
            audio_duration=job.duration_s,
        )
        sampling = SamplingSettings(job.num_inference_steps, job.guidance_scale, job.shift, job.seed).resolved(
            is_turbo=self.pipeline.is_turbo
        )
        steps = _Steps(job.variations * sampling.num_inference_steps, emit, stop)
        record = {
            "generator": f"ACE-Step LoRA {__version__}",
            "base": self.model,
            "adapters": [{"adapter": name, "weight": weight} for name, weight in job.adapters.items()],
            **{name: value for name, value in job.model_dump().items()
               if name not in ("task", "name", "upload", "links_valid_s", "adapters", "variations")},
        }  # fmt: skip
        directory.mkdir(parents=True, exist_ok=True)
        with self._lock, self._acting(job.adapters):
            started = time.monotonic()
            for seed in range(job.seed, job.seed + job.variations):
                (waveform,) = generate_variations(self.pipeline, fields, sampling, seeds=[seed], on_step=steps.count)
                write_clip(
                    directory / f"{seed}.{job.format}",
                    waveform,
                    record | {"seed": seed},
                    sample_rate=self.pipeline.sample_rate,
                    target_lufs=job.loudness_lufs,
                )
        return {"clips": job.variations, "seconds": round(time.monotonic() - started, 3)}

    def _acting(self, adapters: dict[str, float]):
        """While it lasts these adapters act; without any, the base model alone, as at any other time."""
        if not adapters:
            return nullcontext()
        if self._library is None:
            self._library = AdapterLibrary(self._adapters, pipeline=self.pipeline, max_resident=self._max_resident)
        return self._library.use(adapters)


class _Steps:
    """Counts denoising steps, tells of them, and ends a job that was cancelled."""

    def __init__(self, total: int, emit: Callable[[dict], None], stop: threading.Event) -> None:
        self._total, self._emit, self._stop = total, emit, stop
        self._done, self._started = 0, time.monotonic()
        self._told_at = self._started

    def count(self) -> None:
        if self._stop.is_set():
            raise Stopped("the job was cancelled.")
        self._done += 1
        now = time.monotonic()
        if now - self._told_at >= PROGRESS_INTERVAL_S or self._done == self._total:
            self._told_at = now
            eta_s = (now - self._started) / self._done * (self._total - self._done)
            self._emit({"event": "progress", "step": self._done, "of": self._total, "eta_s": round(eta_s, 1)})
