"""What the data sheets say of chips, and of the networks that join them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roofline import Device, Network

Figures = Mapping[str, Any]

MXU_PASSES = 6
"""Products of bfloat16 that make one of float32 on a TPU, at precision highest."""

_V5E_PEAKS = {"float32": 197e12 / MXU_PASSES, "bfloat16": 197e12}
_V5E_SOURCE = "Google Cloud, system architecture of TPU v5e"
V5E = Device("TPU v5e", _V5E_PEAKS, 819e9, 16e9, _V5E_SOURCE)
_H100_PEAKS = {"float32": 66.9e12, "TF32": 494.7e12, "bfloat16": 989.4e12}
_H100_SOURCE = "NVIDIA, H100 data sheet and architecture paper, no sparsity"
H100 = Device("H100 SXM", _H100_PEAKS, 3.35e12, 80e9, _H100_SOURCE)
BOTH = ("float32", "bfloat16")
PER_HOST = {"v5e": 8, "h100": 8}
NETWORKS: tuple[tuple[str, tuple[str, ...], Network], ...] = (
    ("v5e", BOTH, Network("ICI, 2 of a chip's 4 links", 256, 100e9, 1e-6, torus=True)),
    ("h100", BOTH, Network("NVLink, 400 Gb/s InfiniBand per GPU", 8, 450e9, 2e-6, 8 * 50e9, 5e-6)),
    ("h100", BOTH, Network("NVLink, 100 Gb/s Ethernet per host", 8, 450e9, 2e-6, 12.5e9, 20e-6)),
    ("cpu", ("float32",), Network("100 Gb/s Ethernet", 1, 1, 0, 12.5e9, 20e-6)),
)
"""What joins which device, and the arithmetic of interest. Bandwidths are those of the data sheets,
in one direction; latencies are assumed, to their order of magnitude."""
CHIPS = (8, 64, 256)


def devices(figures: Figures) -> dict[str, Device]:
    """The three devices; the roofs of the CPU are the measured ones."""
    machine, measured = figures["machine"], figures["measured"]
    roofs = measured["products"], measured["copy"], machine["memory"]
    return {
        "v5e": V5E,
        "h100": H100,
        "cpu": Device("this CPU", *roofs, "measured here, two threads"),
    }
