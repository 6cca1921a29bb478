"""Limits, extremes, norms and attention with PyTorch's derivatives, also where values are equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_resblock.nn.conv import in_memory


def clamp(x: jax.Array, min: float | None = None, max: float | None = None) -> jax.Array:
    """``x`` within limits, as ``torch.clamp``.

    The derivative at a limit is one, where ``jnp.clip`` has one half.

    Args:
      x: Any shape.
      min, max: The limits; None for no limit. Where ``min`` exceeds ``max``, all is ``max``.
    """
    if min is not None:
        x = jnp.where(x < min, min, x)
    return x if max is None else jnp.where(x > max, max, x)


def amax(x: jax.Array, axis: int | Sequence[int] | None = None, *, keepdims: bool = False) -> Any:
    """The greatest values along axes, as ``torch.amax``, which divides the gradient among values
    that are equal.

    The gradient finds them by comparison. ``jnp.max`` loses some of it, or divides by zero, where
    XLA computes ``x`` once more for the comparison and rounds it otherwise, as it does on a CPU.

    Args:
      x: Any shape.
      axis: The axes that go; None: all.
      keepdims: Whether they stay, with length 1.
    """
    return jnp.max(in_memory(x), axis, keepdims=keepdims)


def amin(x: jax.Array, axis: int | Sequence[int] | None = None, *, keepdims: bool = False) -> Any:
    """The least values along axes, as ``torch.amin``; see :func:`amax`."""
    return jnp.min(in_memory(x), axis, keepdims=keepdims)


def maximum_along(x: jax.Array, axis: int, *, keepdims: bool = False) -> jax.Array:
    """The greatest values along an axis, as ``torch.max(x, axis)[0]``.

    If values are equal, the first one receives the gradient; :func:`amax` divides it among
    them.

    Args:
      x: Any shape.
      axis: The axis that goes.
      keepdims: Whether it stays, with length 1.
    """
    return _picked(x, jnp.argmax(x, axis, keepdims=True), axis, keepdims)


def minimum_along(x: jax.Array, axis: int, *, keepdims: bool = False) -> jax.Array:
    """The least values along an axis, as ``torch.min(x, axis)[0]``; see :func:`maximum_along`."""
    return _picked(x, jnp.argmin(x, axis, keepdims=True), axis, keepdims)


def _picked(x: jax.Array, index: jax.Array, axis: int, keepdims: bool) -> jax.Array:
    picked = jnp.take_along_axis(x, index, axis)
    return picked if keepdims else jnp.squeeze(picked, axis)


def vector_norm(
    x: jax.Array, axis: int | tuple[int, ...], *, order: int = 2, keepdims: bool = False
) -> jax.Array:
    """The norm of ``x`` along axes, as ``torch.linalg.vector_norm``; its derivative at
    zero is zero.

    Args:
      x: Any shape.
      axis: The axes that go.
      order: 1 for the sum of magnitudes, 2 for the root of the sum of squares.
      keepdims: Whether the axes stay, with length 1.
    Raises:
      ValueError: Another order.
    """
    if order not in (1, 2):
        raise ValueError(f"vector_norm needs order 1 or 2; got {order}.")
    if order == 1:
        return jnp.sum(jnp.abs(x), axis, keepdims=keepdims)
    total = jnp.sum(jnp.square(x), axis, keepdims=keepdims)
    some = jnp.where(total > 0, total, 1)  # the root has no derivative at zero
    return jnp.where(total > 0, jnp.sqrt(some), total)


def cosine_similarity(x: jax.Array, y: jax.Array, axis: int = -1, eps: float = 1e-8) -> jax.Array:
    """The cosine of the angle between vectors, as ``torch.nn.functional.cosine_similarity``.

    Args:
      x, y: Any shapes that broadcast.
      axis: Of the vectors, which goes.
      eps: The least norm that a vector is divided by; the derivative is that of its own norm.
    """

    def scaled(x: jax.Array) -> jax.Array:
        norm = vector_norm(x, axis, keepdims=True)
        return x / (norm + jax.lax.stop_gradient(jnp.maximum(norm, eps) - norm))

    x, y = jnp.broadcast_arrays(x, y)
    return jnp.sum(scaled(x) * scaled(y), axis)


def scaled_dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float | None = None
) -> jax.Array:
    r"""Attention, as ``torch.nn.functional.scaled_dot_product_attention`` without a mask.

    .. math:: softmax(s q k^T) v

    Args:
      query: ``(..., M, D)``.
      key: ``(..., L, D)``.
      value: ``(..., L, E)``.
      scale: The factor :math:`s`; None: :math:`1 / \sqrt{D}`.
    Returns:
      ``(..., M, E)``.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return jax.nn.softmax(factor * query @ jnp.swapaxes(key, -1, -2), axis=-1) @ value
