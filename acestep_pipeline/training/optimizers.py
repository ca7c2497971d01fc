"""Which optimizers there are: one table. It imports none of them, so that a command line is checked quickly."""

import importlib.util
from dataclasses import dataclass, field

from ..errors import UsageError

DEFAULT_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class OptimizerKind:
    """One value of `--optimizer`.

    Attributes:
        constructor: where its class is (`module.Class`), called with `params, lr, betas, eps, weight_decay`.
        package: what has to be installed beside torch, if anything.
        extra: the extra of setup.cfg that installs it.
        learning_rate: the peak learning rate where `--learning_rate` was not given; None: the preset's.
        options: further arguments of the constructor.
        averages: it is schedule-free: it does its own warm-up and takes no decaying schedule, and between
            `optimizer.eval()` and `optimizer.train()` the parameters are the averages that are to be used.
        fused: it has one kernel for all parameters on CUDA.
        state_bytes: what it remembers of each parameter, in bytes.
    """

    constructor: str
    package: str | None = None
    extra: str | None = None
    learning_rate: float | None = None
    options: dict = field(default_factory=dict)
    averages: bool = False
    fused: bool = False
    state_bytes: float = 8.0


# Prodigy's options are those that its authors recommend for diffusion models (prodigyopt's README).
OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim.AdamW", fused=True),
    "adamw_8bit": OptimizerKind("bitsandbytes.optim.AdamW8bit", "bitsandbytes", "8bit", state_bytes=2 + 8 / 256),
    "paged_adamw_8bit": OptimizerKind("bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes", "8bit",
                                      state_bytes=2 + 8 / 256),
    "prodigy": OptimizerKind("prodigyopt.Prodigy", "prodigyopt", "prodigy", learning_rate=1.0,
                             options={"use_bias_correction": True, "safeguard_warmup": True}, state_bytes=16.0),
    "schedulefree_adamw": OptimizerKind("acestep_pipeline.training.schedule_free.AdamWScheduleFree", "schedulefree",
                                        "schedulefree", averages=True),
}  # fmt: skip


def check_optimizer(name: str, *, lr_scheduler: str) -> None:
    """Refuse an optimizer that there isn't, that isn't installed, or that does not go with the schedule.

    Raises:
        UsageError: names the choices, the extra to install, or the schedules that work.
    """
    kind = OPTIMIZERS.get(name)
    if kind is None:
        raise UsageError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}.")
    if kind.package and importlib.util.find_spec(kind.package) is None:
        raise UsageError(f"--optimizer {name} needs an extra: pip install 'ace-step-lora[{kind.extra}]'.")
    if kind.averages and lr_scheduler not in ("constant", "constant_with_warmup"):
        raise UsageError(
            f"--optimizer {name} replaces the schedule; use --lr_scheduler constant_with_warmup or constant with it, "
            f"not {lr_scheduler}."
        )


def default_learning_rate(name: str) -> float | None:
    """The rate of an optimizer for which one that was meant for AdamW means nothing; None for the others."""
    kind = OPTIMIZERS.get(name.lower())
    return kind.learning_rate if kind else None


def describe_optimizer(name: str, *, learning_rate: float) -> str:
    """Name and rate, for a person."""
    own = " (its own default)" if learning_rate == default_learning_rate(name) else ""
    return f"{name}, learning rate {learning_rate:g}{own}"


def choose_eight_bit(name: str) -> str:
    """What diffusers' `--use_8bit_adam` makes of `--optimizer`.

    Raises:
        UsageError: the optimizer is not AdamW.
    """
    if name == "adamw":
        return "adamw_8bit"
    if name in ("adamw_8bit", "paged_adamw_8bit"):
        return name
    raise UsageError(f"--use_8bit_adam is for AdamW and --optimizer says {name}; give one of them.")
