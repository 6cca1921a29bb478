r"""Winograd's F(2x2, 3x3): a 3x3 convolution with 4/9 of the multiplications, as sixteen matrix
products (Lavin & Gray 2016, arXiv:1509.09308).

The image is cut into tiles of 4x4 pixels that overlap by two, each gives 2x2 outputs. In one
dimension

.. math:: y = A^T [(G w) \odot (B^T x)]

and in two the matrices are applied to rows and columns. All entries are 0, 1, -1 and 1/2, so that
rounding stays as small as that of the direct sum. The gradients are the transposed map: with
:math:`V = B^T x B`, :math:`U = G w G^T` and :math:`D = A\,dy\,A^T`, the kernel's is :math:`G^T (V^T
D) G` and the input's :math:`B\,(D U^T) B^T`, tiles added where they overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_resblock.cpu.materialised import materialised
from flax_resblock.cpu.products import product

_Rows = Sequence[jax.Array]
_Grid = list[list[jax.Array]]

WHOLE_BYTES, PART_BYTES = 64 << 20, 16 << 20
"""Bytes of a kernel gradient's matrices: the most at once, and of a part beyond that."""


def _b_transposed(x: _Rows) -> _Rows:
    return x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]


def _b(v: _Rows) -> _Rows:
    return v[0], v[1] - v[2] + v[3], v[1] + v[2] - v[0], -v[3]


def _a_transposed(m: _Rows) -> _Rows:
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _a(y: _Rows) -> _Rows:
    return y[0], y[0] + y[1], y[0] - y[1], -y[1]


def _g(w: _Rows) -> _Rows:
    ends = w[0] + w[2]
    return w[0], (ends + w[1]) * 0.5, (ends - w[1]) * 0.5, w[2]


def _g_transposed(u: _Rows) -> _Rows:
    half_sum = (u[1] + u[2]) * 0.5
    return u[0] + half_sum, (u[1] - u[2]) * 0.5, half_sum + u[3]


def _both_ways(transform: Callable[[_Rows], _Rows], grid: Iterable[_Rows]) -> list[_Rows]:
    """Transforms the columns of a grid, and then its rows."""
    columns = [transform(column) for column in zip(*grid, strict=True)]
    return [transform(row) for row in zip(*columns, strict=True)]


def _paired(multiply: Callable[[Any, Any], jax.Array], left: _Grid, right: _Grid) -> _Grid:
    """The products of the matrices at the same place of two grids."""
    return [list(map(multiply, *rows)) for rows in zip(left, right, strict=True)]


def _tiles(size: int) -> int:
    return -(-size // 2)


def _input_tiles(x: jax.Array) -> _Grid:
    """``V``: sixteen matrices ``(tiles, C)``."""
    _, height, width, channels = x.shape
    tall, wide = _tiles(height), _tiles(width)
    # one copy with its border, into which whatever computes x is fused; without the barrier each of
    # the sixteen would compute x again
    padded = lax.optimization_barrier(
        jnp.pad(x, ((0, 0), (1, 2 * tall + 1 - height), (1, 2 * wide + 1 - width), (0, 0)))
    )
    rows = _b_transposed([padded[:, i : i + 2 * tall - 1 : 2] for i in range(4)])
    return [
        [
            tile.reshape(-1, channels)
            for tile in _b_transposed([row[:, :, j : j + 2 * wide - 1 : 2] for j in range(4)])
        ]
        for row in rows
    ]


def _output_tiles(dy: jax.Array) -> _Grid:
    """``D``: sixteen matrices ``(tiles, O)``."""
    n, height, width, channels = dy.shape
    tall, wide = _tiles(height), _tiles(width)
    if (2 * tall, 2 * wide) != (height, width):
        dy = jnp.pad(dy, ((0, 0), (0, 2 * tall - height), (0, 2 * wide - width), (0, 0)))
    pairs = materialised(dy).reshape(n, tall, 2, wide, 2, channels)
    rows = _a([pairs[:, :, 0], pairs[:, :, 1]])
    return [
        [tile.reshape(-1, channels) for tile in _a([row[:, :, :, 0], row[:, :, :, 1]])]
        for row in rows
    ]


def transform_kernel(kernel: jax.Array) -> _Grid:
    """``U``: sixteen matrices ``(C, O)`` of a kernel ``(3, 3, C, O)``."""
    return [list(_g([row[j] for j in range(3)])) for row in _g([kernel[i] for i in range(3)])]


def _interleave(phases: Sequence[_Rows], shape: tuple[int, ...]) -> jax.Array:
    """Phases ``(N, tall, wide, C)`` of rows and columns as one image of ``shape``, cut to it."""
    n, tall, wide, channels = phases[0][0].shape
    whole = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2).reshape(
        n, 2 * tall, 2 * wide, channels
    )
    return whole[:, : shape[1], : shape[2]]


