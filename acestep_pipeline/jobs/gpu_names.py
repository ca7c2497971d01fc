"""How the vendors spell GPUs. Their tools take any text, and find out when the machine is asked for: here a name that
is none is refused at once, with the one that was probably meant."""

import difflib
import re

from ..errors import UsageError

# vendor: name -> most of them in one machine. Sources: modal.com/docs/guide/gpu; of SkyPilot 0.14 the catalog's
# fetchers (fetch_lambda_cloud.py, fetch_runpod.py), whose counts are those of the vendors' machines.
VENDORS: dict[str, dict[str, int]] = {
    "modal": {
        "T4": 8, "L4": 8, "A10": 4, "A10G": 4, "L40S": 8, "A100": 8, "A100-40GB": 8, "A100-80GB": 8,
        "RTX-PRO-6000": 8, "H100": 8, "H100!": 8, "H200": 8, "B200": 8, "B200+": 8,
    },
    "lambda": {
        "A100": 8, "A100-80GB": 8, "A6000": 4, "A10": 4, "RTX6000": 1, "V100": 8, "H100": 8, "GH200": 1, "B200": 8,
    },
    "runpod": {
        "A100-80GB": 8, "A100-80GB-SXM": 8, "A30": 8, "A40": 10, "B200": 8, "H100": 8, "H100-NVL": 8, "H100-SXM": 8,
        "H200-SXM": 8, "L4": 8, "L40": 8, "L40S": 8, "RTX2000-Ada": 8, "RTX3090": 8, "RTX4000-Ada": 8, "RTX4090": 8,
        "RTX5000-Ada": 8, "RTX5090": 8, "RTX6000-Ada": 8, "RTXA4000": 8, "RTXA4500": 8, "RTXA5000": 8, "RTXA6000": 8,
        "RTXPRO6000": 8, "V100-SXM2": 8,
    },
}  # fmt: skip


def check_gpu(vendor: str, gpu: str) -> str:
    """A GPU as its vendor spells it, such as `H100` or `H100:2`; returns it.

    Raises:
        UsageError: the vendor has none of this name, or not so many in one machine.
    """
    known = VENDORS[vendor]
    name, colon, count = gpu.partition(":")
    if name not in known:
        alike = {_plain(one): one for one in reversed(known)}
        close = difflib.get_close_matches(_plain(name), alike, 1)
        hint = f"did you mean {alike[close[0]]}? " if close else ""
        raise UsageError(f"{vendor} has no GPU {gpu!r}; {hint}It has: {', '.join(known)}.")
    if colon and not (re.fullmatch(r"[1-9]\d?", count) and int(count) <= known[name]):
        raise UsageError(f"{vendor} has 1 to {known[name]} {name} in a machine, not {count!r}.")
    return gpu


def _plain(name: str) -> str:
    """Without case, separators, and the letters that are taken for digits."""
    return re.sub(r"[^A-Z0-9]", "", name.upper().replace("O", "0").replace("I", "1"))
