"""Known mistakes in how a residual block ends, and in gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from flax_resblock.parity.causes import Candidate, Cause, LayerRun, explain
from flax_resblock.parity.causes.connections import (
    ACTIVATIONS,
    activation_between,
    activation_slope,
)
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.taps import as_array, as_tensor


@dataclass(frozen=True)
class BlockEnd:
    """How a residual block is meant to end: ``truth = activation(main + skip)``.

    Attributes:
      truth: The block's output, NHWC, as are all arrays here.
      main: Output of the last norm of the main path.
      skip: Output of the shortcut. None: no layer computes it.
      x: Input of the block.
    """

    truth: np.ndarray
    main: np.ndarray
    skip: np.ndarray | None
    x: np.ndarray

    @property
    def added(self) -> np.ndarray:
        """What is added to the main path: ``skip``, or the input, zero-padded where the block
        widens it."""
        if self.skip is not None:
            return self.skip
        fits = self.x.shape == self.main.shape
        return self.x if fits else _zero_padded(self.x, self.main.shape, front=True)

    @property
    def activation(self) -> str:
        """The block's last activation, as the true output shows it; ReLU if no known one fits."""
        return activation_between(self.main + self.added, self.truth) or "ReLU"


def explain_ending(end: BlockEnd, value: np.ndarray) -> Cause | None:
    """The mistake by which a residual block ends in ``value`` instead of ``end.truth``."""
    found = explain(value, _ending_candidates(end))
    main, skip = end.main, end.added
    if found is None and end.activation == "ReLU" and value.shape == main.shape:
        positive = value > 0  # where the ReLU is open, scaled branches are a linear problem
        a, b = main[positive], skip[positive]
        if positive.sum() > 2:
            (alpha, beta), *_ = np.linalg.lstsq(np.stack([a, b], 1), value[positive], rcond=None)
            words = f"weighs the branches: {alpha:.6g} x main path {beta:+.6g} x skip"
            relu = ACTIVATIONS["ReLU"]
            found = explain(value, [("scaled", words, lambda: relu(alpha * main + beta * skip))])
    return found


def _ending_candidates(end: BlockEnd) -> Iterator[Candidate]:
    main, skip, x, name = end.main, end.added, end.x, end.activation
    act, f = ACTIVATIONS[name], name.lower() if name == "ReLU" else name
    words = (
        f"overwrites the main path: the output is {f}(skip(x) + x), the convolutions are "
        "computed and thrown away"
    )
    yield "overwritten-branch", words, lambda: act(skip + x)
    words = f"does not add the skip: the output is {f} of the main path alone"
    yield "skip-not-added", words, lambda: act(main)
    words = f"leaves the main path out: the output is {f}(skip(x))"
    yield "missing-main", words, lambda: act(skip)
    words = f"has no last {name}: the output is main path + skip"
    yield "missing-relu", words, lambda: main + skip
    words = f"applies the {name} before the addition: the output is {f}(main path) + skip"
    yield "relu-before-add", words, lambda: act(main) + skip
    words = f"applies {name} to both before the addition"
    yield "relu-before-add", words, lambda: act(main) + act(skip)
    words = f"adds the unprojected input: the output is {f}(main path + x)"
    yield "unprojected-skip", words, lambda: act(main + x)
    yield "skip-subtracted", "subtracts the skip", lambda: act(main - skip)
    yield "skip-subtracted", "subtracts the main path", lambda: act(skip - main)
    yield "branches-multiplied", "multiplies the branches", lambda: act(main * skip)
    yield "skip-twice", "adds the skip twice", lambda: act(main + 2 * skip)
    padded = partial(_zero_padded, x, main.shape)
    words = "puts all new channels of the shortcut behind"
    yield "other-shortcut", words, lambda: act(main + padded(front=False))
    words = "averages pixels in the shortcut"
    yield "other-shortcut", words, lambda: act(main + padded(front=True, mean=True))
    for other, g in ACTIVATIONS.items():
        if other not in (name, "no activation"):
            words = f"ends in {other} instead of {name}"
            yield "other-activation", words, lambda g=g: g(main + skip)


def explain_gradient(
    value: np.ndarray,
    truth: np.ndarray,
    layer: LayerRun | None = None,
    cotangent: np.ndarray | None = None,
    end: BlockEnd | None = None,
) -> Cause | None:
    """The mistake by which a gradient is ``value`` instead of ``truth``.

    Args:
      layer: The layer whose input gradient it is; None: it is another gradient.
      cotangent: The cotangent of that layer's output.
      end: The end of the residual block whose input gradient it is; None: it is not a block's.
    """

    def candidates() -> Iterator[Candidate]:
        words = "lets no gradient through (stop_gradient, detach)"
        yield "cut-gradient", words, lambda: np.zeros_like(truth)
        norms = torch.nn.modules.batchnorm._BatchNorm
        if cotangent is not None and layer and isinstance(layer.module, norms) and layer.train:
            axes = tuple(range(layer.x.ndim - 1))
            var = layer.x.var(axes) + float(layer.module.eps)
            slope = layer.tensors.get("scale", np.ones(layer.x.shape[-1])) / np.sqrt(var)
            words = (
                "treats the batch statistics as constants: no gradient flows through the mean and "
                "the variance"
            )
            yield "cut-statistics", words, lambda: cotangent * slope
            centred = layer.x - layer.x.mean(axes)
            words = "lets the gradient flow through the mean of the batch, not through its variance"
            means = cotangent.mean(axes)
            yield "cut-statistics", words, lambda: slope * (cotangent - means)
            words = "lets the gradient flow through the variance of the batch, not through its mean"
            through = centred * (cotangent * centred).mean(axes) / var
            yield "cut-statistics", words, lambda: slope * (cotangent - through)
        if cotangent is not None and end is not None and end.x.shape == end.main.shape:
            slope = activation_slope(end.activation, end.main + end.added)
            words = "cuts the gradient of the skip: it flows back through the convolutions only"
            yield "cut-skip", words, lambda: truth - cotangent * slope
            words = f"lets the gradient of the skip past the last {end.activation}"
            yield "relu-gradient", words, lambda: truth + cotangent * (1 - slope)
        with np.errstate(all="ignore"):
            factor = float(np.vdot(value, truth) / np.vdot(truth, truth))
        if np.isfinite(factor):
            words = f"multiplies the gradient by {factor:.6g}"
            yield "scaled-gradient", words, lambda: factor * truth

    return explain(value, candidates())


def _zero_padded(
    x: np.ndarray, shape: tuple[int, ...], *, front: bool, mean: bool = False
) -> np.ndarray:
    """Option A: every ``stride``-th pixel, new channels zero."""
    stride = -(-x.shape[1] // shape[1])
    small = x[:, ::stride, ::stride]
    if mean:
        small = as_array(F.avg_pool2d(as_tensor(x, PRECISIONS["float64"]), stride, ceil_mode=True))
    extra = shape[-1] - x.shape[-1]
    before = extra // 2 if front else 0
    return np.pad(small, ((0, 0), (0, 0), (0, 0), (before, extra - before)))
