"""Max pooling on a CPU, as the maximum of strided slices, one for each pixel of the window; its
gradient compares the slices instead of searching the window.
"""

from __future__ import annotations

from functools import partial, reduce
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_resblock.cpu.products import taps_added, taps_of


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    """``(N, H, W, C)`` to ``(N, H', W', C)``, equal to ``torch.nn.MaxPool2d``. If pixels are equal,
    the first one receives the gradient.

    The inside and the borders are computed separately: with a border of infinities, XLA would
    compare the position of every pixel of every slice with the image's edges.

    Args:
      x: Images or activations, floating.
      window, stride, padding: In pixels, square.
    """
    rows, columns = (_runs(size, window, stride, padding) for size in x.shape[1:3])
    parts = ([_part(x, row, column, stride) for column in columns] for row in rows)
    return jnp.concatenate([jnp.concatenate(row, axis=2) for row in parts], axis=1)


class _Run(NamedTuple):
    """Adjacent outputs whose windows overlap the image in the same way."""

    pixels: range  # of the first output
    outputs: int


def _runs(size: int, window: int, stride: int, padding: int) -> list[_Run]:
    starts = range(-padding, size + padding - window + 1, stride)
    inside = groupby(starts, lambda start: (max(0, -start), min(window, size - start)))
    return [
        _Run(range(first + low, first + high), 1 + len(rest))
        for (low, high), (first, *rest) in inside
    ]


def _part(x: jax.Array, row: _Run, column: _Run, stride: int) -> jax.Array:
    tall, wide = (stride * (run.outputs - 1) + 1 for run in (row, column))
    taps = [
        x[:, i : i + tall : stride, j : j + wide : stride]
        for i in row.pixels
        for j in column.pixels
    ]
    # without the barrier it is computed pixel by pixel while the parts are concatenated
    return lax.optimization_barrier(reduce(jnp.maximum, taps))


def _forward(x: jax.Array, window: int, stride: int, padding: int) -> tuple[Any, tuple[Any, Any]]:
    y = max_pool(x, window, stride, padding)
    return y, (x, y)


def _backward(
    window: int, stride: int, padding: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array]:
    x, y = kept
    free = jnp.ones(y.shape, bool)
    shares: list[list[jax.Array]] = []
    for row in taps_of(x, window, stride, padding, -jnp.inf):
        shares.append([])
        for tap in row:
            here = free & (tap == y)
            free &= ~here
            shares[-1].append(jnp.where(here, dy, 0))
    return (taps_added(shares, (x.shape[1], x.shape[2]), stride, padding),)


max_pool.defvjp(_forward, _backward)
