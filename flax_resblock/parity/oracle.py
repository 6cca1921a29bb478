"""When two tensors count as identical.

float64: relative difference at most 1e-12, which proves that the algorithms are the same. Lower
  precisions: the error against the float64 truth is at most
four times PyTorch's own error, or 8 ulp; PyTorch's rounding is the yardstick, not an invented
tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOAT64_LIMIT = 1e-12
"""Largest relative L2 difference between two float64 computations of the same thing."""

TRAJECTORY_LIMIT = 1e-10
"""The same after several training steps, each of which carries the rounding of the one before."""

TORCH_FACTOR = 4.0
"""How many times PyTorch's own error the Flax error may be in reduced precision."""

ULPS = 8
"""Or how many units in the last place of the precision at hand."""


@dataclass(frozen=True)
class Judgement:
    """One tensor, judged.

    Attributes:
      error: Relative L2 error of the Flax tensor. Under a :class:`Tolerance` the largest ``|flax -
        torch| / (atol + rtol |torch|)``.
      reference_error: PyTorch's own relative L2 error in the same precision; 0 in float64, where
        PyTorch is the truth.
      limit: What ``error`` had to stay within.
      ulp: The relative L2 error in units in the last place of the precision.
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


@dataclass(frozen=True)
class Tolerance:
    """A person's own criterion instead of the oracle's: every element within ``atol + rtol
    |torch|``, as ``numpy.allclose`` has it.
    """

    rtol: float
    atol: float

    def excess(self, flax: np.ndarray, torch: np.ndarray) -> float:
        """The largest ``|flax - torch| / (atol + rtol |torch|)``; infinite where shapes or
        non-finite values differ.
        """
        flax, torch = np.asarray(flax, np.float64), np.asarray(torch, np.float64)
        if flax.shape != torch.shape:
            return float("inf")
        allowed, difference = self.atol + self.rtol * np.abs(torch), np.abs(flax - torch)
        same = (flax == torch) | (np.isnan(flax) & np.isnan(torch))
        with np.errstate(all="ignore"):
            ratios = np.where(same, 0.0, difference / allowed)
        return float(np.max(np.where(np.isfinite(ratios), ratios, np.inf), initial=0.0))


def relative_l2(value: np.ndarray, truth: np.ndarray) -> float:
    """``|value - truth| / |truth|`` in float64, L2 over the whole tensor.

    Args:
      value, truth: Same shape. Infinite when the shapes differ, or where one is finite (or of
        another sign of infinity) and the other not.
    """
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    if value.shape != truth.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        difference = value - truth
    distance, scale = float(np.linalg.norm(difference)), float(np.linalg.norm(truth))
    if not np.isfinite(distance):  # rare, and slower
        finite = np.isfinite(truth)
        if not np.array_equal(finite, np.isfinite(value)) or not np.array_equal(
            value[~finite], truth[~finite], equal_nan=True
        ):
            return float("inf")
        distance, scale = (
            float(np.linalg.norm(difference[finite])),
            float(np.linalg.norm(truth[finite])),
        )
    if distance == 0.0:
        return 0.0
    return distance / scale if scale else float("inf")


def judge(
    error: float, reference_error: float, epsilon: float, *, limit64: float = FLOAT64_LIMIT
) -> Judgement:
    """Judges a relative L2 error of Flax against PyTorch's own.

    Args:
      error, reference_error: Against PyTorch's float64 value, in the precision at hand; in float64
        the second does not count.
      epsilon: Machine epsilon of the precision (distance from 1 to the next number).
      limit64: Limit in float64; trajectories have a wider one.
    """
    if epsilon < 1e-12:
        return Judgement(error, 0.0, limit64, error / epsilon)
    return Judgement(
        error, reference_error, max(TORCH_FACTOR * reference_error, ULPS * epsilon), error / epsilon
    )
