"""PyTorch's weight initialisations, for Flax kernels.

Flax's own defaults differ from PyTorch's (``lecun_normal``, truncated), so networks trained from
scratch would start from another distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[Any, Sequence[int], Any], jax.Array]
InitName = Literal["torch_default", "kaiming_fan_out"]

_SHORTEST = 1024
"""Random numbers that are drawn at least."""


def drawn(draw: Callable[..., jax.Array], key: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
    """What ``draw(key, shape, dtype)`` gives, by a program of one axis and a power of 2 in length.

    Such a program compiles up to twenty times faster than one of four axes, and the kernels of a
    network share a few. Jax's numbers depend on the index alone (``jax_threefry_partitionable``,
    its default), so they are the same to the last bit.
    """
    size = math.prod(shape)
    longer = max(_SHORTEST, 1 << (size - 1).bit_length())
    return draw(key, (longer,), dtype)[:size].reshape(shape)


def torch_default(key: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
    """``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``, as ``nn.Conv2d`` and ``nn.Linear`` start."""
    values = drawn(partial(jax.random.uniform, minval=-1), key, shape, dtype)
    return values * jnp.sqrt(3 * jnp.array(1 / 3 / math.prod(shape[:-1]), dtype))


def kaiming_fan_out(key: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
    """``N(0, 2/fan_out)``, not truncated: ``kaiming_normal_(mode='fan_out', nonlinearity='relu')``,
    torchvision's choice (He et al. 2015, arXiv:1502.01852).
    """
    fan_out = math.prod(shape[:-2]) * shape[-1]
    return drawn(jax.random.normal, key, shape, dtype) * jnp.sqrt(jnp.array(2.0 / fan_out, dtype))


INITIALIZERS = {"torch_default": torch_default, "kaiming_fan_out": kaiming_fan_out}


def uniform_bias(fan_in: int) -> Initializer:
    """``U(-1/sqrt(fan_in), 1/sqrt(fan_in))`` for a bias, as ``nn.Linear`` draws it.

    Args:
      fan_in: Number of inputs of the layer that the bias belongs to.
    """
    bound = fan_in**-0.5

    def init(key: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
        return drawn(partial(jax.random.uniform, minval=-bound, maxval=bound), key, shape, dtype)

    return init


def initial_value(
    init: Initializer, rngs: nnx.Rngs | None, shape: Sequence[int], dtype: Any
) -> Any:
    """A freshly drawn array, or only its shape and dtype when ``rngs`` is None.

    A module built with ``rngs=None`` is abstract: it costs no arithmetic and no memory, and the
    converter fills it."""
    if rngs is None:
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
    return init(rngs.params(), shape, dtype)
