"""The end of a run: load what was written as a user would, let it be heard, write the card, say what to do next."""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import EvalResult

from ..adapters.formats.write import comfyui_name, export
from ..checkpoint_source import open_checkpoint
from ..data.latent_cache import CachedTrack
from ..files import write_text
from ..model_card import BaseModel, CardFacts, describe_base, held_out_results, write_model_card
from ..paths import COMFYUI_DIR, LORA_WEIGHTS_NAME, PEFT_DIR
from ..plots import plot_loss
from ..prompt_fields import PromptFields
from ..version import __version__
from .comparison import Comparison, Measured
from .effect import Verdict, judge
from .effect_report import draw_update_norms, effect_lines, effect_record, effect_section
from .run_directory import (
    CARD_NAME,
    EFFECT_NAME,
    METRICS_NAME,
    NORMS_PLOT_NAME,
    PLOT_NAME,
    SAMPLES_DIR,
    VALIDATION_NAME,
    naming_failed_writes,
)
from .style_clips import measure_style
from .style_distance import StyleDistance
from .tracking import read_metrics
from .update_norms import relative_norm
from .validation import load_pipeline, write_samples


def write_final_report(
    output_dir: Path,
    *,
    name: str,
    checkpoint: dict,
    device: torch.device,
    weight_dtype: torch.dtype,
    one_by_one: bool,
    prompts: list[PromptFields],
    example_prompt: str,
    num_inference_steps: int | None,
    seed: int,
    about: dict,
    measured: Measured,
    tracks: Sequence[CachedTrack],
    style_clips: int | None,
    duration_s: float,
) -> str:
    """Write the adapter in `output_dir` for other programs, generate samples with it, judge and draw what it does, and
    write the model card.

    Args:
        output_dir: the run's directory, with adapter and metrics.
        name: title of the card.
        checkpoint: arguments of `ACEStepPipeline.from_pretrained` that name the base model.
        device, weight_dtype: where and in what precision to generate.
        one_by_one: whether the pipeline's models take turns on the device; on a CPU this makes no difference.
        prompts: what to generate, with and without the adapter; may be empty.
        example_prompt: for the card and the next command.
        num_inference_steps: denoising steps, None for the variant's default.
        seed: of the first sample; the next ones count up.
        about: what `settings.describe_run` gives: facts for the card.
        measured: what the adapter does to the loss.
        tracks: what was trained on.
        style_clips: clips to generate for a style distance; None: it is not measured.
        duration_s: of each of these.

    Returns:
        What to tell the user: the result, where it is, and the next command.
    """
    with naming_failed_writes(output_dir, PEFT_DIR):
        export(output_dir, name=name, base_model=str(checkpoint["pretrained_model_name_or_path"]))
    samples, style = [], None
    if prompts or style_clips:
        pipeline = load_pipeline(
            checkpoint, output_dir, device=device, weight_dtype=weight_dtype, one_by_one=one_by_one
        )
        sampling = {"num_inference_steps": num_inference_steps, "seed": seed}
        with naming_failed_writes(output_dir, SAMPLES_DIR):
            samples = write_samples(pipeline, prompts, **sampling, directory=output_dir / SAMPLES_DIR)
        if style_clips:
            style = measure_style(pipeline, tracks, clips=style_clips, duration_s=duration_s, **sampling)
    written = read_metrics(output_dir / METRICS_NAME)
    metrics = [line for line in written if line["loss"] is not None]
    verdict = _write_effect(output_dir, metrics, measured, style, updates=written[-1]["update"])
    facts = CardFacts(
        **about | {"rows": [*about["rows"], ("effect", verdict.headline)]},
        name=name,
        version=__version__,
        base=_describe_base(checkpoint),
        samples=samples,
        effect=effect_section(measured, verdict, style, plot=NORMS_PLOT_NAME),
        plot=PLOT_NAME,
        prompt=example_prompt,
        duration_s=duration_s,
        num_inference_steps=num_inference_steps,
        comfyui_name=comfyui_name(name),
        results=_held_out_results(measured.held_out, about),
    )
    with naming_failed_writes(output_dir, CARD_NAME):
        write_model_card(output_dir / CARD_NAME, facts)
    return "\n".join(
        [
            _describe_loss(metrics),
            *effect_lines(measured, verdict, style),
            *_describe_files(output_dir, name, samples),
            f"Next: {_generate_command(checkpoint, output_dir, example_prompt)}",
        ]
    )


