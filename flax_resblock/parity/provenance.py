"""Where a verification comes from: what was compared, with which versions, on which devices, how
long it took.
"""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import jax
import numpy as np

from flax_resblock.checkpoint.record import digest, digests
from flax_resblock.config import name_of
from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.parity.certificate import REFERENCE
from flax_resblock.parity.devices import describe
from flax_resblock.parity.parts import Devices
from flax_resblock.parity.user_module import Case
from flax_resblock.parity.versions import versions

PACKAGES = ("jax", "jaxlib", "flax", "torch", "numpy")


def of_source(source: OpenedCheckpoint) -> dict[str, Any]:
    """What is known of a checkpoint."""
    name = name_of(source.config)
    tensors = digests(source.tensors)
    return {
        "subject": name,
        "compared_with": REFERENCE,
        "checkpoint": source.record.source,
        "checkpoint_sha256": _combined(tensors),
        "sha256": tensors,
        "architecture": name,
        "naming": source.state_map.naming.name,
    }


def of_module(case: Case) -> dict[str, Any]:
    """What is known of a person's own module."""
    return {
        "subject": case.title,
        "compared_with": f"your module {case.title}",
        "architecture": name_of(case.config),
        "naming": case.naming,
        "sha256": {k: digest(v) for k, v in case.state.items()},
    }


def _combined(tensors: Mapping[str, str]) -> str:
    """One digest over the names and digests of all tensors."""
    return hashlib.sha256(
        "".join(f"{name}\0{value}\n" for name, value in sorted(tensors.items())).encode()
    ).hexdigest()


class Clock:
    """Started before a verification, asked after it."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def facts(self, images: np.ndarray, seed: int, devices: Devices) -> dict[str, Any]:
        """Input, devices, versions, time and memory; the peak is that of the whole process so
        far.
        """
        batch, *shape = images.shape
        size: dict[str, Any] = (
            dict(zip(("height", "width", "channels"), shape, strict=False))
            if len(shape) == 3
            else {"shape": shape}
        )
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            "command": " ".join(["flax-resblock", *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(PACKAGES),
            "devices": {
                "jax": describe(devices.jax or jax.devices()[0]),
                "torch": str(devices.torch),
                "oracle": "cpu",
            },
            "input": {"batch": batch, **size, "seed": seed},
            "seconds": round(time.perf_counter() - self.start, 1),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        }
