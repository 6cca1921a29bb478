"""Convolutions as matrix products: of the pixels of a 1x1 kernel, or one for every tap of a larger one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def _visited(x: jax.Array, stride: int) -> jax.Array:
    """The pixels that a 1x1 convolution looks at, ``(N, H', W', C)``."""
    return x if stride == 1 else x[:, ::stride, ::stride]


def pointwise(x: jax.Array, kernel: jax.Array, stride: int, precision: lax.PrecisionLike) -> jax.Array:
    """``(N, H, W, C)`` by ``(1, 1, C, O)`` to ``(N, H', W', O)``, without padding."""
    pixels = _visited(x, stride)
    return jnp.dot(pixels.reshape(-1, pixels.shape[-1]), kernel[0, 0], precision=precision).reshape(*pixels.shape[:3], -1)


def pointwise_kernel_gradient(x: jax.Array, dy: jax.Array, stride: int, precision: lax.PrecisionLike) -> jax.Array:
    """``(1, 1, C, O)`` from ``(N, H, W, C)`` and ``(N, H', W', O)``."""
    pixels = _visited(x, stride).reshape(-1, x.shape[-1])
    return lax.dot_general(pixels, dy.reshape(-1, dy.shape[-1]), (((0,), (0,)), ((), ())), precision=precision)[None, None]


def pointwise_input_gradient(dy: jax.Array, kernel: jax.Array, size: tuple[int, int], stride: int, precision: lax.PrecisionLike) -> jax.Array:
    """``(N, H, W, C)``, ``size`` its height and width, from ``(N, H', W', O)`` and ``(1, 1, C, O)``."""
    pixels = lax.dot_general(dy.reshape(-1, dy.shape[-1]), kernel[0, 0], (((1,), (1,)), ((), ())), precision=precision).reshape(*dy.shape[:3], -1)
    if stride == 1:
        return pixels
    ends = [(0, whole - (stride * (seen - 1) + 1), stride - 1) for whole, seen in zip(size, dy.shape[1:3], strict=True)]
    return lax.pad(pixels, jnp.zeros((), pixels.dtype), ((0, 0, 0), *ends, (0, 0, 0)))


def kernel_gradient(x: jax.Array, dy: jax.Array, taps: int, stride: int, padding: int, precision: lax.PrecisionLike) -> jax.Array:
    """``(k, k, C, O)`` from ``(N, H, W, C)`` and ``(N, H', W', O)``: one product for every tap, of the pixels that it sees."""
    ends = [(padding, stride * (seen - 1) + taps - whole - padding, 0) for seen, whole in zip(dy.shape[1:3], x.shape[1:3], strict=True)]
    # what computes x is fused into one copy with its border, and not into each of the products
    padded, dy = lax.optimization_barrier((lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0))), dy))
    tall, wide = (stride * (seen - 1) + 1 for seen in dy.shape[1:3])

    def of_tap(row: int, column: int) -> jax.Array:
        return pointwise_kernel_gradient(padded[:, row : row + tall : stride, column : column + wide : stride], dy, 1, precision)

    return jnp.concatenate([jnp.concatenate([of_tap(row, column) for column in range(taps)], axis=1) for row in range(taps)], axis=0)


def input_gradient(dy: jax.Array, kernel: jax.Array, size: tuple[int, int], stride: int, padding: int, precision: lax.PrecisionLike) -> jax.Array:
    """Of a ``k`` by ``k`` kernel: one product gives every tap's share ``(N, H', W', k, k, C)``, which are then added where they overlap.

    Args:
      dy: ``(N, H', W', O)``.
      kernel: ``(k, k, C, O)``.
      size: Height and width of the result ``(N, H, W, C)``.
      stride, padding: Of the convolution.
      precision: Of the product.
    """
    n, tall, wide, channels = dy.shape
    taps, inner = kernel.shape[0], kernel.shape[2]
    shares = lax.dot_general(dy.reshape(-1, channels), kernel.reshape(-1, channels), (((1,), (1,)), ((), ())), precision=precision)
    shares = shares.reshape(n, tall, wide, taps, taps, inner)
    rows = [overlapped([shares[:, :, :, i, j] for j in range(taps)], stride, axis=2) for i in range(taps)]
    padded = overlapped(rows, stride, axis=1)
    ends = [(-padding, padding + whole - had, 0) for whole, had in zip(size, padded.shape[1:3], strict=True)]
    return lax.pad(padded, jnp.zeros((), padded.dtype), ((0, 0, 0), *ends, (0, 0, 0)))


def overlapped(parts: list[jax.Array], stride: int, axis: int) -> jax.Array:
    """Adds ``parts[i]``, whose pixel ``t`` belongs at ``stride * t + i``: first within each phase of the stride, then the phases are interleaved."""
    most = (len(parts) - 1) // stride
    phases = []
    for phase in range(stride):
        shares = []
        for shift, part in enumerate(parts[phase::stride]):
            config = [(0, 0, 0)] * part.ndim
            config[axis] = (shift, most - shift, 0)
            shares.append(lax.pad(part, jnp.zeros((), part.dtype), config))
        phases.append(sum(shares[1:], shares[0]))
    whole = jnp.stack(phases, axis + 1)
    shape = list(phases[0].shape)
    shape[axis] *= stride
    return whole.reshape(shape)
