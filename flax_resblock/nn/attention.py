"""Channel attention: how much of each channel passes, decided from the means of all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resblock.config import BlockConfig
from flax_resblock.nn.layers import Layers
from flax_resblock.nn.norm_functions import broadcast_over
from flax_resblock.nn.scopes import in_slot


class SqueezeExcitation(nnx.Module):
    r"""Squeeze-and-excitation (Hu et al. 2018, arXiv:1709.01507).

    .. math:: y = x \cdot \sigma(expand(\mathrm{relu}(reduce(\mathrm{mean}_{H,W}(x)))))

    Args:
      channels: Of input and output.
      squeezed: Between the two 1x1 convolutions.
    """

    def __init__(self, channels: int, squeezed: int, layers: Layers, *, use_bias: bool) -> None:
        options: dict[str, Any] = {"use_bias": use_bias, "standardized": False}
        self.reduce = layers.conv(channels, squeezed, 1, **options)
        self.expand = layers.conv(squeezed, channels, 1, **options)

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, channels)`` to the same shape."""
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * broadcast_over(nnx.sigmoid(self.expand(nnx.relu(self.reduce(means)))), x.shape)


class EfficientChannelAttention(nnx.Module):
    r"""Efficient channel attention (Wang et al. 2020, arXiv:1910.03151): :math:`y = x \cdot
    \sigma(conv(\mathrm{mean}_{H,W}(x)))` along the channels.

    Args:
      window: Channels that decide about one.
    """

    def __init__(self, window: int, layers: Layers) -> None:
        self.conv = layers.channel_conv(window)

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to the same shape."""
        gate = nnx.sigmoid(self.conv(jnp.mean(x, axis=(1, 2))[:, None]))[:, :, None, :]
        return x * broadcast_over(gate, x.shape)


def build_attention(
    config: BlockConfig, layers: Layers
) -> SqueezeExcitation | EfficientChannelAttention | None:
    """The attention of the block that ``config`` describes."""
    if config.attention == "se":
        sizes = config.out_channels, config.squeezed_channels
        return SqueezeExcitation(*sizes, layers, use_bias=config.attention_bias)
    if config.attention == "eca":
        return EfficientChannelAttention(config.attention_window, layers)
    return None
