"""What `accelerate launch` asks for, read from the environment that it sets."""

import os

from ..errors import UsageError

# What a configuration of accelerate sets to "true" -> what it asks for.
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def check_launch() -> None:
    """Refuse launchers that this program does not train under.

    Raises:
        UsageError: the configuration divides the model over processes, which would be trained or saved wrongly.
    """
    for name, kind in SHARDED.items():
        if os.environ.get(name, "").lower() in ("true", "1"):
            raise UsageError(
                f"the accelerate configuration asks for {kind}, which this program does not train under yet; use DDP "
                "(examples/accelerate_configs/ddp.yaml), with a vram_ preset if memory is short."
            )
