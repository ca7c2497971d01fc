"""What the processes of a run tell each other outside the loop: who does which work, and that inputs are the same."""

import functools
import os
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch

from ..errors import UsageError

# In the loop: the main process alone writes checkpoints and generates samples, the others wait for it.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Before the loop, where one process may have hours more to encode than another. A process that died is noticed at
# once all the same: gloo sees its connection close.
PATIENCE = timedelta(days=7)


def local_place() -> tuple[int, int]:
    """This process's index on its machine, and the number of processes there."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def share(items: list, index: int, count: int, *, neighbours: bool) -> list:
    """One of `count` parts of `items`, all as large, within one: of neighbours, or else of every `count`-th item."""
    if neighbours:
        return items[len(items) * index // count : len(items) * (index + 1) // count]
    return items[index::count]


def gather_lists(items: list) -> list:
    """The items of every process, in the order of processes; each may come to it hours after another."""
    if not torch.distributed.is_initialized():
        return items
    gathered: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, items, group=_patient_group())
    return [item for own in gathered for item in own]


@functools.cache
def _patient_group() -> torch.distributed.ProcessGroup:
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def check_same_everywhere(values: Mapping[str, object]) -> None:
    """Compare `values` (what is compared, in words -> what this process has) over all processes.

    Raises:
        UsageError: on every process alike; names the first that differs, and in what.
    """
    (_, first), *others = everyone = gather_lists([(socket.gethostname(), dict(values))])
    for process, (host, own) in enumerate(others, start=1):
        for name in values:
            if own[name] != first[name]:
                raise UsageError(
                    f"{name} is not the same everywhere: {own[name]} for process {process} on {host}, "
                    f"{first[name]} for process 0 on {everyone[0][0]}. Give every machine the same files and flags."
                )
