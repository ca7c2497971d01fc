"""How many items an update has, and how many of them a forward pass takes."""

from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class BatchSize:
    """`effective` items in an update over all processes, at most `micro` of them in one forward pass on a process."""

    effective: int
    micro: int

    def describe(self, num_processes: int) -> str:
        """What was chosen, for a person."""
        passes = -(-self.effective // (self.micro * num_processes))
        where = f" on each of {num_processes} processes" if num_processes > 1 else ""
        text = f"{self.effective} windows an update, up to {self.micro} of one length in a forward pass{where}"
        if passes > 1:
            text += f", {passes} passes accumulated"
        idle = num_processes - self.effective
        if idle > 0:
            text += f"; {idle} processes have nothing to do (--effective_batch_size {num_processes} would use them)"
        return text


def choose_batch_size(
    *,
    effective_batch_size: int | None,
    train_batch_size: int | None,
    gradient_accumulation_steps: int | None,
    num_processes: int,
) -> BatchSize:
    """The batch that three flags ask for, any of which may be None.

    `train_batch_size` items × `gradient_accumulation_steps` passes × `num_processes` make an update. Without the
    first two an update of `effective_batch_size` is divided into as few passes as there are processes; without the
    last it is the product, where what is missing counts 1.

    Raises:
        UsageError: the three contradict each other.
    """
    micro, accumulation = train_batch_size, gradient_accumulation_steps
    if effective_batch_size is None:
        micro = micro or 1
        return BatchSize(micro * (accumulation or 1) * num_processes, micro)
    share = -(-effective_batch_size // num_processes)
    if accumulation is not None:
        micro = micro or max(1, effective_batch_size // (accumulation * num_processes))
        if micro * accumulation * num_processes != effective_batch_size:
            raise UsageError(
                f"--effective_batch_size {effective_batch_size} is not --train_batch_size {micro} × "
                f"--gradient_accumulation_steps {accumulation} × {num_processes} processes; leave one of them out."
            )
    return BatchSize(effective_batch_size, min(micro or share, share))
