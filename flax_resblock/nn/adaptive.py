"""Adaptive pooling: windows that divide an axis into a given number of parts."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_resblock.nn.pooling import avg_pool, max_pool


def adaptive_avg_pool(x: jax.Array, output_size: int | Sequence[int | None]) -> jax.Array:
    """Means of windows that divide each axis, as ``torch.nn.functional.adaptive_avg_pool2d``.

    Args:
      x: ``(N, *spatial, C)``.
      output_size: One number, or one for each spatial axis; None keeps the size of an axis.
    """
    sizes = _sizes(x, output_size)
    if set(sizes) == {1}:
        return jnp.mean(x, tuple(range(1, x.ndim - 1)), keepdims=True)
    if _divides(x, sizes):
        return avg_pool(x, _window(x, sizes))
    for axis, out in enumerate(sizes, 1):
        if out == x.shape[axis]:
            continue
        starts, ends = _bounds(x.shape[axis], out)
        places = np.arange(x.shape[axis])
        inside = (places >= starts[:, None]) & (places < ends[:, None])
        weights = jnp.asarray(inside / (ends - starts)[:, None], x.dtype)
        product = jnp.tensordot(x, weights, (axis, 1), precision=lax.Precision.HIGHEST)
        x = jnp.moveaxis(product, -1, axis)
    return x


def adaptive_max_pool(x: jax.Array, output_size: int | Sequence[int | None]) -> jax.Array:
    """Greatest values of the same windows, as ``torch.nn.functional.adaptive_max_pool2d``. If
    values are equal, the first one receives the gradient.

    Args:
      x, output_size: As for :func:`adaptive_avg_pool`.
    """
    sizes = _sizes(x, output_size)
    if _divides(x, sizes):
        return max_pool(x, _window(x, sizes))
    for axis in reversed(range(1, x.ndim - 1)):  # the first in the order of rows is found so
        starts, ends = _bounds(x.shape[axis], sizes[axis - 1])
        longest = int((ends - starts).max())
        places = np.minimum(starts[:, None] + np.arange(longest), ends[:, None] - 1)
        windows = jnp.moveaxis(x, axis, -1)[..., places]
        first = jnp.argmax(windows, -1, keepdims=True)
        x = jnp.moveaxis(jnp.take_along_axis(windows, first, -1)[..., 0], -1, axis)
    return x


def _sizes(x: jax.Array, output_size: int | Sequence[int | None]) -> tuple[int, ...]:
    extents = x.shape[1:-1]
    if isinstance(output_size, int):
        return (output_size,) * len(extents)
    if len(output_size) != len(extents):
        raise ValueError(f"output_size={output_size} must be one number or {len(extents)}.")
    return tuple(n if out is None else out for n, out in zip(extents, output_size, strict=True))


def _divides(x: jax.Array, sizes: tuple[int, ...]) -> bool:
    return all(n % out == 0 for n, out in zip(x.shape[1:-1], sizes, strict=True))


def _window(x: jax.Array, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n // out for n, out in zip(x.shape[1:-1], sizes, strict=True))


def _bounds(extent: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each window begins and ends; neighbours share a pixel if the size is uneven."""
    places = np.arange(out)
    return places * extent // out, -(-(places + 1) * extent // out)
