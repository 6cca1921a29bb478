"""When two tensors count as identical, and the results of a comparison.

float64: relative difference at most 1e-12, which proves that the algorithms are the same. Lower
precisions: the error against the float64 truth is at most four times PyTorch's own error, or 8 ulp.
PyTorch's rounding is the yardstick, not an invented tolerance."""

from __future__ import annotations

from collections.abc import Iterator
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
class Verdict:
    """Whether one tensor of the Flax side is equal to PyTorch's, with the figures.

    Attributes:
      error: Relative L2 error of the Flax tensor. Under a :class:`Tolerance` the largest ``|flax -
        torch| / (atol + rtol |torch|)``.
      reference_error: PyTorch's own relative L2 error in the same precision; 0 in float64, where
        PyTorch is the truth.
      limit: The largest ``error`` that passes.
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
    """A criterion of the caller's own in place of the oracle's: every element within ``atol + rtol
    |torch|``, as in ``numpy.allclose``."""

    rtol: float
    atol: float

    def excess(self, flax: np.ndarray, torch: np.ndarray) -> float:
        """The largest ``|flax - torch| / (atol + rtol |torch|)``; infinite where shapes or
        non-finite values differ."""
        flax, torch = np.asarray(flax, np.float64), np.asarray(torch, np.float64)
        if flax.shape != torch.shape:
            return float("inf")
        allowed, difference = self.atol + self.rtol * np.abs(torch), np.abs(flax - torch)
        same = (flax == torch) | (np.isnan(flax) & np.isnan(torch))
        with np.errstate(all="ignore"):
            ratios = np.where(same, 0.0, difference / allowed)
        return float(np.max(np.where(np.isfinite(ratios), ratios, np.inf), initial=0.0))


def relative_l2(value: np.ndarray, truth: np.ndarray, floor: float = 0.0) -> float:
    """``|value - truth| / max(|truth|, floor)`` in float64, L2 over the whole tensor.

    Args:
      value, truth: Same shape. Infinite when the shapes differ, or where one is finite (or of
        another sign of infinity) and the other not.
    """
    value, truth = np.asarray(value), np.asarray(truth)
    if value.shape != truth.shape:
        return float("inf")
    if np.array_equal(value, truth):  # as the weights of both sides are, in one pass
        return 0.0
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        difference = value - truth
    distance, scale = _norm(difference), _norm(truth)
    if not np.isfinite(distance):  # rare, and slower
        finite = np.isfinite(truth)
        if not np.array_equal(finite, np.isfinite(value)) or not np.array_equal(
            value[~finite], truth[~finite], equal_nan=True
        ):
            return float("inf")
        distance, scale = _norm(difference[finite]), _norm(truth[finite])
    if distance == 0.0:
        return 0.0
    scale = max(scale, floor)
    return distance / scale if scale else float("inf")


def _norm(values: np.ndarray) -> float:
    """L2 norm. That of ``np.linalg`` wakes the threads of BLAS, which then wait in a loop."""
    return float(np.sqrt(np.sum(np.square(values))))


def verdict_of(
    error: float, reference_error: float, epsilon: float, *, limit64: float = FLOAT64_LIMIT
) -> Verdict:
    """The verdict on a relative L2 error of Flax, given PyTorch's own error.

    Args:
      error, reference_error: Against PyTorch's float64 value, in the precision at hand; in float64
        the second does not count.
      epsilon: Machine epsilon of the precision (distance from 1 to the next number).
      limit64: Limit in float64; trajectories have a wider one.
    """
    if epsilon < 1e-12:
        return Verdict(error, 0.0, limit64, error / epsilon)
    limit = max(TORCH_FACTOR * reference_error, ULPS * epsilon)
    return Verdict(error, reference_error, limit, error / epsilon)


BINS = 20

SAMPLE = 1 << 16
"""Elements that a histogram counts; larger tensors are sampled at equal distances."""


@dataclass(frozen=True)
class Measurement:
    """One tensor in both frameworks and the verdict on it.

    Attributes:
      quantity: ``"eval forward"``, ``"train forward"``, ``"running statistics"``, ``"parameter
        gradient"``, ``"sgd: parameters"`` ...
      slot: Slot name, with the tensor's name behind a slash where the slot has several;
        ``"output"`` and ``"input"``.
      precision: ``"float64"``, ``"float32"``, ``"tf32"`` or ``"bfloat16"``.
      step: Training step (from 1) of a trajectory, else None.
    """

    quantity: str
    slot: str
    precision: str
    verdict: Verdict
    step: int | None = None


@dataclass(frozen=True)
class Histogram:
    """The distribution of the errors of one tensor's elements.

    Attributes:
      edges: Logarithms to base 10 of ``|value - truth| / rms(truth)``, one more than the counts.
      flax, torch: Elements per bin.
      exact: Elements of the Flax tensor without any error.
      counted: Number of elements that were counted, at most about :data:`SAMPLE`.
      elements: Number of elements of the tensor.
    """

    row: Measurement
    edges: tuple[float, ...]
    flax: tuple[int, ...]
    torch: tuple[int, ...]
    exact: int
    counted: int
    elements: int


@dataclass(frozen=True)
class Comparison:
    """All measurements of one verification.

    Attributes:
      measurements: In forward order within each quantity.
      histogram: Of the worst tensor; None if no tensor has an error.
      tolerance: The caller's criterion; None: the oracle's.
    """

    measurements: tuple[Measurement, ...]
    histogram: Histogram | None = None
    tolerance: Tolerance | None = None

    @property
    def passed(self) -> bool:
        """Whether every measurement is within its limit."""
        return all(measurement.verdict.passed for measurement in self.measurements)

    def groups(self) -> Iterator[tuple[str, str, list[Measurement]]]:
        """Precision, quantity and its measurements."""
        groups: dict[tuple[str, str], list[Measurement]] = {}
        for row in self.measurements:
            groups.setdefault((row.precision, row.quantity), []).append(row)
        for (precision, quantity), rows in groups.items():
            yield precision, quantity, rows

    def first_divergence(self, quantity: str, precision: str) -> Measurement | None:
        """The first row that failed: in forward order, gradients of activations in backward order
        (from the output to the input)."""
        rows = [m for m in self.measurements if (m.quantity, m.precision) == (quantity, precision)]
        if quantity == "activation gradient":
            rows.reverse()
            rows.sort(key=lambda m: m.slot == "input")
        return next((m for m in rows if not m.verdict.passed), None)


def histogram_of(
    row: Measurement, flax: np.ndarray, torch: np.ndarray, truth: np.ndarray
) -> Histogram | None:
    """Element errors on a logarithmic scale; None where nothing is finite. ``torch`` may be sampled
    already."""
    elements = truth.size
    truth = np.asarray(sampled(truth), np.float64)
    rms = float(np.sqrt(np.mean(np.square(truth)))) if truth.size else 0.0
    if not np.isfinite(rms) or rms == 0:
        return None
    sides = [
        np.abs(np.asarray(side, np.float64) - truth) / rms
        for side in (sampled(flax), torch if torch.shape == truth.shape else sampled(torch))
    ]
    positive = np.concatenate([side[np.isfinite(side) & (side > 0)] for side in sides])
    if not positive.size:
        return None
    low, high = np.log10(positive.min()), np.log10(positive.max())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    ours, theirs = (
        tuple(map(int, np.histogram(np.log10(side[np.isfinite(side) & (side > 0)]), edges)[0]))
        for side in sides
    )
    exact, marks = int(np.count_nonzero(sides[0] == 0)), tuple(map(float, edges))
    return Histogram(row, marks, ours, theirs, exact, truth.size, elements)


def sampled(array: np.ndarray) -> np.ndarray:
    """At most about :data:`SAMPLE` elements of an array, at equal distances."""
    return array.flat[:: max(1, array.size // SAMPLE)]
