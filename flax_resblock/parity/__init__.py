"""Runs a network in PyTorch and in Flax side by side, compares every tensor, and explains any
difference in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax_resblock.parity.api import Verification, compare
    from flax_resblock.parity.comparison import Plan
    from flax_resblock.parity.diagnose import Diagnosis
    from flax_resblock.parity.oracle import Comparison

__all__ = ["Comparison", "Diagnosis", "Plan", "Verification", "compare"]

_HOMES = {
    "Comparison": "oracle",
    "Diagnosis": "diagnose",
    "Plan": "comparison",
    "Verification": "api",
    "compare": "api",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, because all of them need PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
