"""Normalisation as functions: by given statistics, over groups, features, images and neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def per_channel(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts ``(C,)`` to ``(..., W, C)`` in two steps, so that its gradient is summed in two
    steps: over the rows, then over the rest.

    XLA's CPU backend adds values one after the other: the rounding error of one long sum grows with
    its length, while PyTorch adds in a cascade. The barrier keeps the compiler from merging the two
    sums."""
    if len(shape) < 3:
        return jnp.broadcast_to(values, shape)
    rows = jnp.broadcast_to(values, (*shape[:-2], 1, shape[-1]))
    return jnp.broadcast_to(lax.optimization_barrier(rows), shape)


def broadcast_over(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts factors or terms of an activation to its ``shape``; where they are narrower than
    float32, so that their gradient, a sum over that shape, is added in float32 as PyTorch adds it.

    XLA adds values in the dtype that they have: a sum of 270 in bfloat16 errs six times as much."""
    if values.dtype.itemsize >= 4:
        return values
    return jnp.broadcast_to(values.astype(jnp.float32), shape).astype(values.dtype)


def batch_norm(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """Normalises by given statistics, as ``torch.nn.functional.batch_norm`` in evaluation.

    Args:
      x: ``(..., C)``, float32 or wider, as are the others, ``(C,)``.
      mean, var: The statistics.
      scale, bias: The affine map that follows; None leaves it out.
      eps: Added to the variance.
    """
    inverse = lax.rsqrt(var + eps)
    y = (x - per_channel(mean, x.shape)) * per_channel(
        inverse if scale is None else inverse * scale, x.shape
    )
    return y if bias is None else y + per_channel(bias, x.shape)


def normalised(x: jax.Array, axes: Sequence[int], eps: float) -> jax.Array:
    """``x`` minus its mean, divided by its standard deviation; both over ``axes``, the variance
    biased, computed in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - _mean(wide, axes)
    return (centred * lax.rsqrt(_mean(jnp.square(centred), axes) + eps)).astype(x.dtype)


def _mean(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The mean over axes, which stay with length 1. Over axes that are not neighbours it is taken
    in two steps: XLA's single sum over all of them is twenty times less accurate on a CPU."""
    if axes[-1] - axes[0] == len(axes) - 1:
        return jnp.mean(x, axes, keepdims=True)
    return jnp.mean(jnp.mean(x, axes[:-1], keepdims=True), axes[-1], keepdims=True)


def affine(x: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """``x * scale + bias``, without those that are None."""
    y = x if scale is None else x * scale
    return y if bias is None else y + bias


def group_norm(
    x: jax.Array,
    num_groups: int,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """``torch.nn.functional.group_norm``: normalises each image's groups of channels.

    Args:
      x: ``(N, *spatial, C)``.
      num_groups: Must divide ``C``.
      scale, bias: ``(C,)``, or None.
      eps: Added to the variance.
    """
    parts = x.reshape(*x.shape[:-1], num_groups, x.shape[-1] // num_groups)
    axes = (*range(1, x.ndim - 1), x.ndim)
    return affine(normalised(parts, axes, eps).reshape(x.shape), scale, bias)


def layer_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
    axes: int = 1,
) -> jax.Array:
    """``torch.nn.functional.layer_norm``: normalises over the last axes.

    Args:
      x: ``(..., *shape)``.
      scale, bias: ``shape``, or None.
      eps: Added to the variance.
      axes: The number of axes of ``shape``.
    """
    return affine(normalised(x, range(x.ndim - axes, x.ndim), eps), scale, bias)


def instance_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """``torch.nn.functional.instance_norm``: normalises each channel of each image.

    Args:
      x: ``(N, *spatial, C)``.
      scale, bias: ``(C,)``, or None.
      eps: Added to the variance.
    Raises:
      ValueError: One pixel alone, which PyTorch refuses too.
    """
    refuse_single_pixel(x)
    return affine(normalised(x, range(1, x.ndim - 1), eps), scale, bias)


def weight_norm(direction: jax.Array, scale: jax.Array) -> jax.Array:
    r"""A kernel with its norms apart, as in ``torch.nn.utils.weight_norm``.

    .. math:: w = g \frac{v}{\lVert v \rVert}

    Args:
      direction: ``v``.
      scale: ``g``, the norms: one for all of ``v``, or with as many axes as ``v`` and of size 1 in
        those that a norm is over.
    Reference: Salimans & Kingma 2016, arXiv:1602.07868.
    """
    sizes = scale.shape or (1,) * direction.ndim
    axes = tuple(axis for axis, size in enumerate(sizes) if size == 1)
    return direction * (scale / jnp.sqrt(jnp.sum(jnp.square(direction), axes, keepdims=True)))


def local_response_norm(
    x: jax.Array, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> jax.Array:
    r"""``torch.nn.functional.local_response_norm``.

    .. math:: y_c = x_c \left(k + \frac{\alpha}{size} \sum_{c'} x_{c'}^2\right)^{-\beta}

    Args:
      x: ``(..., C)``.
      size: The number of neighbouring channels in the sum.
      alpha, beta, k: As in the formula.
    """
    sums = lax.reduce_window(
        jnp.square(x),
        np.zeros((), x.dtype),
        lax.add,
        (*(1 for _ in x.shape[:-1]), size),
        (1,) * x.ndim,
        (*((0, 0) for _ in x.shape[:-1]), (size // 2, (size - 1) // 2)),
    )
    return x / (sums / size * alpha + k) ** beta


def refuse_single_pixel(x: jax.Array) -> None:
    if all(size == 1 for size in x.shape[1:-1]):
        raise ValueError(
            f"InstanceNorm needs more than one pixel in an image; the input has shape "
            f"{tuple(x.shape)}."
        )
