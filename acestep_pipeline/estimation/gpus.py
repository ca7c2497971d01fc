"""GPUs: memory, dense matrix throughput and memory bandwidth, to one or two figures as their makers publish them.

They were written down without the publications at hand, so check one before much depends on it. Compared since with
tables that others publish, and found equal: all of A40 and H100 SXM; float32 and bandwidth of RTX 3060 12GB and A10;
the bandwidth of RTX 5080, RTX 5090, RTX A4000, L4 and L40S.
"""

import re
from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as its maker spells it.
        memory_gb: its nominal memory, in GiB.
        bf16_tflops: dense bfloat16 tensor-core throughput with float32 accumulation; None where it has none (training
            then runs in float32).
        fp32_tflops: float32 throughput outside the tensor cores.
        bandwidth_gb_s: memory bandwidth, 10^9 bytes a second.
        host_gb_s: what its PCI Express link carries in one direction, 10^9 bytes a second.
        source: the publication to check the figures against.
        measured: whether the figures are rates that were reached in a measurement (`this_machine.measure`), of which
            no share is taken off.
    """

    name: str
    memory_gb: float
    bf16_tflops: float | None
    fp32_tflops: float
    bandwidth_gb_s: float
    host_gb_s: float
    source: str
    measured: bool = False


_AMPERE, _ADA = "NVIDIA Ampere GA102 whitepaper", "NVIDIA Ada whitepaper"
_AMPERE_SPEC, _ADA_SPEC = "NVIDIA's specification page, whitepaper ratios", "NVIDIA's specification page, Ada ratios"
_BLACKWELL = "NVIDIA RTX Blackwell whitepaper"
# PCI Express by generation and lanes, 128b/130b encoding taken off (PCI-SIG's specifications).
_GEN3_X16, _GEN4_X8, _GEN4_X16, _GEN5_X16 = 15.8, 15.8, 31.5, 63.0
# Figures published with structured sparsity are halved here. GeForce cards multiply bfloat16 with float32 accumulation
# at twice their float32 rate.
GPUS = (
    Gpu("RTX 3060 12GB", 12, 25.6, 12.7, 360, _GEN4_X16, _AMPERE_SPEC),
    Gpu("RTX 3070 8GB", 8, 40.6, 20.3, 448, _GEN4_X16, _AMPERE),
    Gpu("RTX 3080 10GB", 10, 59.5, 29.8, 760, _GEN4_X16, _AMPERE),
    Gpu("RTX 3090 24GB", 24, 71.0, 35.6, 936, _GEN4_X16, _AMPERE),
    Gpu("RTX 4060 8GB", 8, 30.2, 15.1, 272, _GEN4_X8, _ADA_SPEC),
    Gpu("RTX 4060 Ti 16GB", 16, 44.1, 22.1, 288, _GEN4_X8, _ADA_SPEC),
    Gpu("RTX 4070 12GB", 12, 58.3, 29.1, 504, _GEN4_X16, _ADA_SPEC),
    Gpu("RTX 4080 16GB", 16, 97.5, 48.7, 717, _GEN4_X16, _ADA),
    Gpu("RTX 4090 24GB", 24, 165.2, 82.6, 1008, _GEN4_X16, _ADA),
    Gpu("RTX 5080 16GB", 16, 112.6, 56.3, 960, _GEN5_X16, _BLACKWELL),
    Gpu("RTX 5090 32GB", 32, 209.5, 104.8, 1792, _GEN5_X16, _BLACKWELL),
    Gpu("RTX A4000 16GB", 16, 76.7, 19.2, 448, _GEN4_X16, "NVIDIA RTX A4000 datasheet"),
    Gpu("RTX A5000 24GB", 24, 111.1, 27.8, 768, _GEN4_X16, "NVIDIA RTX A5000 datasheet"),
    Gpu("RTX A6000 48GB", 48, 154.8, 38.7, 768, _GEN4_X16, "NVIDIA RTX A6000 datasheet"),
    Gpu("T4 16GB", 16, None, 8.1, 320, _GEN3_X16, "NVIDIA T4 datasheet"),
    Gpu("A10 24GB", 24, 125.0, 31.2, 600, _GEN4_X16, "NVIDIA A10 datasheet"),
    Gpu("A40 48GB", 48, 149.7, 37.4, 696, _GEN4_X16, "NVIDIA A40 datasheet"),
    Gpu("L4 24GB", 24, 121.0, 30.3, 300, _GEN4_X16, "NVIDIA L4 datasheet"),
    Gpu("L40S 48GB", 48, 362.0, 91.6, 864, _GEN4_X16, "NVIDIA L40S datasheet"),
    Gpu("A100 40GB", 40, 312.0, 19.5, 1555, _GEN4_X16, "NVIDIA A100 datasheet"),
    Gpu("A100 80GB", 80, 312.0, 19.5, 2039, _GEN4_X16, "NVIDIA A100 datasheet"),
    Gpu("H100 PCIe 80GB", 80, 756.0, 51.0, 2000, _GEN5_X16, "NVIDIA H100 datasheet"),
    Gpu("H100 SXM 80GB", 80, 989.0, 67.0, 3350, _GEN5_X16, "NVIDIA H100 datasheet"),
    Gpu("H200 141GB", 141, 989.0, 67.0, 4800, _GEN5_X16, "NVIDIA H200 datasheet"),
    Gpu("B200 180GB", 180, 2250.0, 75.0, 8000, _GEN5_X16, "NVIDIA DGX B200 datasheet"),
)


def _words(name: str) -> list[str]:
    """`"NVIDIA GeForce RTX 3060 12 GB"` -> `["rtx", "3060", "12gb"]`."""
    text = re.sub(r"(\d)\s+gb\b", r"\1gb", name.lower().replace("-", " ").replace("_", " "))
    text = re.sub(r"\b(rtx|gtx)(\d)", r"\1 \2", text)
    return [word for word in text.split() if word not in ("nvidia", "geforce", "tesla", "gpu")]


def find_gpu(name: str) -> Gpu:
    """The GPU that `name` means: words in any order and case, as many as tell it apart; `h100` is the SXM one.

    Raises:
        UsageError: none or several are meant; the message lists them.
    """
    wanted = _words(name)
    found = [gpu for gpu in GPUS if wanted and all(word in _words(gpu.name) for word in wanted)]
    # "3060" has no other words, "rtx 4060" is not the Ti unless that is said.
    found = [gpu for gpu in found if ("ti" in _words(gpu.name)) == ("ti" in wanted)] or found
    if len(found) > 1 and wanted == ["h100"]:
        found = [gpu for gpu in found if "SXM" in gpu.name]
    if len(found) == 1:
        return found[0]
    which = ", ".join(gpu.name for gpu in found or GPUS)
    raise UsageError(
        f"--gpu {name!r} is {'more than one' if found else 'none'} of the known GPUs; give one of: {which}."
    )
