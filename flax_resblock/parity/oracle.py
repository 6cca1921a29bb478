"""When two tensors count as identical.

float64: relative difference at most 1e-12, which proves that the algorithms are the same. Lower precisions: the error against the float64 truth is at most
four times PyTorch's own error, or 8 ulp; PyTorch's rounding is the yardstick, not an invented tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOAT64_LIMIT = 1e-12
"""Largest relative L2 difference between two float64 computations of the same thing."""

TORCH_FACTOR = 4.0
"""How many times PyTorch's own error the Flax error may be in reduced precision."""

ULPS = 8
"""Or how many units in the last place of the precision at hand."""


@dataclass(frozen=True)
class Judgement:
    """One tensor, judged.

    Attributes:
      error: Relative L2 error of the Flax tensor.
      reference_error: PyTorch's own relative L2 error in the same precision; 0 in float64, where PyTorch is the truth.
      limit: What ``error`` had to stay within.
      ulp: ``error`` in units in the last place of the precision.
    """

    error: float
    reference_error: float
    limit: float
    ulp: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit (NaN is not)."""
        return self.error <= self.limit

    @property
    def excess(self) -> float:
        """Error in units of the limit: above 1 it failed."""
        return self.error / self.limit if self.limit else float("inf") if self.error else 0.0


def relative_l2(value: np.ndarray, truth: np.ndarray) -> float:
    """``|value - truth| / |truth|`` in float64, L2 over the whole tensor.

    Args:
      value, truth: Same shape. Infinite when the shapes differ, or where one is finite (or of another sign of infinity) and the other not.
    """
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    if value.shape != truth.shape:
        return float("inf")
    finite = np.isfinite(truth)
    if not np.array_equal(finite, np.isfinite(value)) or not np.array_equal(value[~finite], truth[~finite], equal_nan=True):
        return float("inf")
    difference = float(np.linalg.norm((value - truth)[finite]))
    scale = float(np.linalg.norm(truth[finite]))
    if difference == 0.0:
        return 0.0
    return difference / scale if scale else float("inf")


def judge(flax: np.ndarray, torch: np.ndarray, truth: np.ndarray, epsilon: float, *, limit64: float = FLOAT64_LIMIT) -> Judgement:
    """Judges a Flax tensor against PyTorch's.

    Args:
      flax, torch: The same quantity in both frameworks, in the precision at hand.
      truth: PyTorch's float64 value. In float64 the same array as ``torch``.
      epsilon: Machine epsilon of the precision (distance from 1 to the next number).
      limit64: Limit in float64; trajectories have a wider one.
    """
    error = relative_l2(flax, truth)
    if epsilon < 1e-12:
        return Judgement(error, 0.0, limit64, error / epsilon)
    reference = relative_l2(torch, truth)
    return Judgement(error, reference, max(TORCH_FACTOR * reference, ULPS * epsilon), error / epsilon)
