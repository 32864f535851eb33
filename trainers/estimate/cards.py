"""GPUs by name: what memory they have for a job, and how fast they multiply.

Memory is what CUDA reports as a device's total, in GiB, which is a little less than the name says. Peaks are dense bf16
with fp32 accumulation, without sparsity, and fp32 without TF32 (torch's default), in TFLOP/s, from the vendor's data
sheets: "NVIDIA A100 Tensor Core GPU", "NVIDIA H100 Tensor Core GPU", "NVIDIA H200 Tensor Core GPU", "NVIDIA L40S",
"NVIDIA Ada GPU Architecture" (RTX 4090), "NVIDIA Ampere GA102 GPU Architecture" (RTX 3090); H20 as its vendors list it.
"""

from dataclasses import dataclass

import psutil

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A device that a process trains on.

    Args:
        name: for people.
        memory: bytes that a process can use.
        flops, wide_flops: peak of dense multiplications in bf16 and in fp32, FLOP/s; None where it is not known.
        cpu: the host itself, whose memory its processes share.
    """

    name: str
    memory: int
    flops: float | None = None
    wide_flops: float | None = None
    cpu: bool = False


KNOWN = {  # GiB, TFLOP/s in bf16 and in fp32
    "a100-40": (39.4, 312.0, 19.5),
    "a100-80": (79.2, 312.0, 19.5),
    "h100": (79.1, 989.4, 66.9),
    "h100-pcie": (79.1, 756.0, 51.2),
    "h200": (139.8, 989.4, 66.9),
    "h20": (95.1, 148.0, 44.0),
    "l40s": (44.4, 362.0, 91.6),
    "rtx4090": (23.5, 165.2, 82.6),
    "rtx3090": (23.5, 71.0, 35.6),
}
_ALSO = {
    "a100": "a100-80",
    "h100-80": "h100",
    "h200-141": "h200",
    "h20-96": "h20",
    "4090": "rtx4090",
    "rtx-4090": "rtx4090",
    "3090": "rtx3090",
    "rtx-3090": "rtx3090",
}


def named(name: str) -> Card:
    """The card of this name; `cpu` is this machine's processors and memory.

    Raises:
        ValueError: for a name that is not in the table.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key == "cpu":
        return Card("CPU", psutil.virtual_memory().total, cpu=True)
    key = _ALSO.get(key, key)
    if key not in KNOWN:
        raise ValueError(f"--gpu {name}: not in the table ({', '.join([*KNOWN, 'cpu'])}); or give --gpu_memory GIB")
    gib, tflops, wide = KNOWN[key]
    return Card(key.upper(), int(gib * GIB), tflops * 1e12, wide * 1e12)


def sized(gib: float) -> Card:
    """An unknown card of so many GiB: its speed is not known either."""
    if gib <= 0:
        raise ValueError(f"--gpu_memory must be positive, got {gib}")
    return Card(f"card of {gib:g} GiB", int(gib * GIB))
