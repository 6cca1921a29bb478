"""Images sampled at places that a network computes, as spatial transformers do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax


def grid_sample(
    x: jax.Array,
    grid: jax.Array,
    mode: Literal["bilinear", "nearest"] = "bilinear",
    padding_mode: Literal["zeros", "border"] = "zeros",
    align_corners: bool = False,
) -> jax.Array:
    """``torch.nn.functional.grid_sample`` of images.

    Args:
      x: ``(N, H, W, C)``.
      grid: ``(N, H', W', 2)``: column and row of every output pixel, from -1 to 1.
      mode: Mean of the four pixels around the place by their distance, or the nearest one.
      padding_mode: Outside the image: zeros, or its nearest pixel.
      align_corners: Whether -1 and 1 are the centres of the corner pixels, instead of their outer
        edges.
    Returns:
      ``(N, H', W', C)``.
    Raises:
      ValueError: Another mode.
    Reference: Jaderberg et al. 2015, arXiv:1506.02025.
    """
    if mode not in ("bilinear", "nearest") or padding_mode not in ("zeros", "border"):
        raise ValueError(f"grid_sample knows no mode {mode!r} with padding_mode {padding_mode!r}.")
    places = []
    for axis, size in ((1, x.shape[1]), (0, x.shape[2])):
        place = grid[..., axis] + 1
        place = place * ((size - 1) / 2) if align_corners else (place * size - 1) / 2
        if padding_mode == "border":  # without a gradient at the edge itself, unlike jnp.clip
            inside = (place > 0) & (place < size - 1)
            place = jnp.where(inside, place, lax.stop_gradient(jnp.clip(place, 0, size - 1)))
        places.append(place)
    if mode == "nearest":
        return _pixels(x, *(jnp.round(place) for place in places))
    (row, column), (top, left) = places, map(jnp.floor, places)
    found = jnp.zeros((*grid.shape[:-1], x.shape[-1]), x.dtype)
    for down, of_row in ((0, top + 1 - row), (1, row - top)):
        for right, of_column in ((0, left + 1 - column), (1, column - left)):
            weight = (of_row * of_column)[..., None]
            found += _pixels(x, top + down, left + right) * weight
    return found


def _pixels(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The pixels at whole places ``(N, H', W')``; zeros outside the image."""
    height, width = x.shape[1:3]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    rows = jnp.clip(rows, 0, height - 1).astype(jnp.int32)
    columns = jnp.clip(columns, 0, width - 1).astype(jnp.int32)
    image = jnp.arange(x.shape[0])[:, None, None]
    return jnp.where(inside[..., None], x[image, rows, columns], 0)


def affine_grid(theta: jax.Array, size: Sequence[int], align_corners: bool = False) -> jax.Array:
    """The places of affine transformations for :func:`grid_sample`, as
    ``torch.nn.functional.affine_grid``.

    Args:
      theta: ``(N, 2, 3)``.
      size: Height and width of the output.
      align_corners: See :func:`grid_sample`.
    Returns:
      ``(N, H', W', 2)``.
    """
    rows, columns = (
        jnp.linspace(-1, 1, n, dtype=theta.dtype) * (1 if align_corners else (n - 1) / n)
        if n > 1
        else jnp.zeros(1, theta.dtype)
        for n in size
    )
    row, column = jnp.meshgrid(rows, columns, indexing="ij")
    places = jnp.stack([column, row, jnp.ones_like(row)], axis=-1)
    return jnp.einsum("hwk,nik->nhwi", places, theta, precision=lax.Precision.HIGHEST)
