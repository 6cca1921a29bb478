"""What comes before the blocks of a stage where pooling reduces the resolution."""

from __future__ import annotations

import jax
from flax import nnx

from flax_resblock.config import Activation, ResNetConfig
from flax_resblock.config.slots import padded
from flax_resblock.nn.activations import ACTIVATIONS
from flax_resblock.nn.layers import Layers
from flax_resblock.nn.pooling import MaxPool
from flax_resblock.nn.scopes import in_slot


class Transition(nnx.Module):
    """A 3x3 convolution with norm and activation, and max pooling that has the stride.

    Args:
      config: Of the network.
      inputs, outputs: Channels.
      stride: Size and stride of the pooling window, in pixels; 1: no pooling.
      layers: Builds the layers.
    """

    def __init__(
        self, config: ResNetConfig, inputs: int, outputs: int, stride: int, layers: Layers
    ) -> None:
        self.conv = layers.conv(inputs, outputs, 3, use_bias=config.conv_bias)
        self.norm = layers.norm(outputs)
        self.activation: Activation = config.activation
        sides = padded(stride, stride, config.padding, 0)
        self.pool = MaxPool(stride, stride, sides) if stride > 1 else None

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, inputs)`` to ``(N, H // stride, W // stride, outputs)``, rounded up where
        the network pads as TensorFlow does."""
        y = self.norm(self.conv(x), use_running_average=use_running_average)
        y = ACTIVATIONS[self.activation](y)
        return y if self.pool is None else self.pool(y)
