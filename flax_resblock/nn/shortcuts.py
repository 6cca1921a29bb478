"""What the skip connection does: copy, cut and pad, or project, with or without pooling first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resblock.config import BlockConfig
from flax_resblock.nn.layers import Layers
from flax_resblock.nn.pooling import AveragePool
from flax_resblock.nn.scopes import in_slot


class IdentityShortcut(nnx.Module):
    """Copies the input."""

    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """Returns ``x``."""
        return x


class ZeroPadShortcut(nnx.Module):
    """Option A of He et al. 2016: every ``stride``-th pixel, new channels filled with zeros.

    Args:
      front: How many of them stand in front of the old ones.
    """

    def __init__(self, stride: int, extra_channels: int, front: int) -> None:
        self.stride = stride
        self.extra_channels = extra_channels
        self.front = front

    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, ceil(H / stride), ceil(W / stride), C + extra_channels)``."""
        sides = ((0, 0), (0, 0), (0, 0), (self.front, self.extra_channels - self.front))
        return jnp.pad(x[:, :: self.stride, :: self.stride, :], sides)


class ProjectionShortcut(nnx.Module):
    """A convolution with the stride and the channel change, then a norm (option B); in
    pre-activation order without it."""

    def __init__(self, config: BlockConfig, stride: int, layers: Layers) -> None:
        ends, bias = (config.in_channels, config.out_channels), config.shortcut_bias
        self.conv = layers.conv(*ends, config.shortcut_size, stride=stride, use_bias=bias)
        self.norm = None if config.norm_first else layers.norm(config.out_channels)

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, ceil(H / stride), ..., out_channels)``."""
        y = self.conv(x)
        return y if self.norm is None else self.norm(y, use_running_average=use_running_average)


class PooledShortcut(nnx.Module):
    """An average over 2x2 pixels, then a projection of stride 1 (ResNet-D, He et al. 2019)."""

    def __init__(self, config: BlockConfig, layers: Layers) -> None:
        self.pool = AveragePool(config.stride)
        self.projection = ProjectionShortcut(config, 1, layers)

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, ceil(H / stride), ..., out_channels)``."""
        return self.projection(self.pool(x), use_running_average=use_running_average)


Skip = IdentityShortcut | ZeroPadShortcut | ProjectionShortcut | PooledShortcut


def build_shortcut(config: BlockConfig, layers: Layers) -> Skip | None:
    """The shortcut of the block that ``config`` describes; None where nothing is added."""
    if config.shortcut == "none":
        return None
    if config.projects:
        if config.shortcut == "pooled":
            return PooledShortcut(config, layers)
        return ProjectionShortcut(config, config.stride, layers)
    if config.changes_shape:
        extra = config.out_channels - config.in_channels
        front = extra // 2 if config.shortcut == "zero_pad" else 0  # rounded down
        return ZeroPadShortcut(config.stride, extra, front)
    return IdentityShortcut()
