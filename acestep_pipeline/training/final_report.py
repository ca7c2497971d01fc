"""The end of a run: load what was written as a user would, let it be heard, write the card, say what to do next."""

import shlex
import shutil
import sys
from pathlib import Path

import torch

from ..model_card import plot_loss, write_model_card
from ..paths import LORA_WEIGHTS_NAME
from ..pipeline import ACEStepPipeline
from ..prompt_fields import PromptFields
from ..version import __version__
from .effect import describe_effect
from .run_directory import (
    CARD_NAME,
    METRICS_NAME,
    PLOT_NAME,
    SAMPLES_DIR,
    VALIDATION_NAME,
    naming_failed_writes,
)
from .tracking import read_metrics
from .validation import write_samples


def write_final_report(
    output_dir: Path,
    *,
    name: str,
    checkpoint: dict,
    device: torch.device,
    weight_dtype: torch.dtype,
    prompts: list[PromptFields],
    example_prompt: str,
    num_inference_steps: int | None,
    seed: int,
    kind: str,
    card_rows: list[tuple[str, str]],
) -> str:
    """Generate the samples with the adapter in `output_dir`, draw the loss, and write the model card.

    Args:
        output_dir: the run's directory, with adapter and metrics.
        name: title of the card.
        checkpoint: arguments of `ACEStepPipeline.from_pretrained` that name the base model.
        device, weight_dtype: where and in what precision to generate.
        prompts: what to generate, with and without the adapter; may be empty.
        example_prompt: for the card and the next command.
        num_inference_steps: denoising steps, None for the variant's default.
        seed: of the first sample; the next ones count up.
        kind: of adapter: LoRA, DoRA or LoKr.
        card_rows: facts for the card's table.

    Returns:
        What to tell the user: the result, where it is, and the next command.
    """
    samples = []
    if prompts:
        pipeline = ACEStepPipeline.from_pretrained(**checkpoint, torch_dtype=weight_dtype).to(device)
        pipeline.load_lora_weights(output_dir, strict=False)  # a run of one update may not have changed anything yet
        with naming_failed_writes(output_dir, SAMPLES_DIR):
            samples = write_samples(
                pipeline,
                prompts,
                num_inference_steps=num_inference_steps,
                seed=seed,
                directory=output_dir / SAMPLES_DIR,
            )
    metrics = [line for line in read_metrics(output_dir / METRICS_NAME) if line["loss"] is not None]
    with naming_failed_writes(output_dir, PLOT_NAME):
        plot_loss(metrics, output_dir / PLOT_NAME)
    validations = output_dir / VALIDATION_NAME
    effect = describe_effect(read_metrics(validations) if validations.is_file() else [])
    model = checkpoint["pretrained_model_name_or_path"]
    with naming_failed_writes(output_dir, CARD_NAME):
        write_model_card(
            output_dir / CARD_NAME,
            name=name,
            version=__version__,
            base_model=model,
            kind=kind,
            rows=[*card_rows, ("effect", effect)],
            samples=samples,
            plot=PLOT_NAME,
            prompt=example_prompt,
        )
    tenth = max(1, len(metrics) // 10)
    start, end = (sum(line["loss"] for line in lines) / tenth for lines in (metrics[:tenth], metrics[-tenth:]))
    flags = f"--pretrained_model_name_or_path {shlex.quote(str(model))}"
    flags += f" --variant_dir {checkpoint['variant_dir']}" if checkpoint.get("variant_dir") else ""
    lines = [
        f"Mean loss of the first tenth of the updates {start:.4f}, of the last tenth {end:.4f}.",
        effect,
        f"  adapter        {output_dir / LORA_WEIGHTS_NAME}",
    ]
    for sample in samples:
        lines.append(f"  with adapter   {output_dir / sample['with_adapter']}")
        lines.append(f"  without        {output_dir / sample['without_adapter']}")
    lines += [
        f"  model card     {output_dir / CARD_NAME}",
        f"Next: {_command()} generate {flags} --adapter {shlex.quote(str(output_dir))} "
        f"--prompt {shlex.quote(example_prompt)} --output out.wav",
    ]
    return "\n".join(lines)


def _command() -> str:
    """`acestep-lora`, with its folder where that is not on the PATH."""
    beside = Path(sys.executable).with_name("acestep-lora")
    return "acestep-lora" if shutil.which("acestep-lora") or not beside.exists() else str(beside)