def convolve(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """``(N, H, W, C)`` by ``(3, 3, C, O)`` to ``(N, H, W, O)``; stride 1, one pixel of padding."""
    return convolve_transformed(x, transform_kernel(kernel), precision)


def convolve_transformed(
    x: jax.Array, transformed: _Grid, precision: lax.PrecisionLike
) -> jax.Array:
    """:func:`convolve` with a kernel that :func:`transform_kernel` has transformed."""
    n, height, width, _ = x.shape
    products = _paired(partial(jnp.dot, precision=precision), _input_tiles(x), transformed)
    shape = (n, _tiles(height), _tiles(width), -1)
    phases = [[y.reshape(shape) for y in row] for row in _both_ways(_a_transposed, products)]
    return _interleave(phases, (n, height, width))


def kernel_gradient(x: jax.Array, dy: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """Gradient ``(3, 3, C, O)`` from input and output gradient, both ``(N, H, W, _)``."""
    rows = _both_ways(_g_transposed, _products_in_parts(x, dy, precision))
    return materialised(jnp.stack([jnp.stack(row) for row in rows]))


def _products(x: jax.Array, dy: jax.Array, precision: lax.PrecisionLike) -> _Grid:
    """``V^T D``: sixteen matrices ``(C, O)``."""
    tiles, gradients = _input_tiles(x), _output_tiles(dy)
    return _paired(lambda v, d: product(v, d, (0, 0), precision), tiles, gradients)


def _products_in_parts(x: jax.Array, dy: jax.Array, precision: lax.PrecisionLike) -> _Grid:
    """:func:`_products`. If ``V`` and ``D`` take more than :data:`WHOLE_BYTES`, a loop adds the
    products of a few images at a time, whose matrices stay in the cache.
    """
    n, height, width, _ = x.shape
    image = 16 * _tiles(height) * _tiles(width) * (x.shape[3] + dy.shape[3]) * x.dtype.itemsize
    if not isinstance(n, int) or n * image <= WHOLE_BYTES:
        return _products(x, dy, precision)
    images = max(1, PART_BYTES // image)

    def added(part: jax.Array, sums: _Grid) -> _Grid:
        seen, gradient = (
            lax.dynamic_slice_in_dim(array, part * images, images) for array in (x, dy)
        )
        return jax.tree.map(jnp.add, sums, _products(seen, gradient, precision))

    rest = n - n % images  # where no image is left over, these products are zero
    return lax.fori_loop(0, n // images, added, _products(x[rest:], dy[rest:], precision))


def input_gradient(dy: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """Gradient ``(N, H, W, C)`` from output gradient and kernel ``(3, 3, C, O)``."""
    n, height, width, _ = dy.shape
    gradients, transformed = _output_tiles(dy), transform_kernel(kernel)
    shape = (n, _tiles(height), _tiles(width), kernel.shape[2])
    products = _paired(
        lambda d, u: product(d, u, (1, 1), precision).reshape(shape), gradients, transformed
    )
    down = [_overlap(column, axis=1) for column in zip(*_both_ways(_b, products), strict=True)]
    phases = [_overlap(row, axis=2) for row in zip(*down, strict=True)]
    return materialised(_interleave(phases, (n, height, width)))


def _overlap(parts: _Rows, axis: int) -> _Rows:
    """Adds tiles of four pixels, two apart, without the border: even and odd pixels."""
    return parts[1] + shifted(parts[3], 1, axis), parts[2] + shifted(parts[0], -1, axis)


def shifted(values: jax.Array, by: int, axis: int) -> jax.Array:
    """Moves values along an axis of the same length; zeros move in."""
    config = [(0, 0, 0)] * values.ndim
    config[axis] = (by, -by, 0)
    return lax.pad(values, jnp.zeros((), values.dtype), config)
