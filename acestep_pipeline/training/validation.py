"""Hearing what was learned: the same prompts with and without the adapter, from files, as a user would load them."""

import dataclasses
from pathlib import Path

import torch

from ..data.text.languages import LANGUAGES, UNKNOWN
from ..generation import SamplingSettings, write_comparison
from ..pipeline import ACEStepPipeline
from ..progress import progress_bar
from ..prompt_fields import PromptFields


def load_pipeline(
    checkpoint: dict, adapter: Path | None, *, device: torch.device, weight_dtype: torch.dtype, one_by_one: bool
) -> ACEStepPipeline:
    """A pipeline that is ready to generate.

    Args:
        checkpoint: arguments of `ACEStepPipeline.from_pretrained` that name the base model.
        adapter: the folder of an adapter to load; None for the base model alone.
        device, weight_dtype: where and in what precision to generate.
        one_by_one: whether its models take turns on the device; on a CPU this makes no difference.
    """
    pipeline = ACEStepPipeline.from_pretrained(**checkpoint, torch_dtype=weight_dtype)
    if adapter is not None:
        pipeline.load_lora_weights(adapter, strict=False)  # few updates may not have changed every layer
    if one_by_one and device.type != "cpu":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def choose_prompts(
    trained_on: list[PromptFields], *, prompt: str | None, num_samples: int, duration_s: float
) -> list[PromptFields]:
    """The prompts to listen to: the user's one with several seeds, else those of the first distinct tracks."""
    if prompt is not None:
        return [PromptFields(prompt=prompt, audio_duration=duration_s)] * num_samples
    distinct = list(dict.fromkeys(_to_be_heard(fields, duration_s) for fields in trained_on))
    return [distinct[index % len(distinct)] for index in range(num_samples)]


def _to_be_heard(fields: PromptFields, duration_s: float) -> PromptFields:
    """A track may be in a language that the model doesn't know, which the pipeline would refuse."""
    language = fields.vocal_language if fields.vocal_language in LANGUAGES else UNKNOWN
    return dataclasses.replace(fields, audio_duration=duration_s, vocal_language=language)


def write_samples(
    pipeline: ACEStepPipeline,
    prompts: list[PromptFields],
    *,
    num_inference_steps: int | None,
    seed: int,
    directory: Path,
) -> list[dict[str, str]]:
    """Generate each prompt with and without the loaded adapter into `directory`.

    Returns:
        For each: `prompt`, and the paths `with_adapter` and `without_adapter` relative to `directory`'s parent.
    """
    pipeline.set_progress_bar_config(disable=True)
    samples = []
    for index, fields in enumerate(
        progress_bar(iterable=prompts, desc="Generating with and without the adapter", unit="prompt")
    ):
        sampling = SamplingSettings(num_inference_steps=num_inference_steps, seed=seed + index)
        files = write_comparison(pipeline, fields, sampling, directory, name=f"sample-{index}")
        with_adapter, without_adapter = (file.relative_to(directory.parent).as_posix() for file in files)
        samples.append({"prompt": fields.prompt, "with_adapter": with_adapter, "without_adapter": without_adapter})
    return samples
