"""Why a gradient differs although the value does not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from flax_resblock.parity.causes import Candidate, Cause, explain
from flax_resblock.parity.causes.layers import Layer


def explain_gradient(
    value: np.ndarray,
    truth: np.ndarray,
    layer: Layer | None,
    cotangent: np.ndarray | None,
    ending: np.ndarray | None,
) -> Cause | None:
    """The mistake by which a gradient is ``value``.

    Args:
      value, truth: What one side found, and what is meant.
      layer: The layer whose input gradient it is; None: it is another gradient.
      cotangent: What flowed back into that layer.
      ending: Output of the residual block whose input gradient it is; None: it is not a block's.
    """
    return explain(value, _candidates(value, truth, layer, cotangent, ending))


def _candidates(
    value: np.ndarray,
    truth: np.ndarray,
    layer: Layer | None,
    cotangent: np.ndarray | None,
    ending: np.ndarray | None,
) -> Iterator[Candidate]:
    yield (
        "cut-gradient",
        "lets no gradient through (stop_gradient, detach)",
        lambda: np.zeros_like(truth),
    )
    if (
        cotangent is not None
        and layer is not None
        and isinstance(layer.module, torch.nn.modules.batchnorm._BatchNorm)
        and layer.train
    ):
        axes = tuple(range(layer.x.ndim - 1))
        slope = layer.tensors.get("scale", np.ones(layer.x.shape[-1])) / np.sqrt(
            layer.x.var(axes) + float(layer.module.eps)
        )
        words = (
            "treats the batch statistics as constants: no gradient flows through the mean and the "
            "variance"
        )
        yield "cut-statistics", words, lambda: cotangent * slope
        centred = layer.x - layer.x.mean(axes)
        words = "lets the gradient flow through the mean of the batch, not through its variance"
        yield "cut-statistics", words, lambda: slope * (cotangent - cotangent.mean(axes))
        words = "lets the gradient flow through the variance of the batch, not through its mean"
        through = (
            centred
            * (cotangent * centred).mean(axes)
            / (layer.x.var(axes) + float(layer.module.eps))
        )
        yield "cut-statistics", words, lambda: slope * (cotangent - through)
    if cotangent is not None and ending is not None and ending.shape == truth.shape:
        words = "cuts the gradient of the skip: it flows back through the convolutions only"
        yield "cut-skip", words, lambda: truth - cotangent * (ending > 0)
        words = "lets the gradient of the skip through where the last ReLU is closed"
        yield "relu-gradient", words, lambda: truth + cotangent * (ending <= 0)
    with np.errstate(all="ignore"):
        factor = float(np.vdot(value, truth) / np.vdot(truth, truth))
    if np.isfinite(factor):
        yield "scaled-gradient", f"multiplies the gradient by {factor:.6g}", lambda: factor * truth
