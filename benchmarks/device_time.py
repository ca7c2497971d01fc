"""Time on a device, which may be behind the program that it works for: marks, and the phases of an update."""

import time

import torch

PHASES = ("data", "forward", "backward", "optimizer", "other")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def mark(device: torch.device):
    """Now, in the device's own stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(before, after) -> float:
    """Seconds between two marks, after `synchronize`."""
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000


class PhaseClock:
    """Adds up the seconds of the phases of an update. While it is off it does nothing; while it is on, the device
    finishes each phase before the next begins."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on, self.seconds = device, False, dict.fromkeys(PHASES, 0.0)

    def ended(self, phase: str) -> None:
        """`phase` has ended, and the next begins."""
        if self.on:
            synchronize(self.device)
            now = time.perf_counter()
            self.seconds[phase] += now - self._since
            self._since = now

    def start(self) -> None:
        """Switch it on, from here."""
        synchronize(self.device)
        self.on, self._since = True, time.perf_counter()
