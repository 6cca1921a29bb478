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
    """Option A of He et al. 2016: every ``stride``-th pixel, new channels filled with zeros, half
    of them (rounded down) in front.

    Args:
      stride: In pixels.
      extra_channels: How many channels to add.
    """

    def __init__(self, stride: int, extra_channels: int) -> None:
        self.stride = stride
        self.extra_channels = extra_channels

    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, ceil(H / stride), ceil(W / stride), C + extra_channels)``."""
        front = self.extra_channels // 2
        sides = ((0, 0), (0, 0), (0, 0), (front, self.extra_channels - front))
        return jnp.pad(x[:, :: self.stride, :: self.stride, :], sides)


class ProjectionShortcut(nnx.Module):
    """A 1x1 convolution with the stride and the channel change, then a norm (option B)."""

    def __init__(self, config: BlockConfig, stride: int, layers: Layers) -> None:
        ends, bias = (config.in_channels, config.out_channels), config.shortcut_bias
        self.conv = layers.conv(*ends, 1, stride=stride, use_bias=bias)
        self.norm = layers.norm(config.out_channels)

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, ceil(H / stride), ..., out_channels)``."""
        return self.norm(self.conv(x), use_running_average=use_running_average)


class PooledShortcut(nnx.Module):
    """An average over 2x2 pixels, then a projection of stride 1 (ResNet-D, He et al. 2019)."""

    def __init__(self, config: BlockConfig, layers: Layers) -> None:
        self.pool = AveragePool(config.stride)
        self.projection = ProjectionShortcut(config, 1, layers)

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, ceil(H / stride), ..., out_channels)``."""
        return self.projection(self.pool(x), use_running_average=use_running_average)


def build_shortcut(
    config: BlockConfig, layers: Layers
) -> IdentityShortcut | ZeroPadShortcut | ProjectionShortcut | PooledShortcut:
    """The shortcut of the block that ``config`` describes."""
    if config.projects:
        if config.shortcut == "pooled":
            return PooledShortcut(config, layers)
        return ProjectionShortcut(config, config.stride, layers)
    if config.changes_shape:
        return ZeroPadShortcut(config.stride, config.out_channels - config.in_channels)
    return IdentityShortcut()
