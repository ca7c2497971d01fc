"""Which configurations a benchmark with a suite for CPUs and one for GPUs runs."""

from collections.abc import Collection, Sequence

from acestep_pipeline.errors import UsageError
from acestep_pipeline.hardware import default_device


def choose_suite(asked: str | None, *, rehearsed: bool, rehearsal: str) -> str:
    """The suite that was asked for, "cpu" or "gpu", or else that of this machine.

    Raises:
        UsageError: there is no GPU for that of GPUs, and it is not `rehearsed`, which the flag `rehearsal` does.
    """
    has_gpu = default_device().type == "cuda"
    suite = asked or ("gpu" if has_gpu else "cpu")
    if suite == "gpu" and not has_gpu and not rehearsed:
        raise UsageError(f"the GPU suite needs a CUDA device; {rehearsal} rehearses it on a CPU.")
    return suite


def check_stages(asked: Sequence[str] | None, stages: Collection[str], suite: str) -> None:
    """Raise `UsageError` if a stage was asked for that the suite does not have."""
    if unknown := set(asked or ()) - set(stages):
        raise UsageError(f"--stages {', '.join(sorted(unknown))}: the {suite} suite has {', '.join(stages)}.")
