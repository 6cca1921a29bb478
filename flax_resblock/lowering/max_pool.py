"""Max pooling on a CPU: the greatest of the window's pixels, each a strided slice, and a gradient that compares them instead of searching the window."""

from __future__ import annotations

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

from flax_resblock.lowering.products import overlapped


def _taps(x: jax.Array, window: int, stride: int, padding: int) -> list[list[jax.Array]]:
    """What every output pixel sees, by row and column of the window, each ``(N, H', W', C)``."""
    seen = [(size + 2 * padding - window) // stride for size in x.shape[1:3]]
    ends = [(padding, stride * last + window - size - padding, 0) for last, size in zip(seen, x.shape[1:3], strict=True)]
    padded = lax.optimization_barrier(lax.pad(x, jnp.array(-jnp.inf, x.dtype), ((0, 0, 0), *ends, (0, 0, 0))))
    tall, wide = (stride * last + 1 for last in seen)
    return [[padded[:, i : i + tall : stride, j : j + wide : stride] for j in range(window)] for i in range(window)]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    """``(N, H, W, C)`` to ``(N, H', W', C)``, equal to ``torch.nn.MaxPool2d``; of equal pixels the first one has the gradient.

    Args:
      x: Floating.
      window, stride, padding: In pixels, square.
    """
    return _greatest(x, window, stride, padding)


def _greatest(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    return reduce(jnp.maximum, [tap for row in _taps(x, window, stride, padding) for tap in row])


def _forward(x: jax.Array, window: int, stride: int, padding: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _greatest(x, window, stride, padding)
    return y, (x, y)


def _backward(window: int, stride: int, padding: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    x, y = kept
    free = jnp.ones(y.shape, bool)
    shares: list[list[jax.Array]] = []
    for row in _taps(x, window, stride, padding):
        shares.append([])
        for tap in row:
            here = free & (tap == y)
            free &= ~here
            shares[-1].append(jnp.where(here, dy, 0))
    padded = overlapped([overlapped(row, stride, axis=2) for row in shares], stride, axis=1)
    ends = [(-padding, padding + size - had, 0) for size, had in zip(x.shape[1:3], padded.shape[1:3], strict=True)]
    return (lax.pad(padded, jnp.zeros((), dy.dtype), ((0, 0, 0), *ends, (0, 0, 0))),)


max_pool.defvjp(_forward, _backward)
