"""Convolutions as matrix products: one for a 1x1 kernel, one for each tap of a larger kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_resblock.cpu.materialised import materialised


class Geometry(NamedTuple):
    """What the input, kernel and output of a convolution do not determine, each in two of its maps.

    Attributes:
      image: Height and width of the convolution's input.
      stride, padding: In pixels.
    """

    image: tuple[int, int]
    taps: int
    stride: int
    padding: int
    precision: Any


def product(left: jax.Array, right: jax.Array, axes: tuple[int, int], precision: Any) -> jax.Array:
    """The product of two matrices over one axis of each."""
    contracted = ((axes[:1], axes[1:]), ((), ()))
    return lax.dot_general(left, right, contracted, precision=precision)


def _visited(x: jax.Array, stride: int) -> jax.Array:
    """The pixels that a 1x1 convolution reads, ``(N, H', W', C)``."""
    return x if stride == 1 else x[:, ::stride, ::stride]


def pointwise(
    x: jax.Array, kernel: jax.Array, stride: int, precision: lax.PrecisionLike
) -> jax.Array:
    """``(N, H, W, C)`` by ``(1, 1, C, O)`` to ``(N, H', W', O)``, without padding."""
    pixels = _visited(x, stride)
    flat = jnp.dot(pixels.reshape(-1, pixels.shape[-1]), kernel[0, 0], precision=precision)
    return flat.reshape(*pixels.shape[:3], -1)


def pointwise_kernel_gradient(
    x: jax.Array, dy: jax.Array, stride: int, precision: lax.PrecisionLike
) -> jax.Array:
    """``(1, 1, C, O)`` from ``(N, H, W, C)`` and ``(N, H', W', O)``."""
    pixels = _visited(x, stride).reshape(-1, x.shape[-1])
    return product(pixels, dy.reshape(-1, dy.shape[-1]), (0, 0), precision)[None, None]


def pointwise_input_gradient(dy: jax.Array, kernel: jax.Array, of: Geometry) -> jax.Array:
    """``(N, H, W, C)`` from ``(N, H', W', O)`` and ``(1, 1, C, O)``."""
    pixels = product(dy.reshape(-1, dy.shape[-1]), kernel[0, 0], (1, 1), of.precision)
    pixels = pixels.reshape(*dy.shape[:3], -1)
    if of.stride == 1:
        return pixels
    ends = [
        (0, whole - (of.stride * (seen - 1) + 1), of.stride - 1)
        for whole, seen in zip(of.image, dy.shape[1:3], strict=True)
    ]
    return lax.pad(pixels, jnp.zeros((), pixels.dtype), ((0, 0, 0), *ends, (0, 0, 0)))


def taps_of(
    x: jax.Array, taps: int, stride: int, padding: int, border: float
) -> list[list[jax.Array]]:
    """The pixels that the outputs read at each row and column of a ``taps`` by ``taps`` window,
    each ``(N, H', W', C)``; ``border`` is the padding's value.

    The computation of ``x`` is fused into one padded copy, not into each of the slices.
    """
    last = [(size + 2 * padding - taps) // stride for size in x.shape[1:3]]
    ends = [
        (padding, stride * end + taps - size - padding, 0)
        for end, size in zip(last, x.shape[1:3], strict=True)
    ]
    padded = lax.optimization_barrier(
        lax.pad(x, jnp.array(border, x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
    )
    tall, wide = (stride * end + 1 for end in last)
    return [
        [
            padded[:, row : row + tall : stride, column : column + wide : stride]
            for column in range(taps)
        ]
        for row in range(taps)
    ]


def taps_added(
    shares: list[list[jax.Array]], size: tuple[int, int], stride: int, padding: int
) -> jax.Array:
    """The transpose of :func:`taps_of`: adds each share ``(N, H', W', C)`` to its pixels."""
    padded = _overlapped([_overlapped(row, stride, axis=2) for row in shares], stride, axis=1)
    ends = [
        (-padding, padding + whole - had, 0)
        for whole, had in zip(size, padded.shape[1:3], strict=True)
    ]
    return lax.pad(padded, jnp.zeros((), padded.dtype), ((0, 0, 0), *ends, (0, 0, 0)))


def kernel_gradient(x: jax.Array, dy: jax.Array, of: Geometry) -> jax.Array:
    """``(k, k, C, O)`` from ``(N, H, W, C)`` and ``(N, H', W', O)``, by one product per tap."""
    dy = materialised(dy)
    seen = taps_of(x, of.taps, of.stride, of.padding, 0)
    taken = ([pointwise_kernel_gradient(tap, dy, 1, of.precision) for tap in row] for row in seen)
    return jnp.concatenate([jnp.concatenate(row, axis=1) for row in taken])


def input_gradient(dy: jax.Array, kernel: jax.Array, of: Geometry) -> jax.Array:
    """``(N, H, W, C)`` from ``(N, H', W', O)`` and ``(k, k, C, O)``: one product gives every tap's
    share ``(N, H', W', k, k, C)``, which are then added where they overlap."""
    channels, taps = dy.shape[-1], of.taps
    shares = product(
        dy.reshape(-1, channels), kernel.reshape(-1, channels), (1, 1), of.precision
    ).reshape(*dy.shape[:3], taps, taps, -1)
    parts = [[shares[:, :, :, i, j] for j in range(taps)] for i in range(taps)]
    return materialised(taps_added(parts, of.image, of.stride, of.padding))


def _overlapped(parts: list[jax.Array], stride: int, axis: int) -> jax.Array:
    """Adds ``parts[i]``, whose pixel ``t`` belongs at ``stride * t + i``: first within each phase
    of the stride, then the phases are interleaved.
    """
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
