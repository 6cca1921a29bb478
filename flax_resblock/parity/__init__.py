"""Runs a network in PyTorch and in Flax side by side, compares every tensor, and explains any
difference in words. Names are imported on first use, because all of them need PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flax_resblock._lazy import lazily

if TYPE_CHECKING:
    from flax_resblock.parity.api import Verification, compare
    from flax_resblock.parity.comparison import Plan
    from flax_resblock.parity.diagnose import Diagnosis
    from flax_resblock.parity.oracle import Comparison

__all__ = ["Comparison", "Diagnosis", "Plan", "Verification", "compare"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "api": "Verification compare",
        "comparison": "Plan",
        "diagnose": "Diagnosis",
        "oracle": "Comparison",
    },
)
