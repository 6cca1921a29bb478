"""Known ways to get a network wrong, each as a formula that can be tested against the data: what
would this side have computed if that were the mistake?
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from flax_resblock.parity.oracle import relative_l2

MATCH = 1e-9
"""Relative difference below which a formula explains what a side computed; formulas are evaluated
in float64.
"""

FORMATS = {"bfloat16": 7, "TF32": 10, "float32": 23}
"""Explicit mantissa bits of the formats that arithmetic may have been done in instead of
float64.
"""


class Cause(NamedTuple):
    """A mistake that explains the data.

    Attributes:
      name: A short identifier, ``"same-padding"``.
      sentence: What this side does, as the continuation of "Flax ..." or "PyTorch ...".
      error: Relative difference between the formula and what was computed.
    """

    name: str
    sentence: str
    error: float


Side = Literal["flax", "torch"]
NAMES = {"flax": "Flax", "torch": "PyTorch"}


@dataclass(frozen=True)
class Diagnosis:
    """One thing that is wrong.

    Attributes:
      slot: Where: a slot, or ``slot/tensor``.
      cause: A short identifier, ``"same-padding"``; ``"unknown"`` where no known mistake explains
        the data.
      side: The framework whose side it is. Where nothing says which side is right, PyTorch's is
        taken to be.
      sentence: In words.
      evidence: Why: how well the formula of this mistake agrees with the data, and how large the
        difference is that it explains.
      others: Further places with the same cause.
    """

    slot: str
    cause: str
    side: Side
    sentence: str
    evidence: str
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Where, what and why, in one line."""
        more = f" and {len(self.others)} more" if self.others else ""
        return f"{self.slot}{more}: {self.sentence} ({self.evidence})"


def evidence_for(cause: Cause | None, difference: float, against: str) -> str:
    """Why a cause is believed: how well its formula agrees, and how large the relative difference
    is that it explains.
    """
    if cause is None:
        return (
            f"the relative difference to {against} is {difference:.1e}; none of the known mistakes "
            f"gives what was computed"
        )
    agreement = f"to {cause.error:.0e}" if cause.error else "exactly"
    return (
        f"this formula agrees {agreement} with what was computed; the difference to {against} is "
        f"{difference:.1e}"
    )


Candidate = tuple[str, str, Callable[[], np.ndarray | None]]


def explain(
    value: np.ndarray, candidates: Iterable[Candidate], limit: float = MATCH
) -> Cause | None:
    """The first candidate whose formula gives ``value``.

    Args:
      value: What a side computed.
      candidates: Name, sentence and formula; a formula that does not apply returns None or raises
        ValueError, as numpy does for shapes that do not fit.
      limit: Relative L2 difference that still counts as equal.
    """
    for name, sentence, formula in candidates:
        try:
            guess = formula()
        except (ValueError, RuntimeError):
            continue
        if (
            guess is not None
            and guess.shape == value.shape
            and (error := relative_l2(value, guess)) <= limit
        ):
            return Cause(name, sentence, error)
    return None


def rounded(values: np.ndarray, mantissa_bits: int) -> np.ndarray:
    """Values with so many explicit mantissa bits, rounded to the nearest even, exponents
    unlimited.
    """
    mantissa, exponent = np.frexp(np.asarray(values, np.float64))
    return np.ldexp(
        np.rint(mantissa * 2.0 ** (mantissa_bits + 1)) / 2.0 ** (mantissa_bits + 1), exponent
    )


def effective_bits(value: np.ndarray, truth: np.ndarray) -> float:
    """Mantissa bits that survived, from the size of the error: a value rounded to ``b`` explicit
    bits has a relative error of about ``2**-b / 3.5``.
    """
    error = relative_l2(value, truth)
    return float(-np.log2(error * 3.5)) if 0 < error < float("inf") else 52.0
