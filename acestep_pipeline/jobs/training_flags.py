"""A training job's arguments as the training script's flags. Which there are, the script's own parser says."""

import argparse
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from ..data.text.text_files import one_line
from ..errors import UsageError
from ..training.argument_checks import check_bounds, check_contradictions
from ..training.arguments import build_parser, parse_args
from ..training.settings import lora_settings, text_options

# The only flags with free text that a job may set: none of them names a file, a place or an account. Flags that are
# added to the script are refused until they are named here, unless they take a number, a choice or yes and no.
TEXTS = frozenset({
    "trigger_word", "trigger_position", "adapter_type", "lora_layers", "lora_blocks", "timestep_mix", "optimizer",
    "lr_scheduler", "validation_prompt",
})  # fmt: skip
# What the job says in a field of its own.
FIELDS = {
    "train_data_dir": "data",
    "dataset_name": "data",
    "pretrained_model_name_or_path": "model",
    "variant_dir": "variant_dir",
    "revision": "revision",
    "lora_config": "lora_config",
    "output_dir": "name",
    "exp_name": "name",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "resume",
    "push_to_s3": "upload",
}
# The script has lower bounds of its own. Every other whole number is at most MAX_NUMBER, every text MAX_TEXT_CHARS.
MAX_NUMBER, MAX_TEXT_CHARS = 1_000_000, 2000
MAXIMA = {
    "rank": 512,
    "num_train_epochs": 10_000,
    "effective_batch_size": 4096,
    "train_batch_size": 1024,
    "gradient_accumulation_steps": 4096,
    "tag_shuffle": 64,
    "dataloader_num_workers": 16,
    "num_validation_samples": 32,
    "validation_inference_steps": 200,
    "num_validation_draws": 256,
    "max_validation_samples": 10_000,
    "min_duration_s": 600,
    "timestep_steps": 1000,
    "checkpoints_total_limit": 100,
    "style_distance": 128,
    "seed": 2**63 - 1,
    "validation_seed": 2**63 - 1,
}


def _flags() -> dict[str, argparse.Action]:
    return {action.dest: action for action in build_parser()._actions if action.option_strings}


def may_set(action: argparse.Action) -> bool:
    """Whether a job may set a flag through its arguments."""
    name = action.dest
    if name in FIELDS or name in ("help", "debug", "offload_dir") or name.startswith(("push_to", "hub_")):
        return False
    return name in TEXTS or action.nargs == 0 or action.type in (int, float) or bool(action.choices)


def training_flags(arguments: Mapping[str, object]) -> list[str]:
    """The flags for a job's arguments, each checked: its name, its kind, its size.

    Raises:
        UsageError: one can't be set; the message names it, and what was probably meant.
    """
    known, flags = _flags(), []
    for name, value in arguments.items():
        action = known.get(name)
        if action is None or not may_set(action):
            raise UsageError(_why_not(name, known))
        if value is None:
            raise UsageError(f"arguments.{name} is null; leave it out for its default.")
        flags += _flag(name, value, action)
    return flags


def _why_not(name: str, known: Mapping[str, argparse.Action]) -> str:
    if name in FIELDS:
        return f"arguments.{name} is what the job's own field {FIELDS[name]!r} says; leave it out here."
    if name in known:
        return f"arguments.{name} can't be set by a job: it is the worker's."
    settable = [one for one, action in known.items() if may_set(action)]
    close = difflib.get_close_matches(one_line(name), settable, 1)
    hint = f"did you mean {close[0]}?" if close else "see train_ace_step_lora.py --help."
    return f"arguments.{one_line(name)[:80]} is no argument of the training; {hint}"


def _flag(name: str, value: object, action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"arguments.{name} must be true or false, not {_shown(value)}.")
        negative = f"--no-{name}" if f"--no-{name}" in action.option_strings else None
        return [f"--{name}"] if value else [negative] if negative else []
    if action.type in (int, float):
        right = isinstance(value, int if action.type is int else int | float) and not isinstance(value, bool)
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            kind = "a whole number" if action.type is int else "a number"
            raise UsageError(f"arguments.{name} must be {kind}, not {_shown(value)}.")
        if abs(value) > MAXIMA.get(name, MAX_NUMBER):
            raise UsageError(f"arguments.{name} must be at most {MAXIMA.get(name, MAX_NUMBER)}, not {_shown(value)}.")
        return [f"--{name}={value}"]
    if not isinstance(value, str):
        raise UsageError(f"arguments.{name} must be text, not {_shown(value)}.")
    if action.choices and value not in action.choices:
        raise UsageError(f"arguments.{name} must be one of {', '.join(action.choices)}, not {_shown(value)}.")
    if len(value) > MAX_TEXT_CHARS or "\0" in value:
        raise UsageError(f"arguments.{name} must have at most {MAX_TEXT_CHARS} characters, and no NUL.")
    # One argument: a value that begins with a dash stays a value.
    return [f"--{name}={value}"]


def _shown(value: object) -> str:
    return one_line(json.dumps(value, default=str))[:80]


def check_flags(flags: list[str], lora_config: Path | None = None) -> argparse.Namespace:
    """Refuse what the training script would refuse within its first second; returns what it will be told.

    Raises:
        UsageError: a value can't work.
    """
    args = parse_args([*flags, *([f"--lora_config={lora_config}"] if lora_config else [])])
    check_bounds(args)
    check_contradictions(args)
    lora_settings(args)
    text_options(args)
    return args
