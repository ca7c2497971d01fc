"""Refuses what can't work on the training script's command line, before torch is even imported."""

import argparse
import math
import os
from collections.abc import Callable, Collection

from ..errors import UsageError
from ..presets import load_preset
from .batch_size import choose_batch_size
from .hub_release import check_hub_arguments
from .launch import check_launch
from .memory import check_quantization_installed
from .objective import check_objective
from .optimizers import check_optimizer
from .settings import lora_settings, text_options
from .style_distance import check_style_distance
from .tracking import check_trackers

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

# What a number must be, whether it is so, and the flags this is asked of; None (unset) is always right.
BOUNDS: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "be positive",
        lambda value: value > 0,
        (
            "rank", "lora_alpha", "timestep_sigma", "timestep_steps", "timestep_shift", "snr_gamma",
            "effective_batch_size", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
            "max_train_steps", "max_train_samples", "learning_rate", "max_grad_norm", "lr_num_cycles", "adam_epsilon",
            "checkpointing_steps", "checkpointing_epochs", "checkpoints_total_limit", "max_validation_samples",
            "num_validation_draws", "validation_steps", "validation_epochs", "early_stopping_patience",
            "validation_duration_s", "validation_inference_steps", "upload_timeout_s", "preview_steps",
        ),
    ),
    (
        "not be negative",
        lambda value: value >= 0,
        (
            "lr_warmup_steps", "lr_power", "adam_weight_decay", "num_validation_samples", "dataloader_num_workers",
            "min_duration_s",
        ),
    ),
    ("be in [0, 1]", lambda value: 0 <= value <= 1, ("cfg_dropout",)),
    (
        "be in [0, 1)",
        lambda value: 0 <= value < 1,
        ("lora_dropout", "adam_beta1", "adam_beta2", "validation_fraction"),
    ),
    ("be between 0 and 1", lambda value: 0 < value < 1, ("ema_decay",)),
    (
        "be in (0, 1] (--no-gradient_checkpointing turns it off)",
        lambda value: 0 < value <= 1,
        ("gradient_checkpointing_ratio",),
    ),
    ("be in [0, 2**63)", lambda value: 0 <= value < 2**63, ("seed", "validation_seed")),
    ("be in [2, 600], the model's range", lambda value: 2 <= value <= 600, ("max_duration_s",)),
    ("be at most 600", lambda value: value <= 600, ("validation_duration_s",)),
)  # fmt: skip

# Flags that mean something under one choice of another flag, and what they are unless given.
ONLY_WITH = {
    "timestep_mix": ("timestep_distribution", "mix", "logit_normal_max=0.5,discrete=0.5"),
    "snr_gamma": ("weighting_scheme", "min_snr", 5.0),
}


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that can't work, before anything is loaded; settle how an update is divided, and defaults
    that depend on other flags.

    Raises:
        UsageError: it names the flag, and what would work.
    """
    check_bounds(args)
    if args.lr_scheduler not in LR_SCHEDULERS:
        raise UsageError(f"--lr_scheduler must be one of {', '.join(LR_SCHEDULERS)}, not {args.lr_scheduler!r}.")
    check_contradictions(args)
    for name, (_, _, default) in ONLY_WITH.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    # Each of these refuses what its part can't do.
    lora_settings(args)
    text_options(args)
    check_optimizer(args.optimizer, lr_scheduler=args.lr_scheduler)
    check_quantization_installed(args.base_quantization)
    check_objective(args.timestep_distribution, args.timestep_mix, args.weighting_scheme)
    check_trackers(args.report_to)
    check_style_distance(args.style_distance, args.validation_duration_s)
    check_hub_arguments(
        push_to_hub=args.push_to_hub,
        named={name: getattr(args, name) for name in ("hub_model_id", "hub_private_repo", "hub_tag")},
        license=args.license,
        resume_from_checkpoint=args.resume_from_checkpoint,
    )
    check_launch(mixed_precision=args.mixed_precision, optimizer=args.optimizer)
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    size = choose_batch_size(
        effective_batch_size=args.effective_batch_size,
        train_batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_processes=num_processes,
    )
    args.effective_batch_size, args.train_batch_size = size.effective, size.micro
    args.gradient_accumulation_steps = -(-size.effective // (size.micro * num_processes))


def check_bounds(args: argparse.Namespace, *, only: Collection[str] | None = None) -> None:
    """Refuse numbers out of their bounds: of the training's flags, or of those of a command that has `only` some.

    Raises:
        UsageError: one is.
    """
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} must be a finite number, not {value}.")
    for asked, holds, names in BOUNDS:
        for name in names if only is None else [name for name in names if name in only]:
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise UsageError(f"--{name} must {asked}, not {value}.")


def check_contradictions(args: argparse.Namespace) -> None:
    """Refuse flags that don't go together.

    Raises:
        UsageError: two don't.
    """
    if args.ema_decay is not None and args.optimizer.startswith("schedulefree"):
        raise UsageError(f"--optimizer {args.optimizer} averages the adapter itself; leave --ema_decay out.")
    if args.validation_steps and args.validation_epochs:
        raise UsageError(
            "--validation_steps and --validation_epochs both say how often to validate; give one of them."
        )
    if args.validation_fraction and args.validation_data_dir:
        raise UsageError("--validation_fraction and --validation_data_dir both hold tracks out; give one of them.")
    ratio, preset = args.gradient_checkpointing_ratio, load_preset(args.preset) if args.preset else {}
    if ratio < 1 and not args.gradient_checkpointing and ratio != preset.get("gradient_checkpointing_ratio"):
        raise UsageError(
            f"--gradient_checkpointing_ratio {ratio} does nothing without --gradient_checkpointing; add it, or leave "
            "the ratio out."
        )
    for name, (flag, value, _) in ONLY_WITH.items():
        if getattr(args, name) is not None and getattr(args, flag) != value:
            raise UsageError(f"--{name} does nothing without --{flag} {value}; add it, or leave --{name} out.")
    if args.adapter_type == "lokr" and args.base_quantization != "none":
        raise UsageError("--adapter_type lokr needs the base unquantised; leave --base_quantization out, or use lora.")
    if args.torch_compile and (args.use_dora or args.adapter_type == "lokr"):
        raise UsageError(
            "--torch_compile is for LoRA and rsLoRA (peft's layers of DoRA and LoKr can't be compiled as a whole); "
            "leave it out."
        )
