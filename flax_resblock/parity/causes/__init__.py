"""Known mistakes in a network, each as a formula for what this side would have computed. A mistake
is the cause if its formula agrees with the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from flax_resblock.config import Path
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import Side, dotted

MATCH = 1e-9
"""Relative difference below which a formula explains what a side computed; formulas are evaluated
in float64."""

FORMATS = {"bfloat16": 7, "TF32": 10, "float32": 23}
"""Explicit mantissa bits of the formats that arithmetic may have been done in instead of
float64."""


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


NAMES = {"flax": "Flax", "torch": "PyTorch"}


@dataclass(frozen=True)
class Diagnosis:
    """One thing that is wrong.

    Attributes:
      slot: Where: a slot, or ``slot/tensor``.
      cause: A short identifier, ``"same-padding"``; ``"unknown"`` where no known mistake explains
        the data.
      side: The framework whose side it is. Without a specification, PyTorch's side is taken to be
        right.
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
    is that it explains."""
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
      candidates: Name, sentence and formula; a formula that does not apply returns None or raises
        ValueError, as numpy does for shapes that do not fit.
    """
    for name, sentence, formula in candidates:
        try:
            guess = formula()
        except (ValueError, RuntimeError):
            continue
        if guess is not None and (error := relative_l2(value, guess)) <= limit:
            return Cause(name, sentence, error)
    return None


def not_finite(truth: np.ndarray, value: np.ndarray, verb: str) -> Cause | None:
    """That a side gives, or feeds, values that are not finite where they should be."""
    if not np.isfinite(truth).all() or np.isfinite(value).all():
        return None
    count = np.count_nonzero(~np.isfinite(value))
    return Cause("non-finite", f"{verb} {count} of {value.size} values that are not finite", 0.0)


def dropped(truth: np.ndarray, value: np.ndarray, words: str) -> Iterator[Candidate]:
    """That ``value`` is what dropout makes of ``truth``, of the same shape. ``words`` are about the
    share of the values that it ``drops`` and its ``rate``."""
    kept = value != 0
    if not kept.any() or kept.all():
        return
    with np.errstate(all="ignore"):
        rate = float(1 - np.vdot(truth[kept], truth[kept]) / np.vdot(value[kept], truth[kept]))
    if 0 < rate < 1:
        words = words.format(share=np.mean(~kept & (truth != 0)), rate=rate)
        yield "dropout", words, lambda: truth * kept / (1 - rate)


def rounded(values: np.ndarray, mantissa_bits: int) -> np.ndarray:
    """Values with so many explicit mantissa bits, rounded to the nearest even, exponents
    unlimited."""
    mantissa, exponent = np.frexp(np.asarray(values, np.float64))
    unit = 2.0 ** (mantissa_bits + 1)
    return np.ldexp(np.rint(mantissa * unit) / unit, exponent)


def effective_bits(value: np.ndarray, truth: np.ndarray) -> float:
    """Mantissa bits that survived, from the size of the error: a value rounded to ``b`` explicit
    bits has a relative error of about ``2**-b / 3.5``."""
    error = relative_l2(value, truth)
    return float(-np.log2(error * 3.5)) if 0 < error < float("inf") else 52.0


def explain_tensor(
    path: Path, value: np.ndarray, expected: Mapping[Path, np.ndarray]
) -> Cause | None:
    """The mistake by which ``value`` stands at ``path`` of the Flax side, whose tensors should be
    those ``expected``; in Flax's layout."""
    return explain(value, _tensor_candidates(path, value, expected), 1e-14) or _one_element(
        value, expected[path]
    )


