"""The adapter's model card: what it was trained on and how, what it sounds like, and how to use it.

It says what the run's facts say and nothing else. What names the adapter in its code is this folder; published, it is
the repository (`card_in_repository`).
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .data.building.report_card import escape_markdown
from .files import write_text
from .paths import LORA_WEIGHTS_NAME
from .storage.hub_address import is_on_hub, parse_hub_address

_TEMPLATES = Path(__file__).with_name("templates")
# The lines of the card's code that name the adapter while it lies in a folder.
ADAPTER_LINE = 'adapter = "."  # this folder'
FOLDER_LINE = "ADAPTER=.  # this folder"
APP_LINE = 'folder = "path of this folder"'
TRIGGER_PLACES = {
    "prepend": "Begin the prompt with",
    "append": "End the prompt with",
    "replace": "Prompt with",
}


@dataclass(frozen=True)
class BaseModel:
    """The adapted model as a reader gets it.

    Attributes:
        name: to be shown.
        hub_id: its repository, None where it was a folder or is embedded.
        source: the argument of diffusers' `from_pretrained`, as Python.
        prepare: the command that writes the folder that `source` names; None where none is needed.
        flags: of `acestep-lora generate`.
        official_name: what the official app calls it, if it is known.
    """

    name: str
    hub_id: str | None
    source: str
    prepare: str | None
    flags: str
    official_name: str | None


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name: title.
        version: of this package.
        base: what was adapted.
        kind: of adapter, for a person: LoRA, DoRA or LoKr.
        rows: facts about the training, as (what, value in Markdown).
        samples: `prompt`, `with_adapter`, `without_adapter` (relative paths) of each pair.
        effect: what the adapter does to the loss, as Markdown.
        plot: relative path of the loss plot.
        prompt: the example prompt.
        duration_s: how long the example is.
        num_inference_steps: its denoising steps; None: the model's own.
        comfyui_name: the file in `comfyui/`, if there is one.
        trigger_words: `trigger_word`, `trigger_position` and number of `tracks` of each.
        dataset: `dataset_summary.summarise_tracks`.
        dataset_name: of what was trained on, without a path.
        dataset_id: its id on the Hub, if it has one.
        license: of the adapter, as the Hub spells it, if whoever trained it gave one.
        results: what was measured on held-out tracks.
    """

    name: str
    version: str
    base: BaseModel
    kind: str
    rows: list[tuple[str, str]]
    samples: list[dict[str, str]]
    effect: str
    plot: str | None
    prompt: str
    duration_s: float
    num_inference_steps: int | None
    comfyui_name: str | None
    trigger_words: list[dict]
    dataset: dict
    dataset_name: str
    dataset_id: str | None = None
    license: str | None = None
    results: tuple[EvalResult, ...] = ()


def describe_base(
    pretrained_model_name_or_path: str, *, variant_dir: str | None, revision: str | None, is_original: bool
) -> BaseModel:
    """What a card says of the base model: its folder's name, where it was one, but not where that lies.

    Args:
        is_original: whether it is in the original layout, which plain diffusers doesn't load.
        The others are those of `ACEStepPipeline.from_pretrained`.
    """
    given = str(pretrained_model_name_or_path)
    variant = f" --variant_dir {shlex.quote(variant_dir)}" if variant_dir else ""
    if given == "tiny":
        folder = "ace-step-tiny"
        command = f"acestep-lora tiny-checkpoint {folder}"
        return BaseModel("tiny", None, f'"{folder}"', command, "--pretrained_model_name_or_path tiny", None)
    if is_on_hub(given):
        address = parse_hub_address(given, kind="model")
        hub_id, revision = address.repo_id, address.revision or revision
    else:
        hub_id = None if Path(given).expanduser().is_dir() else given
    name = hub_id or Path(given).expanduser().resolve().name
    at = f" --revision {shlex.quote(revision)}" if revision and hub_id else ""
    flags = f"--pretrained_model_name_or_path {shlex.quote(name)}{variant}"
    official = re.search(r"acestep-v15-[a-z-]*[a-z]", variant_dir or name)
    source, prepare = repr(name).replace("'", '"'), None
    if is_original:
        folder = f"{(variant_dir or name).rpartition('/')[2]}-diffusers"
        prepare = f"acestep-lora convert-checkpoint {shlex.quote(name)} {shlex.quote(folder)}{variant}{at}"
        source = f'"{folder}"'
    elif at:
        source += f', revision="{revision}"'
    return BaseModel(name, hub_id, source, prepare, flags + at, official and official[0].removesuffix("-diffusers"))


