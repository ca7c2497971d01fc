"""The one table of environment variables: what the image, its host script and the training script's help know of them.

Standard library only: the doctor reads it before it knows whether anything else is installed.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..errors import UsageError

# How alike two names must be for one to be taken for the other misspelt (difflib's ratio, 1: the same).
ALIKE = 0.8


@dataclass(frozen=True)
class Variable:
    """An environment variable. `flag` is the training script's argument that it sets, without dashes; None: whoever
    `help` names reads it. A switch is yes or no, and becomes the argument or its `--no-` form."""

    name: str
    help: str
    flag: str | None = None
    is_switch: bool = False


# What the entrypoint turns into arguments of the training script. `RANK` is also the name of a process's number in a
# distributed run, so these are taken out of the environment before the script starts.
TRAINING = (
    Variable("PRESET", "set of defaults (c)", "preset"),
    Variable("EXP_NAME", "name of the run, and of its folder in /output (preset and data)", "exp_name"),
    Variable("EPOCHS", "visits of every track", "num_train_epochs"),
    Variable("MAX_TRAIN_STEPS", "optimizer updates, instead of EPOCHS", "max_train_steps"),
    Variable("LEARNING_RATE", "peak learning rate", "learning_rate"),
    Variable("BATCH_SIZE", "windows in one forward pass on each GPU", "train_batch_size"),
    Variable("GRAD_ACCUM", "forward passes in one update", "gradient_accumulation_steps"),
    Variable("GRAD_CLIP", "the gradient's largest norm", "max_grad_norm"),
    Variable("RANK", "rank of the adapter", "rank"),
    Variable("ALPHA", "its alpha", "lora_alpha"),
    Variable("DROPOUT", "dropout on its input", "lora_dropout"),
    Variable("LORA_CONFIG", "LoRA JSON, in /lora-cfg or with its whole path (the only one there)", "lora_config"),
    Variable("OPTIMIZER", "adamw, adamw_8bit, …", "optimizer"),
    Variable("MIXED_PRECISION", "bf16, fp16 or no", "mixed_precision"),
    Variable("MAX_DURATION_S", "longest window, in seconds", "max_duration_s"),
    Variable("TRIGGER_WORD", "made-up word that calls the style up", "trigger_word"),
    Variable("VARIANT_DIR", "which DiT of an original-layout checkpoint", "variant_dir"),
    Variable("VALIDATION_FRACTION", "share of the tracks that is held out", "validation_fraction"),
    Variable("SEED", "same seed, same adapter", "seed"),
    Variable("EVERY_N_TRAIN_STEPS", "a checkpoint every N updates", "checkpointing_steps"),
    Variable("RESUME", "latest, a checkpoint's folder, or no (latest)", "resume_from_checkpoint"),
    Variable("REPORT_TO", "tracker", "report_to"),
    Variable("PUSH_TO_S3", "publish there: a name below ACESTEP_S3_ROOT, or s3://…", "push_to_s3"),
    Variable("PUSH_TO_HUB", "yes: publish on the Hub at the end, with HF_TOKEN (no)", "push_to_hub", is_switch=True),
    Variable("HUB_MODEL_ID", "where there: user/name (EXP_NAME, yours)", "hub_model_id"),
    Variable("HUB_PRIVATE_REPO", "yes: make that repository private (no)", "hub_private_repo", is_switch=True),
    Variable("HUB_TAG", "tag of the commit", "hub_tag"),
)
CONTAINER = (
    Variable("MODE", "train, smoke, generate, dataset, runpod, lambda or shell (train)"),
    Variable("NUM_GPUS", "GPUs to train on (all that are there); 0: the CPU"),
    Variable("LOG_FORMAT", "plain, or json: one object a line (plain)"),
)
PROJECT = (
    Variable("ACESTEP_MODEL", "base model: folder, Hub id or tiny (/model, else the published one)"),
    Variable("ACESTEP_DATA", "training music: folder or address (/data)"),
    Variable("ACESTEP_CACHE_DIR", "latents and downloads of the project (the cache volume)"),
    Variable("ACESTEP_S3_ROOT", "root of the S3 layout, e.g. s3://bucket"),
    Variable("ACESTEP_DEBUG", "1: tracebacks"),
)
# Read by the handlers in serverless/.
JOBS = (
    Variable("ACESTEP_JOBS_DATA", "folder that jobs may name for music (/data)"),
    Variable("ACESTEP_JOBS_MODEL", "folder that jobs may name for models (/model)"),
    Variable("ACESTEP_JOBS_OUTPUT", "folder that jobs write to (/output; with MODE=lambda below /tmp)"),
    Variable("ACESTEP_ADAPTERS", "library of adapters (lora below ACESTEP_S3_ROOT, else the output folder)"),
)
# Read where Modal's app is deployed from, and by nothing in the image.
DEPLOYMENT = (
    Variable("ACESTEP_MODAL_IMAGE", "the image in a registry"),
    Variable("ACESTEP_MODAL_REGISTRY", "Modal's secret with the registry's credentials"),
    Variable("ACESTEP_MODAL_TRAIN_GPU", "Modal's GPU for training"),
    Variable("ACESTEP_MODAL_GENERATE_GPU", "Modal's GPU for generating"),
)
# Read by libraries, and passed on by the host script as they are.
LIBRARIES = (
    Variable("AWS_ENDPOINT_URL", "another S3 than Amazon's"),
    Variable("AWS_ACCESS_KEY_ID", "S3 credentials"),
    Variable("AWS_SECRET_ACCESS_KEY", "S3 credentials"),
    Variable("AWS_SESSION_TOKEN", "S3 credentials"),
    Variable("AWS_REGION", "S3 region"),
    Variable("AWS_DEFAULT_REGION", "S3 region"),
    Variable("HF_TOKEN", "private models on the Hub, and PUSH_TO_HUB"),
    Variable("HF_ENDPOINT", "another Hub"),
    Variable("HF_HUB_OFFLINE", "1: no downloads"),
    Variable("WANDB_API_KEY", "for REPORT_TO=wandb"),
    Variable("HTTPS_PROXY", "proxy for downloads"),
    Variable("NO_PROXY", "addresses that need none"),
)
TABLE = (*TRAINING, *CONTAINER, *PROJECT, *JOBS, *LIBRARIES)
NAMES = tuple(variable.name for variable in TABLE)
OUR_NAMES = frozenset(variable.name for variable in (*PROJECT, *JOBS, *DEPLOYMENT))
# Others' variables that look like one of ours.
WELL_KNOWN = frozenset({"SPEED", "MODEL", "NUM_CPUS"})
# Made by the host script: the names (not the values) of all variables there, so that a misspelt one is noticed.
HOST_NAMES = "ACESTEP_HOST_NAMES"


def check_names(names: Collection[str], *, flags: Collection[str] = ()) -> None:
    """Refuse a name that was probably meant to be one of the table's.

    That is one of these, and neither in the table nor in `WELL_KNOWN`: it starts with ACESTEP_; it is a training
    argument's name in capitals with more than one word (`LORA_ALPHA`), `flags` being all arguments without dashes; or
    it is nearly a name of the table (`EPOCH`). Case counts: the environment is full of lower-case names.

    Raises:
        UsageError: names it, and what was probably meant.
    """
    by_flag = {variable.flag.upper(): variable.name for variable in TRAINING if variable.flag}
    arguments = {flag.upper() for flag in flags if "_" in flag} - {"CACHE_DIR", "LOGGING_DIR"}
    for name in sorted(set(names) - set(NAMES) - OUR_NAMES - WELL_KNOWN - {HOST_NAMES}):
        if name in by_flag:
            raise UsageError(f"{name} is not read; the variable's name is {by_flag[name]}.")
        if name in arguments:
            raise UsageError(f"{name} is not read; add --{name.lower()} VALUE to the command instead, and unset it.")
        if len(name) < 4:
            continue
        ours = [variable.name for variable in (*TRAINING, *CONTAINER, *PROJECT, *JOBS)]
        close = difflib.get_close_matches(name, ours, 1, ALIKE)
        if close:
            raise UsageError(f"{name} is not read; did you mean {close[0]}? Rename it, or unset it.")
        if name.startswith("ACESTEP_"):
            known = ", ".join(variable.name for variable in (*PROJECT, *JOBS))
            raise UsageError(f"{name} is not read (known: {known}); rename it, or unset it.")


def training_flags(environment: Mapping[str, str], *, without: Collection[str] = ()) -> list[str]:
    """The training script's arguments that the environment's variables set; an empty variable is unset.

    `without` names variables that somebody else deals with.

    Raises:
        UsageError: a switch is neither yes nor no.
    """
    flags = []
    for variable in TRAINING:
        value = environment.get(variable.name)
        if not value or variable.name in without:
            continue
        if variable.is_switch:
            if value not in ("yes", "no"):
                raise UsageError(f"{variable.name} must be yes or no, not {value!r}.")
            flags.append(f"--{variable.flag}" if value == "yes" else f"--no-{variable.flag}")
        else:
            flags += [f"--{variable.flag}", value]
    return flags


def without_training(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what `training_flags` has read."""
    names = {variable.name for variable in TRAINING}
    return {name: value for name, value in environment.items() if name not in names}


def describe_table() -> str:
    """A line for each variable, for people."""
    width = max(map(len, NAMES))
    parts = (
        ("training", TRAINING),
        ("the container", CONTAINER),
        ("the project", PROJECT),
        ("jobs (MODE=runpod, MODE=lambda)", JOBS),
        ("libraries", LIBRARIES),
    )
    lines = []
    for title, variables in parts:
        lines.append(f"{title}:")
        for variable in variables:
            flag = f"  [--{variable.flag}]" if variable.flag else ""
            lines.append(f"  {variable.name:<{width}}  {variable.help}{flag}")
    return "\n".join(lines)


def shell_array() -> str:
    """The table's names as the host script has them between its marks."""
    return "VARIABLES=(\n" + "".join(f"    {name}\n" for name in NAMES) + ")\n"
