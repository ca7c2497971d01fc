"""From a prompt, and perhaps audio, to waveforms: one request with one seed or several."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .data.audio import SAMPLE_RATE, AudioError, probe_audio, read_audio, to_stereo, write_audio
from .errors import UsageError
from .pipeline import ACEStepPipeline
from .prompt_fields import MAX_DURATION_S, PromptFields

# Tasks of the base model (`diffusers.pipelines.ace_step`): what each of them needs besides a prompt.
TASKS = {
    "text2music": "nothing but the prompt",
    "cover": "the song of --src_audio in the style of the prompt",
    "repaint": "a part of --src_audio anew",
    "extract": "one track (--track_name) out of the mix of --src_audio",
    "lego": "one more track (--track_name) for --src_audio",
    "complete": "the tracks that --src_audio lacks (--track_classes)",
}
# The turbo models were distilled for these.
TURBO_TASKS = ("text2music", "cover", "repaint")


@dataclass(frozen=True)
class SamplingSettings:
    """How the flow is integrated. None takes the variant's default; raises `UsageError` for an impossible value."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    seed: int = 0

    def __post_init__(self):
        for name, lowest in (("num_inference_steps", 1), ("guidance_scale", 0)):
            value = getattr(self, name)
            if value is not None and not lowest <= value < math.inf:
                raise UsageError(f"--{name} must be at least {lowest}, not {value}.")
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise UsageError(f"--shift must be positive, not {self.shift}.")

    def resolved(self, *, is_turbo: bool) -> "SamplingSettings":
        """Defaults filled in: turbo 8 steps, no guidance, shift 3; base and sft 50 steps, guidance 7, shift 1.

        Source: the official inference guide (steps, shift) and `AceStepPipeline.__call__` (guidance).
        """
        steps, guidance, shift = (8, 1.0, 3.0) if is_turbo else (50, 7.0, 1.0)
        return SamplingSettings(
            num_inference_steps=steps if self.num_inference_steps is None else self.num_inference_steps,
            guidance_scale=guidance if self.guidance_scale is None else self.guidance_scale,
            shift=shift if self.shift is None else self.shift,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Task:
    """What is made, and of which audio.

    `src_audio` and `reference_audio` (whose timbre is taken) are files of any rate and channel count; times are in
    seconds, `repainting_end` None is the end; `audio_cover_strength` is in [0, 1].

    Raises:
        UsageError: unknown task, something that it needs is missing, or something that it has no use for is there.
    """

    task_type: str = "text2music"
    src_audio: Path | None = None
    reference_audio: Path | None = None
    repainting_start: float | None = None
    repainting_end: float | None = None
    track_name: str | None = None
    complete_track_classes: tuple[str, ...] = ()
    audio_cover_strength: float = 1.0

    def __post_init__(self):
        task = self.task_type
        if task not in TASKS:
            raise UsageError(f"--task must be one of {', '.join(TASKS)}, not {task!r}.")
        if (self.src_audio is None) != (task == "text2music"):
            raise UsageError(
                f"--task {task} needs --src_audio FILE."
                if self.src_audio is None
                else "--src_audio is for the other tasks than text2music: add --task, e.g. --task cover."
            )
        for flag, given, tasks in (
            (
                "repaint_start/--repaint_end",
                (self.repainting_start, self.repainting_end) != (None, None),
                ("repaint", "lego"),
            ),
            ("track_name", self.track_name is not None, ("extract", "lego")),
            ("track_classes", bool(self.complete_track_classes), ("complete",)),
            ("cover_strength", self.audio_cover_strength != 1.0, ("cover",)),
        ):
            if given and task not in tasks:
                raise UsageError(f"--{flag} is for --task {' and '.join(tasks)}, not for {task}.")
        if not 0 <= self.audio_cover_strength <= 1:
            raise UsageError(f"--cover_strength must be in [0, 1], not {self.audio_cover_strength}.")
        start, end = self.repainting_start or 0.0, math.inf if self.repainting_end is None else self.repainting_end
        if not 0 <= start < end:
            raise UsageError(f"--repaint_start {start:g} must not be negative, and lie before --repaint_end {end:g}.")

    def source_duration_s(self) -> float | None:
        """How long the source is, None without one; reads headers only.

        Raises:
            UsageError: an audio file can't be used, or the part to repaint lies behind its end.
        """
        for flag, path in (("reference_audio", self.reference_audio), ("src_audio", self.src_audio)):
            if path is None:
                continue
            try:
                duration_s = probe_audio(path).duration_s
            except (AudioError, OSError) as error:
                raise UsageError(f"--{flag} {path} can't be read: {error}.") from error
            if flag == "src_audio" and not 1 <= duration_s <= MAX_DURATION_S:
                raise UsageError(f"--src_audio {path} is {duration_s:.1f} s long; the model takes 1 to 600 s.")
        if self.src_audio is None:
            return None
        if (self.repainting_start or 0.0) >= duration_s:
            raise UsageError(f"--repaint_start {self.repainting_start:g} lies behind the source's {duration_s:.1f} s.")
        return duration_s

    def arguments(self, pipeline: ACEStepPipeline) -> dict:
        """Arguments, by name, of `AceStepPipeline.__call__`, with the audio read.

        Raises:
            UsageError: a file can't be decoded.
        """
        given = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        if self.complete_track_classes:
            given["complete_track_classes"] = list(self.complete_track_classes)
        for flag in ("src_audio", "reference_audio"):
            if flag in given:
                given[flag] = _read_stereo(given[flag], flag, multiple=pipeline.vae.hop_length)
        return given


def _read_stereo(path: Path, flag: str, *, multiple: int) -> torch.Tensor:
    """Stereo at 48 kHz `[2, samples]`, with silence after it up to a multiple of so many samples."""
    try:
        waveform = to_stereo(read_audio(path, sample_rate=SAMPLE_RATE))
    except (AudioError, OSError) as error:
        raise UsageError(f"--{flag} {path} can't be read: {error}.") from error
    return torch.nn.functional.pad(torch.from_numpy(waveform), (0, -waveform.shape[1] % multiple))


def generate(pipeline: ACEStepPipeline, fields: PromptFields, sampling: SamplingSettings) -> np.ndarray:
    """Generate one clip from text.

    Returns:
        float32 `[channels, samples]` at the VAE's rate (48 kHz), peak -1 dBFS. The noise comes from a CPU generator,
        so a seed names the same noise on every device.
    """
    return generate_variations(pipeline, fields, sampling, seeds=[sampling.seed])[0]


def generate_variations(
    pipeline: ACEStepPipeline,
    fields: PromptFields,
    sampling: SamplingSettings,
    *,
    seeds: Sequence[int],
    task: Task = Task(),  # noqa: B008 (frozen)
    on_step: Callable[[], object] | None = None,
) -> list[np.ndarray]:
    """Generate one clip for each seed, in one batch; each is what its seed gives alone (up to rounding).

    Args:
        fields: with source audio its length counts, not that of the fields.
        seeds: of the noise; `sampling`'s own is not used.
        on_step: called after each denoising step.

    Returns:
        Of each seed float32 `[channels, samples]` as in `generate`, as long as the source, if there is one.
    """
    sampling = sampling.resolved(is_turbo=pipeline.is_turbo)
    duration_s = task.source_duration_s()
    if duration_s is not None:
        fields = replace(fields, audio_duration=duration_s)

    def after_step(*_) -> None:
        if on_step is not None:
            on_step()

    texts = {name: [getattr(fields, name)] * len(seeds) for name in ("prompt", "lyrics", "vocal_language")}
    audio = pipeline(
        **{**asdict(fields), **texts},
        **task.arguments(pipeline),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        shift=sampling.shift,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        callback_on_step_end=after_step,
    ).audios
    if duration_s is not None:
        audio = audio[..., : round(duration_s * pipeline.sample_rate)]
    return list(audio.float().cpu().numpy())


def write_comparison(
    pipeline: ACEStepPipeline, fields: PromptFields, sampling: SamplingSettings, directory: Path, name: str
) -> tuple[Path, Path]:
    """Write `<name>_with_adapter.wav` and `<name>_without_adapter.wav`: same prompt, same seed, same noise.

    The pipeline has its adapter loaded and active, and has it so again afterwards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with_adapter = directory / f"{name}_with_adapter.wav"
    without_adapter = directory / f"{name}_without_adapter.wav"
    rate = pipeline.sample_rate
    write_audio(with_adapter, generate(pipeline, fields, sampling), sample_rate=rate)
    pipeline.disable_lora()
    try:
        write_audio(without_adapter, generate(pipeline, fields, sampling), sample_rate=rate)
    finally:
        pipeline.enable_lora()
    return with_adapter, without_adapter
