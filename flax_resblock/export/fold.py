"""Batch norms folded into the convolutions before them, for evaluation."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resblock.config import Slot, SlotKind, walk
from flax_resblock.errors import InputError
from flax_resblock.nn.conv import Conv
from flax_resblock.nn.norm import BatchNorm
from flax_resblock.nn.other_norms import FrozenBatchNorm
from flax_resblock.nn.resnet import Model
from flax_resblock.nn.variables import fill, flat_arrays, variable_at


class ChannelBias(nnx.Module):
    """Adds one value per channel: what is left of a norm once its scale is in the convolution.

    Attributes:
      bias: ``nnx.Param``, ``(C,)``.
    """

    def __init__(self, bias: Any) -> None:
        self.bias = nnx.Param(bias)

    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(..., C)`` to the same shape and dtype."""
        return x + jnp.asarray(self.bias[...], x.dtype)


def fold_batch_norm(model: Model) -> Model:
    r"""A copy of a model for evaluation alone, without the norms that follow a convolution.

    In pre-activation order those that follow an addition stay, and so do group norms. Each kernel
    becomes ``kernel * scale / sqrt(var + eps)``, each norm an addition of ``bias - mean
    * scale / sqrt(var + eps)``; both are computed in float64 and rounded once. A bias of the
    convolution counts against the mean, and is gone; a standardised kernel is standardised first.

    Args:
      model: A network or block; does not change.
    Raises:
      InputError: A norm of other channels than its convolution's.
    """
    folded = nnx.clone(model)
    for _, conv in nnx.iter_modules(folded):
        if isinstance(conv, Conv) and conv.standardized is not None:
            _standardise(conv)
    for before, slot in pairwise(walk(model.config)):
        foldable = slot.normalises and slot.kind is not SlotKind.GROUP_NORM
        if not foldable or not _follows(before, slot):
            continue
        *place, name = slot.path
        conv = variable_at(folded, before.path) if before.convolves else None
        norm = variable_at(folded, slot.path)
        known = isinstance(norm, BatchNorm | FrozenBatchNorm)
        if not isinstance(conv, Conv) or not known or conv.kernel.shape[-1:] != norm.scale.shape:
            raise InputError(
                f"the norm at {slot.name} follows no convolution of as many channels and cannot "
                f"be folded into one. Export without `fold_batch_norm=True`."
            )
        kernel, scale, bias, mean, var = (
            np.asarray(value[...], np.float64)
            for value in (conv.kernel, norm.scale, norm.bias, norm.mean, norm.var)
        )
        factor = scale / np.sqrt(var + norm.eps)
        if conv.bias is not None:
            mean = mean - np.asarray(conv.bias[...], np.float64)
            conv.bias = None
        dtype = conv.kernel[...].dtype
        conv.kernel.set_value(_on_device(kernel * factor, dtype))
        shift = ChannelBias(_on_device(bias - mean * factor, dtype))
        setattr(variable_at(folded, tuple(place)), str(name), shift)
    return folded


def _on_device(value: np.ndarray, dtype: Any) -> jax.Array:
    """``jnp.asarray`` would compile a copy for every shape."""
    return jax.device_put(value.astype(dtype), may_alias=True)


def _standardise(conv: Conv) -> None:
    """Puts the standardised kernel in the place of the one that it is made of."""
    kernel = np.asarray(conv.kernel[...], np.float64)
    axes = tuple(range(kernel.ndim - 1))
    standard = (kernel - kernel.mean(axes)) / np.sqrt(kernel.var(axes) + (conv.standardized or 0))
    conv.kernel.set_value(_on_device(standard, conv.kernel[...].dtype))
    conv.standardized = None


def _follows(before: Slot, norm: Slot) -> bool:
    """Whether a norm takes what the slot before it gives, and nothing else does."""
    here = (before.stage, before.block, before.branch) == (norm.stage, norm.block, norm.branch)
    return before.convolves and here


def folding_error(
    model: Model, folded: Model, image_size: int, *, batch: int = 4, seed: int = 0
) -> dict[str, float]:
    """What folding costs in float32, on random images of so many pixels a side: relative L2 errors
    of the outputs against ``model`` in float64, ``"folded"`` and ``"unfolded"``."""
    images = np.random.default_rng(seed).normal(
        0.3, 1.0, (batch, image_size, image_size, model.config.in_channels)
    )
    with jax.enable_x64(True):
        wide = nnx.clone(model)
        values = {
            path: value.astype(np.float64) if value.dtype.kind in "fV" else value
            for path, value in flat_arrays(model).items()
        }
        fill(wide, values)
        truth = _run(wide, images)

    def error(one: Model) -> float:
        found = _run(one, images.astype(np.float32))
        return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))

    return {"folded": error(folded), "unfolded": error(model)}


def _run(model: Model, images: np.ndarray) -> np.ndarray:
    graphdef, state = nnx.split(model)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, use_running_average=True))
        outputs = run(state, images)
    return np.asarray(outputs, np.float64)
