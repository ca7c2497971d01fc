"""The flagship script with so little memory that one window trains and several at once don't.

The limit is the kernel's, on this process's address space, and set when the first forward pass is about to run: just
above what forward and backward passes of one window were found to need.
"""

import os
import resource
import sys

import psutil
import torch

import train_ace_step_lora

MIB = 2**20
squared_error = train_ace_step_lora.squared_error


def address_space() -> int:
    return psutil.Process().memory_info().vms


def limit(headroom: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + headroom, resource.RLIM_INFINITY))


def fits(windows: int, headroom: int, model, batch: dict, *rest) -> bool:
    """Whether forward and backward passes of the batch's first windows work with so much more memory."""
    limit(headroom)
    try:
        squared_error(model, {name: tensor[:windows] for name, tensor in batch.items()}, *rest).backward()
    except (RuntimeError, MemoryError):
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)  # Python itself may need some here
        model.zero_grad()
    return True


def needed(windows: int, *inputs) -> int:
    """The least headroom, in steps of a quarter of a MiB, with which so many windows fit."""
    return next(size for size in range(0, 64 * MIB, MIB // 4) if fits(windows, size, *inputs))


def limited(model, batch, *rest, **named):
    """Find the limit once, between what one window needs and what all of them need; then do what the script does."""
    if not torch.is_grad_enabled():  # it measures
        return squared_error(model, batch, *rest, **named)
    train_ace_step_lora.squared_error = squared_error
    if os.environ.get("RANK", "0") == os.environ["LIMITED_RANK"]:
        one, all_of_them = (needed(windows, model, batch, *rest) for windows in (1, len(batch["sigmas"])))
        print(f"one window needs {one / MIB} MiB more, all of them {all_of_them / MIB} MiB", flush=True)
        limit((one + all_of_them) // 2)
    return squared_error(model, batch, *rest)


if __name__ == "__main__":
    train_ace_step_lora.squared_error = limited
    torch.backends.mkldnn.enabled = False  # oneDNN says of a lack of memory that it "could not create a primitive"
    train_ace_step_lora.train(train_ace_step_lora.arguments.parse_args(sys.argv[1:]))
