"""Resizing images and moving values between channels and pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_resblock.nn.geometry import Size, per_axis_of

Mode = Literal["nearest", "nearest-exact", "linear", "bilinear", "bicubic"]
_CUBIC = -0.75
"""PyTorch's coefficient of the cubic filter; with ``antialias`` it is -0.5."""


def interpolate(
    x: jax.Array,
    size: Size | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: Mode = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> jax.Array:
    """Resizes the spatial axes, as ``torch.nn.functional.interpolate`` does.

    Args:
      x: ``(N, *spatial, C)``, with one or two spatial axes.
      size: Of the output: one number, or one for each spatial axis.
      scale_factor: Instead of ``size``; the size of the output is rounded down. Positions in the
        input are computed with this factor, and not with the ratio of the sizes, unless
        ``recompute_scale_factor``.
      mode: ``"linear"`` for one axis is ``"bilinear"`` for two.
      align_corners: Whether the centres of the corner pixels coincide, instead of their outer
        edges.
      recompute_scale_factor: See ``scale_factor``.
      antialias: Whether shrinking takes the mean of all pixels that an output covers; for
        ``"bilinear"`` and ``"bicubic"``.
    Raises:
      ValueError: Both or none of ``size`` and ``scale_factor``; an unknown mode, or options that
        PyTorch refuses for it.
    """
    if (size is None) == (scale_factor is None):
        raise ValueError("interpolate needs one of size and scale_factor, and not both.")
    if mode not in ("nearest", "nearest-exact", "linear", "bilinear", "bicubic"):
        raise ValueError(f"mode {mode!r} is unknown to interpolate.")
    if antialias and mode not in ("bilinear", "bicubic"):
        raise ValueError("antialias needs mode 'bilinear' or 'bicubic', as in PyTorch.")
    if align_corners is not None and mode.startswith("nearest"):
        raise ValueError(f"align_corners cannot be set for mode {mode!r}, as in PyTorch.")
    extents = x.shape[1:-1]
    factors: tuple[float | None, ...] = (None,) * len(extents)
    if size is not None:
        outputs = per_axis_of(size, x)
    else:
        given = scale_factor if isinstance(scale_factor, Sequence) else [scale_factor]
        asked = [float(one or 0) for one in given] * (len(extents) if len(given) == 1 else 1)
        outputs = tuple(math.floor(n * one) for n, one in zip(extents, asked, strict=True))
        factors = factors if recompute_scale_factor else tuple(asked)
    wide = np.float64 if x.dtype == np.float64 else np.float32
    dtype = wide if len(extents) == 1 else None
    for axis, (n, out, factor) in enumerate(zip(extents, outputs, factors, strict=True), 1):
        if mode.startswith("nearest"):
            exact = mode == "nearest-exact"
            x = jnp.take(x, _nearest(n, out, factor, exact=exact, dtype=dtype), axis)
        elif n != out or factor not in (None, 1.0):
            cubic, corners = mode == "bicubic", bool(align_corners)
            weights = (_antialiased if antialias else _weights)(n, out, factor, cubic, corners)
            product = jnp.tensordot(
                x, jnp.asarray(weights, x.dtype), (axis, 1), precision=lax.Precision.HIGHEST
            )
            x = jnp.moveaxis(product, -1, axis)
    return x


def _nearest(
    n: int, out: int, factor: float | None, *, exact: bool, dtype: type[np.floating] | None
) -> np.ndarray:
    """The input of every output, with PyTorch's rounding.

    With one spatial axis the scale has the ``dtype`` of the images. With two (None) it is float32,
    and sizes that are equal or doubled are not computed with it. PyTorch itself rounds another way
    for large images of float64."""
    places = np.arange(out)
    if dtype is None and not exact and out in (n, 2 * n):
        return places // (out // n)
    kind = dtype or np.float32
    scale = kind(n) / kind(out) if factor is None else kind(1 / factor)
    positions = (places + 0.5 if exact else places) * np.float64(scale)
    return np.minimum(np.floor(positions.astype(np.float32)).astype(int), n - 1)


def _scale(n: int, out: int, factor: float | None, corners: bool) -> float:
    """Pixels of the input for each of the output."""
    if corners:
        return (n - 1) / (out - 1) if out > 1 else 0.0
    return n / out if factor is None else 1 / factor


def _weights(n: int, out: int, factor: float | None, cubic: bool, corners: bool) -> np.ndarray:
    """``(out, n)``: how each output is made of the inputs next to it."""
    scale, places = _scale(n, out, factor, corners), np.arange(out)
    source = scale * places if corners else scale * (places + 0.5) - 0.5
    source = source if cubic else np.maximum(source, 0)
    first = np.floor(source)
    weights = np.zeros((out, n))
    for tap in (-1, 0, 1, 2) if cubic else (0, 1):
        distance = np.abs(source - first - tap)
        share = _cubic(distance, _CUBIC) if cubic else np.maximum(1 - distance, 0)
        inside = np.clip(first + tap, 0, n - 1).astype(int)
        np.add.at(weights, (places, inside), share)
    return weights


def _antialiased(n: int, out: int, factor: float | None, cubic: bool, corners: bool) -> np.ndarray:
    """``(out, n)``: the filter, widened to the pixels of the input that an output covers."""
    scale = _scale(n, out, factor, corners)
    width = max(scale, 1.0)
    support = (2 if cubic else 1) * width
    weights = np.zeros((out, n))
    for place in range(out):
        centre = scale * (place + 0.5)
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), n)
        distance = np.abs(np.arange(low, high) - centre + 0.5) / width
        share = _cubic(distance, -0.5) if cubic else np.maximum(1 - distance, 0)
        weights[place, low:high] = share / share.sum()
    return weights


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys 1981, cubic convolution interpolation, equation 15."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def pixel_shuffle(x: jax.Array, upscale_factor: int) -> jax.Array:
    """``(N, H, W, C r r)`` to ``(N, H r, W r, C)``, as ``torch.nn.functional.pixel_shuffle``."""
    n, height, width, channels = x.shape
    r = upscale_factor
    y = x.reshape(n, height, width, channels // r**2, r, r).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(n, height * r, width * r, channels // r**2)


def pixel_unshuffle(x: jax.Array, downscale_factor: int) -> jax.Array:
    """``(N, H r, W r, C)`` to ``(N, H, W, C r r)``, the inverse of :func:`pixel_shuffle`."""
    n, height, width, channels = x.shape
    r = downscale_factor
    y = x.reshape(n, height // r, r, width // r, r, channels).transpose(0, 1, 3, 5, 2, 4)
    return y.reshape(n, height // r, width // r, channels * r**2)


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """``(..., C)``: channel ``i`` of group ``g`` moves to ``i * groups + g``."""
    parts = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return jnp.swapaxes(parts, -1, -2).reshape(x.shape)
