"""Why a tensor of the Flax side is not the one that the PyTorch side holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from flax_resblock.config import Path
from flax_resblock.parity.causes import FORMATS, Candidate, Cause, explain, rounded
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import dotted


def explain_tensor(
    path: Path, value: np.ndarray, expected: Mapping[Path, np.ndarray]
) -> Cause | None:
    """The mistake by which ``value`` stands at ``path``.

    Args:
      path: Of the tensor on the Flax side.
      value: What is there, in Flax's layout.
      expected: What should be, every tensor of the network.
    """
    return explain(value, _candidates(path, value, expected), 1e-14) or _one_element(
        value, expected[path]
    )


def _candidates(
    path: Path, value: np.ndarray, expected: Mapping[Path, np.ndarray]
) -> Iterator[Candidate]:
    right = expected[path]
    if right.ndim == 4:
        yield (
            "flipped-kernel",
            "holds the kernel flipped in height and width (a convolution, not a cross-correlation)",
            lambda: right[::-1, ::-1],
        )
        yield "flipped-kernel", "holds the kernel flipped in height", lambda: right[::-1]
        yield "flipped-kernel", "holds the kernel flipped in width", lambda: right[:, ::-1]
        yield (
            "transposed-kernel",
            "holds the kernel with height and width exchanged",
            lambda: right.transpose(1, 0, 2, 3),
        )
        yield (
            "transposed-kernel",
            "holds the kernel with input and output channels exchanged",
            lambda: right.transpose(0, 1, 3, 2),
        )
        yield (
            "reshaped-kernel",
            "holds the OIHW kernel reshaped to HWIO instead of transposed",
            lambda: right.transpose(3, 2, 0, 1).reshape(right.shape),
        )
        yield (
            "reversed-channels",
            "holds the kernel with its input channels in reverse order (RGB and BGR)",
            lambda: right[:, :, ::-1],
        )
    if right.ndim == 2:
        yield "transposed-kernel", "holds the matrix transposed", lambda: right.T
        yield (
            "reshaped-kernel",
            "holds PyTorch's matrix reshaped instead of transposed",
            lambda: right.T.reshape(right.shape),
        )
    for other, theirs in expected.items():
        if other != path and theirs.shape == right.shape and theirs.size > 1 and np.ptp(theirs) > 0:
            name = dotted(other)
            yield "swapped-tensor", f"holds the data of {name}", lambda t=theirs: t
    start = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}.get(str(path[-1]))
    if start is not None:
        yield (
            "stale-tensor",
            f"still holds the initial {start:g}: it was never filled",
            lambda: np.full(right.shape, start),
        )
    yield "stale-tensor", "holds zeros: it was never filled", lambda: np.zeros(right.shape)
    for name, bits in FORMATS.items():
        yield (
            "rounded-weights",
            f"holds the tensor rounded to {name} ({bits} mantissa bits)",
            lambda b=bits: rounded(right, b),
        )
    yield "negated-tensor", "holds the tensor with the opposite sign", lambda: -right
    if right.size and np.any(right) and np.isfinite(value).all():
        factor = float(np.vdot(value, right) / np.vdot(right, right))
        yield "scaled-tensor", f"holds the tensor times {factor:.6g}", lambda: factor * right


def _one_element(value: np.ndarray, right: np.ndarray) -> Cause | None:
    """A few wrong elements in a tensor that is right otherwise; or one that has nothing to do with
    what it should be.
    """
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
