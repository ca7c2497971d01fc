"""The adapter's model card: what it was trained on and how, what it sounds like, and how to use it."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .files import write_atomically
from .paths import LORA_WEIGHTS_NAME

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A {{ kind }} for [ACE-Step 1.5]({{ base_link }}), trained with ACE-Step LoRA {{ version }}.
{% if samples %}
## Listen

Same prompt, same seed, same noise; only the adapter differs.

| prompt | with the adapter | without |
|---|---|---|
{% for sample in samples -%}
| {{ sample.prompt }} | <audio controls src="{{ sample.with_adapter }}"></audio> [wav]({{ sample.with_adapter }}) \
| <audio controls src="{{ sample.without_adapter }}"></audio> [wav]({{ sample.without_adapter }}) |
{% endfor %}{% endif %}
## Use

```python
import torch
from diffusers import AceStepPipeline

pipe = AceStepPipeline.from_pretrained("a diffusers-layout ACE-Step 1.5 checkpoint", torch_dtype=torch.bfloat16)
{{ loading }}
audio = pipe({{ prompt }}, audio_duration=60).audios
```

`acestep_pipeline.ACEStepPipeline` takes the original checkpoint layout as well:
`acestep-lora generate --adapter DIR --prompt "..." --output out.wav`. The same adapter for other programs: `peft/` for
the official trainer and app, Side-Step and PEFT; `comfyui/` for ComfyUI's `models/loras`.
{% if note %}
{{ note }}
{% endif %}

## Effect

{{ effect }}

## Training

| | |
|---|---|
{% for row in rows -%}
| {{ row[0] }} | {{ row[1] }} |
{% endfor %}
{% if plot %}![loss by update]({{ plot }})

The training loss of one update depends mostly on the timesteps it drew: look at the smoothed line.
{% endif %}
Every argument, version and hash is in `training_args.json`; the values of each update are in `metrics.jsonl`.
"""


LOADING = 'pipe.load_lora_weights("this folder or repository")'
# diffusers' pipeline refuses a LoKr, for its keys' names; the transformer's own method takes it.
LOKR_LOADING = (
    f"""pipe.transformer.load_lora_adapter("this folder or repository", weight_name="{LORA_WEIGHTS_NAME}")"""
)
LOKR_NOTE = """A LoKr is not a LoRA: in diffusers (0.42 and later) it is the transformer that loads it, as above, and
`ACEStepPipeline.load_lora_weights` and `acestep-lora generate` do so themselves. The weights have PEFT's names
(`lokr_w1`, `lokr_w2`), with its `LoKrConfig` in the file's metadata; programs that take LoRA only can't use them."""


def write_model_card(
    path: Path,
    *,
    name: str,
    version: str,
    base_model: str,
    kind: str,
    rows: list[tuple[str, str]],
    samples: list[dict[str, str]],
    effect: str,
    plot: str | None,
    prompt: str,
) -> None:
    """Write the card.

    Args:
        path: the README.md to write.
        name: title.
        version: of this package.
        base_model: what was adapted; a Hub id becomes the card's `base_model`.
        kind: of adapter, for a person: LoRA, DoRA or LoKr.
        rows: facts about the training, as (what, value).
        samples: `prompt`, `with_adapter`, `without_adapter` (relative paths) of each pair.
        effect: what the adapter does to the loss, as markdown.
        plot: relative path of the loss plot.
        prompt: the example prompt.
    """
    on_hub = base_model.count("/") == 1 and not base_model.startswith(("/", "."))
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-audio",
        tags=["ace-step", "ace-step-1.5", "lokr" if kind == "LoKr" else "lora", "music", "text-to-music", "diffusers"],
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        version=version,
        kind=kind,
        loading=LOKR_LOADING if kind == "LoKr" else LOADING,
        note=LOKR_NOTE if kind == "LoKr" else None,
        base_link=f"https://huggingface.co/{base_model}" if on_hub else "https://huggingface.co/ACE-Step",
        rows=rows,
        samples=[{**sample, "prompt": sample["prompt"].replace("|", "\\|").replace("\n", " ")} for sample in samples],
        effect=effect,
        plot=plot,
        prompt=repr(prompt),
    )
    write_atomically(path, card.save)