def _describe_base(checkpoint: dict) -> BaseModel:
    return describe_base(
        checkpoint["pretrained_model_name_or_path"],
        variant_dir=checkpoint.get("variant_dir"),
        revision=checkpoint.get("revision"),
        is_original=open_checkpoint(**checkpoint).is_original,
    )


def _held_out_results(held_out: Comparison | None, about: dict) -> tuple[EvalResult, ...]:
    if held_out is None:
        return ()
    return held_out_results(
        dataset_name=about["dataset_name"],
        dataset_id=about["dataset_id"],
        loss_with=held_out.loss_with,
        loss_without=held_out.loss_without,
    )


def _write_effect(
    output_dir: Path, metrics: list[dict], measured: Measured, style: StyleDistance | str | None, *, updates: int
) -> Verdict:
    """Judge what was measured, and write `effect.json` and the pictures of the loss and of the update."""
    path = output_dir / VALIDATION_NAME
    validations = read_metrics(path) if path.is_file() else []
    verdict = judge(measured.held_out, measured.trained_on, validations, update_size=relative_norm(measured.norms))
    with naming_failed_writes(output_dir, PLOT_NAME):
        plot_loss(metrics, output_dir / PLOT_NAME, validations=validations, best_update=verdict.since_update)
    with naming_failed_writes(output_dir, NORMS_PLOT_NAME):
        draw_update_norms(measured.norms, output_dir / NORMS_PLOT_NAME)
    record = effect_record(measured, verdict, style, updates=updates)
    with naming_failed_writes(output_dir, EFFECT_NAME):
        write_text(output_dir / EFFECT_NAME, json.dumps(record, indent=1) + "\n")
    return verdict


def _describe_loss(metrics: list[dict]) -> str:
    tenth = max(1, len(metrics) // 10)
    start, end = (sum(line["loss"] for line in lines) / tenth for lines in (metrics[:tenth], metrics[-tenth:]))
    return f"Mean loss of the first tenth of the updates {start:.4f}, of the last tenth {end:.4f}."


def _describe_files(output_dir: Path, name: str, samples: list[dict[str, str]]) -> list[str]:
    """Where everything is."""
    lines = [
        f"  adapter        {output_dir / LORA_WEIGHTS_NAME}",
        f"  other formats  {output_dir / PEFT_DIR}, {output_dir / COMFYUI_DIR / comfyui_name(name)}",
    ]
    for sample in samples:
        lines.append(f"  with adapter   {output_dir / sample['with_adapter']}")
        lines.append(f"  without        {output_dir / sample['without_adapter']}")
    return [*lines, f"  model card     {output_dir / CARD_NAME}"]


def _generate_command(checkpoint: dict, output_dir: Path, prompt: str) -> str:
    """What generates with the adapter from here on."""
    flags = f"--pretrained_model_name_or_path {shlex.quote(str(checkpoint['pretrained_model_name_or_path']))}"
    flags += f" --variant_dir {checkpoint['variant_dir']}" if checkpoint.get("variant_dir") else ""
    return (
        f"{_command()} generate {flags} --adapter {shlex.quote(str(output_dir))} "
        f"--prompt {shlex.quote(prompt or '…')} --output out.wav"
    )


def _command() -> str:
    """`acestep-lora`, with its folder where that is not on the PATH."""
    beside = Path(sys.executable).with_name("acestep-lora")
    return "acestep-lora" if shutil.which("acestep-lora") or not beside.exists() else str(beside)