def _tensor_candidates(
    path: Path, value: np.ndarray, expected: Mapping[Path, np.ndarray]
) -> Iterator[Candidate]:
    right = expected[path]
    if right.ndim == 4:
        words = (
            "holds the kernel flipped in height and width (a convolution, not a cross-correlation)"
        )
        yield "flipped-kernel", words, lambda: right[::-1, ::-1]
        yield "flipped-kernel", "holds the kernel flipped in height", lambda: right[::-1]
        yield "flipped-kernel", "holds the kernel flipped in width", lambda: right[:, ::-1]
        words = "holds the kernel with height and width exchanged"
        yield "transposed-kernel", words, lambda: right.transpose(1, 0, 2, 3)
        words = "holds the kernel with input and output channels exchanged"
        yield "transposed-kernel", words, lambda: right.transpose(0, 1, 3, 2)
        words = "holds the OIHW kernel reshaped to HWIO instead of transposed"
        yield "reshaped-kernel", words, lambda: right.transpose(3, 2, 0, 1).reshape(right.shape)
        words = "holds the kernel with its input channels in reverse order (RGB and BGR)"
        yield "reversed-channels", words, lambda: right[:, :, ::-1]
    if right.ndim == 2:
        yield "transposed-kernel", "holds the matrix transposed", lambda: right.T
        words = "holds PyTorch's matrix reshaped instead of transposed"
        yield "reshaped-kernel", words, lambda: right.T.reshape(right.shape)
    for other, theirs in expected.items():
        if other != path and theirs.shape == right.shape and theirs.size > 1 and np.ptp(theirs) > 0:
            name = dotted(other)
            yield "swapped-tensor", f"holds the data of {name}", lambda t=theirs: t
    start = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}.get(str(path[-1]))
    if start is not None:
        words = f"still holds the initial {start:g}: it was never filled"
        yield "stale-tensor", words, lambda: np.full(right.shape, start)
    yield "stale-tensor", "holds zeros: it was never filled", lambda: np.zeros(right.shape)
    for name, bits in FORMATS.items():
        words = f"holds the tensor rounded to {name} ({bits} mantissa bits)"
        yield "rounded-weights", words, lambda b=bits: rounded(right, b)
    yield "negated-tensor", "holds the tensor with the opposite sign", lambda: -right
    if right.size and np.any(right) and np.isfinite(value).all():
        factor = float(np.vdot(value, right) / np.vdot(right, right))
        yield "scaled-tensor", f"holds the tensor times {factor:.6g}", lambda: factor * right


def _one_element(value: np.ndarray, right: np.ndarray) -> Cause | None:
    """A few wrong elements in a tensor that is right otherwise; or one that has nothing to do with
    what it should be."""
    if value.shape != right.shape:
        return Cause(
            "wrong-shape", f"has the shape {list(value.shape)} instead of {list(right.shape)}", 0.0
        )
    wrong = np.argwhere(~((value == right) | (np.isnan(value) & np.isnan(right))))
    if len(wrong) <= max(3, value.size // 1000):
        index = tuple(map(int, wrong[0]))
        return Cause(
            "damaged-tensor",
            f"differs in {len(wrong)} of {value.size} elements, first at {list(index)}: "
            f"{value[index]:.6g} for {right[index]:.6g}",
            0.0,
        )
    if (
        value.size > 3
        and 0.5 < relative_l2(value, right) < 50
        and abs(np.corrcoef(value.ravel(), right.ravel())[0, 1]) < 4 / np.sqrt(value.size)
    ):
        return Cause(
            "stale-tensor",
            "holds values unrelated to those that should be there: an initialisation, or "
            "another checkpoint",
            0.0,
        )
    return None


@dataclass(frozen=True)
class LayerRun:
    """A layer as it is meant to be (``module``), what it was fed, and what it is meant to give.

    Attributes:
      tensors: Its tensors by their Flax names (``kernel``, ``scale``, ``mean`` ...) in Flax's
        layout.
      others: Tensors of other layers by Flax name and slot: ``others["kernel"]["stage1.0.conv2"]``.
      x: Its input, NHWC.
    """

    module: torch.nn.Module
    tensors: Mapping[str, np.ndarray]
    others: Mapping[str, Mapping[str, np.ndarray]]
    x: np.ndarray
    truth: np.ndarray
    train: bool
