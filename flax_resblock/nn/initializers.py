"""PyTorch's weight initialisations, for Flax kernels.

Flax's own defaults differ from PyTorch's (``lecun_normal``, truncated), so networks trained from
scratch would start from another distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[Any, Sequence[int], Any], jax.Array]
InitName = Literal["torch_default", "kaiming_fan_out"]

torch_default: Initializer = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``, as ``nn.Conv2d`` and ``nn.Linear`` start."""

kaiming_fan_out: Initializer = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""``N(0, 2/fan_out)``, not truncated: ``kaiming_normal_(mode='fan_out', nonlinearity='relu')``,
torchvision's choice (He et al. 2015, arXiv:1502.01852).
"""

INITIALIZERS = {"torch_default": torch_default, "kaiming_fan_out": kaiming_fan_out}


def uniform_bias(fan_in: int) -> Initializer:
    """``U(-1/sqrt(fan_in), 1/sqrt(fan_in))`` for a bias, as ``nn.Linear`` draws it.

    Args:
      fan_in: Number of inputs of the layer that the bias belongs to.
    """
    bound = fan_in**-0.5

    def init(key: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

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
