"""Layers that draw random numbers in training mode; ``model.eval()`` switches them off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resblock.nn.activations import leaky_relu
from flax_resblock.nn.scopes import in_slot

Dropout = nnx.Dropout
_ALPHA = 1.7580993408473766
"""The limit of SELU for large negative numbers, with the sign reversed."""


class _Random(nnx.Module):
    """A stream of its own, and the switch that ``model.train()`` and ``model.eval()`` turn."""

    def __init__(self, rngs: nnx.Rngs | None) -> None:
        self.deterministic = False
        self.rngs = nnx.data(None if rngs is None else rngs.dropout.fork())

    def _key(self) -> jax.Array:
        if self.rngs is None:
            raise ValueError(
                f"{type(self).__name__} was built with rngs=None and draws no random numbers. "
                f"Build it with rngs=nnx.Rngs(seed), or evaluate with model.eval()."
            )
        return self.rngs()


class AlphaDropout(_Random):
    """Dropout that keeps mean and variance of what SELU returns, as ``torch.nn.AlphaDropout``.

    Args:
      rate: The probability of dropping a value.
      broadcast_dims: Axes along which values are dropped together.
      rngs: Source of the ``dropout`` stream.
    """

    def __init__(
        self, rate: float, *, broadcast_dims: Sequence[int] = (), rngs: nnx.Rngs | None
    ) -> None:
        super().__init__(rngs)
        self.rate = rate
        self.broadcast_dims = tuple(broadcast_dims)

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape to the same shape."""
        if self.deterministic or self.rate == 0:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)
        shape = [1 if axis in self.broadcast_dims else n for axis, n in enumerate(x.shape)]
        keep = jax.random.bernoulli(self._key(), 1 - self.rate, shape)
        scale = ((_ALPHA**2 * self.rate + 1) * (1 - self.rate)) ** -0.5
        return jnp.where(keep, x, -_ALPHA) * scale + scale * _ALPHA * self.rate


class StochasticDepth(_Random):
    """Drops a residual branch, as ``torchvision.ops.StochasticDepth``; what stays is divided by the
    probability of staying (Huang et al. 2016, arXiv:1603.09382).

    Args:
      rate: The probability of dropping.
      mode: ``"row"`` drops each image by itself, ``"batch"`` all of them together.
      scale_by_keep: Whether what stays is divided by its probability.
      rngs: Source of the ``dropout`` stream.
    """

    def __init__(
        self,
        rate: float,
        mode: Literal["row", "batch"] = "row",
        *,
        scale_by_keep: bool = True,
        rngs: nnx.Rngs | None,
    ) -> None:
        if mode not in ("row", "batch") or not 0 <= rate <= 1:
            raise ValueError(
                f"StochasticDepth needs a rate from 0 to 1 and mode 'row' or 'batch'; got "
                f"{rate} and {mode!r}."
            )
        super().__init__(rngs)
        self.rate = rate
        self.mode = mode
        self.scale_by_keep = scale_by_keep

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, ...)`` to the same shape."""
        if self.deterministic or self.rate == 0:
            return x
        stay = 1 - self.rate
        images = x.shape[0] if self.mode == "row" else 1
        keep = jax.random.bernoulli(self._key(), stay, (images, *(1 for _ in x.shape[1:])))
        factor = 1 / stay if self.scale_by_keep and stay > 0 else 1.0
        return jnp.where(keep, x * factor, 0)


class RReLU(_Random):
    """The rectifier with a random slope below zero, as ``torch.nn.RReLU``: uniform between two
    bounds for each value in training mode, their mean in evaluation mode.

    Args:
      lower, upper: The bounds.
      rngs: Source of the ``dropout`` stream.
    """

    def __init__(
        self, lower: float = 1 / 8, upper: float = 1 / 3, *, rngs: nnx.Rngs | None
    ) -> None:
        super().__init__(rngs)
        self.lower = lower
        self.upper = upper

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape to the same shape."""
        if self.deterministic:
            return leaky_relu(x, (self.lower + self.upper) / 2)
        slopes = jax.random.uniform(self._key(), x.shape, x.dtype, self.lower, self.upper)
        return jnp.where(x > 0, x, slopes * x)
