"""Max pooling on a CPU: the greatest of the window's pixels, each a strided slice, and a gradient that compares them instead of searching the window."""

from __future__ import annotations

from functools import partial, reduce

import jax
import jax.numpy as jnp

from flax_resblock.lowering.products import taps_added, taps_of


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    """``(N, H, W, C)`` to ``(N, H', W', C)``, equal to ``torch.nn.MaxPool2d``; of equal pixels the first one has the gradient.

    Args:
      x: Floating.
      window, stride, padding: In pixels, square.
    """
    return _greatest(x, window, stride, padding)


def _greatest(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    return reduce(jnp.maximum, [tap for row in taps_of(x, window, stride, padding, -jnp.inf) for tap in row])


def _forward(x: jax.Array, window: int, stride: int, padding: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _greatest(x, window, stride, padding)
    return y, (x, y)


def _backward(window: int, stride: int, padding: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
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
