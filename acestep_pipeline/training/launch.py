"""What `accelerate launch` asks for, read from the environment that it sets."""

import importlib.util
import os

from ..errors import UsageError


def is_first_process() -> bool:
    """Whether this is the process of a run that writes and publishes; known before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def uses_fsdp() -> bool:
    """Whether the launcher asked for FSDP."""
    return _flag("ACCELERATE_USE_FSDP")


def uses_deepspeed() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return _flag("ACCELERATE_USE_DEEPSPEED")


def check_launch(*, mixed_precision: str, optimizer: str) -> None:
    """Refuse what the accelerate configuration asks for and this program can't do.

    Raises:
        UsageError: names the setting in the configuration file, and what to set instead.
    """
    if _flag("ACCELERATE_USE_MEGATRON_LM"):
        _refuse("asks for Megatron-LM", "use FSDP2 (examples/accelerate_configs/fsdp2.yaml) or DDP (ddp.yaml)")
    if _flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        _refuse("has a parallelism_config", "leave it out")
    if uses_fsdp():
        _check_fsdp()
    if uses_deepspeed():
        _check_deepspeed(optimizer)
    if mixed_precision == "fp16" and (uses_fsdp() or uses_deepspeed()):
        raise UsageError("--mixed_precision fp16 does not go with FSDP and DeepSpeed; use bf16, or DDP.")


def _check_fsdp() -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        _refuse("asks for FSDP 1", "set fsdp_version: 2 in its fsdp_config, as fsdp2.yaml does")
    if _flag("FSDP_OFFLOAD_PARAMS"):
        _refuse("offloads parameters to the CPU", "set fsdp_offload_params: false")
    if _flag("FSDP_ACTIVATION_CHECKPOINTING"):
        _refuse("asks for activation checkpointing", "leave it to --gradient_checkpointing")


def _check_deepspeed(optimizer: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError("the accelerate configuration needs an extra: pip install 'ace-step-lora[deepspeed]'.")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage != "2":
        _refuse(f"asks for ZeRO stage {stage}", "set zero_stage: 2, or divide the model by FSDP2 (fsdp2.yaml)")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        _refuse(
            "names a deepspeed_config_file", "set zero_stage: 2 in its deepspeed_config, as deepspeed_zero2.yaml does"
        )
    if os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none":
        _refuse("offloads the optimizer", "set offload_optimizer_device: none")
    if optimizer != "adamw":
        raise UsageError(
            f"--optimizer {optimizer} does not go with DeepSpeed, which divides its state; use adamw, FSDP2 or DDP."
        )


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes", "on")


def _refuse(what: str, instead: str) -> None:
    raise UsageError(f"the accelerate configuration {what}, which this program does not train under; {instead}.")