def write_model_card(path: Path, facts: CardFacts) -> None:
    """Write the card to `path`, a README.md."""
    write_text(path, str(render_card(facts)))


def render_card(facts: CardFacts) -> ModelCard:
    """The card, with the Hub's metadata."""
    import jinja2

    base = facts.base
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "plain": escape_markdown,
        "shell": shlex.quote,
        "code": lambda text: text.replace("`", "'"),
    }
    steps = f", num_inference_steps={facts.num_inference_steps}" if facts.num_inference_steps else ""
    shell_steps = f" --num_inference_steps {facts.num_inference_steps}" if facts.num_inference_steps else ""
    link = (
        f"[{base.name}](https://huggingface.co/{base.hub_id})"
        if base.hub_id
        else f"[ACE-Step 1.5](https://huggingface.co/ACE-Step) (`{base.name}`)"
    )
    content = environment.get_template("model_card.md.j2").render(
        card_data=_metadata(facts).to_yaml(),
        facts=facts,
        base=base,
        base_link=link,
        prompt=repr(facts.prompt),
        shell_prompt=shlex.quote(facts.prompt),
        sampling=f'lyrics="[Instrumental]", audio_duration={facts.duration_s:g}{steps}',
        shell_sampling=f"--duration {facts.duration_s:g}{shell_steps}",
        weights_name=LORA_WEIGHTS_NAME,
        data_rows=_data_rows(facts),
        ADAPTER_LINE=ADAPTER_LINE,
        FOLDER_LINE=FOLDER_LINE,
        APP_LINE=APP_LINE,
        TRIGGER_PLACES=TRIGGER_PLACES,
    )
    return ModelCard(content)


def _metadata(facts: CardFacts) -> ModelCardData:
    trigger = facts.trigger_words[0]["trigger_word"] if facts.trigger_words else None
    kind = "lokr" if facts.kind == "LoKr" else "lora"
    base = {"base_model": facts.base.hub_id, "base_model_relation": "adapter"} if facts.base.hub_id else {}
    return ModelCardData(
        **base,
        license=facts.license,
        library_name="diffusers",
        pipeline_tag="text-to-audio",
        tags=["ace-step", "ace-step-1.5", kind, "music", "text-to-music", "diffusers"],
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        language=sorted(code for code in facts.dataset["languages"] if re.fullmatch("[a-z]{2,3}", code)) or None,
        instance_prompt=trigger,
        widget=[{"text": each["prompt"], "output": {"url": each["with_adapter"]}} for each in facts.samples] or None,
        model_name=facts.name if facts.results else None,
        eval_results=list(facts.results) or None,
    )


def _data_rows(facts: CardFacts) -> list[tuple[str, str]]:
    data = facts.dataset
    rows = [
        ("dataset", facts.dataset_id or facts.dataset_name),
        ("tracks", f"{data['tracks']} ({data['minutes']:.1f} min)"),
        ("with lyrics", str(data["with_lyrics"])),
    ]
    for name, counts in (
        ("genres", data["genres"]),
        ("languages of lyrics", data["languages"]),
        ("licences of the tracks", data["licenses"]),
        ("filled in by a program", data["machine_made"]),
    ):
        if counts:
            rows.append((name, ", ".join(f"{value} ({count})" for value, count in counts.items())))
    return rows


def held_out_results(
    *, dataset_name: str, dataset_id: str | None, loss_with: float, loss_without: float
) -> tuple[EvalResult, ...]:
    """The losses on held-out tracks, with the adapter and without, as the Hub's metadata hold results."""
    place = {
        "task_type": "text-to-audio",
        "dataset_type": dataset_id or re.sub(r"[^\w.-]+", "-", dataset_name),
        "dataset_name": dataset_name,
        "metric_type": "loss",
    }
    return (
        EvalResult(**place, metric_value=round(loss_with, 6), metric_name="flow-matching loss with the adapter"),
        EvalResult(**place, metric_value=round(loss_without, 6), metric_name="flow-matching loss without it"),
    )


def card_in_repository(text: str, repo_id: str) -> str:
    """A card of this module, its code naming the repository instead of this folder; others as they are."""
    name = repo_id.rpartition("/")[2]
    lines = {
        ADAPTER_LINE: f'adapter = "{repo_id}"',
        FOLDER_LINE: f"hf download {repo_id} --local-dir {name}\nADAPTER={name}",
        APP_LINE: f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repo_id}")',
    }
    return "".join(
        lines.get(line.rstrip("\n"), line.rstrip("\n")) + ("\n" if line.endswith("\n") else "")
        for line in text.splitlines(keepends=True)
    )
