"""The residual blocks (He et al. 2016, arXiv:1512.03385)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Unpack

import jax
from flax import nnx

from flax_resblock.config import Antialias, Attention, BlockConfig, Shortcut, StridePlacement
from flax_resblock.nn.attention import build_attention
from flax_resblock.nn.layers import LayerOptions, Layers, joined
from flax_resblock.nn.pooling import Blur
from flax_resblock.nn.shortcuts import build_shortcut

__all__ = ["BottleneckBlock", "LayerOptions", "Layers", "ResidualBlock", "build_block"]


class ResidualBlock(nnx.Module):
    r"""Two 3x3 convolutions with batch norm, plus the skip connection.

    .. math:: y = \mathrm{relu}(norm_2(conv_2(\mathrm{relu}(norm_1(conv_1(x))))) + shortcut(x))

    The convolutions have no bias and pad one pixel (``dilation`` pixels) on each side; the first
    carries the stride. The shortcut copies the input where stride and channels stay, else it is a
    1x1 convolution without bias followed by a norm.

    Args:
      in_channels, out_channels: Channels of input ``(N, H, W, in_channels)`` and output ``(N,
        ceil(H / stride), ceil(W / stride), out_channels)``.
      stride: Of the first convolution and of the shortcut.
      dilation, groups: Of both 3x3 convolutions.
      shortcut, attention, attention_ratio, antialias: See :class:`flax_resblock.BlockConfig`.
      rngs: Source of the ``params`` stream; None builds the module without values.
      **options: See :class:`LayerOptions`.
    Raises:
      ValueError: Numbers that make no block; on a call, an input of another rank or channel count.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        shortcut: Shortcut = "projection",
        attention: Attention = "none",
        attention_ratio: float = 1 / 16,
        antialias: Antialias = "none",
        rngs: nnx.Rngs | None,
        **options: Unpack[LayerOptions],
    ) -> None:
        config = self.config = BlockConfig(
            in_channels=in_channels,
            out_channels=out_channels,
            stride=stride,
            dilation=dilation,
            groups=groups,
            shortcut=shortcut,
            attention=attention,
            attention_ratio=attention_ratio,
            antialias=antialias,
        )
        layers = Layers(rngs, options)
        self.conv1 = layers.conv(
            in_channels, out_channels, 3, stride=config.strides[0], dilation=dilation, groups=groups
        )
        self.norm1 = layers.norm(out_channels)
        self.conv2 = layers.conv(out_channels, out_channels, 3, dilation=dilation, groups=groups)
        self.norm2 = layers.norm(out_channels, ends_residual=True)
        self.blur = Blur(stride) if config.blurs else None
        self.attention = build_attention(config, layers)
        self.shortcut = build_shortcut(config, layers)

    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``.

        Args:
          x: Activations.
          use_running_average: Overrides the mode of every norm for this call.
        """
        y = nnx.relu(self.norm1(self.conv1(x), use_running_average=use_running_average))
        y = y if self.blur is None else self.blur(y)
        y = self.norm2(self.conv2(y), use_running_average=use_running_average)
        y = y if self.attention is None else self.attention(y)
        return joined(
            y, self.shortcut(x, use_running_average=use_running_average), self.conv1.conv_lowering
        )


class BottleneckBlock(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, each with batch norm, plus the skip connection.

    Args:
      in_channels, out_channels: Channels of input and output; ``out_channels`` is four times
        torchvision's ``planes``.
      stride: Carried by the convolution that ``stride_on`` names, and by the shortcut.
      stride_on: ``"3x3"`` as torchvision (ResNet v1.5), ``"1x1"`` as Caffe and He et al. 2016.
      dilation, groups: Of the 3x3 convolution.
      base_width: The inner width is ``int(out_channels / 4 * base_width / 64) * groups``.
      shortcut, attention, attention_ratio, antialias, rngs, **options: As for
        :class:`ResidualBlock`.
    Raises:
      ValueError: Numbers that make no block; on a call, an input of another rank or channel count.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        base_width: int = 64,
        shortcut: Shortcut = "projection",
        stride_on: StridePlacement = "3x3",
        attention: Attention = "none",
        attention_ratio: float = 1 / 16,
        antialias: Antialias = "none",
        rngs: nnx.Rngs | None,
        **options: Unpack[LayerOptions],
    ) -> None:
        config = self.config = BlockConfig(
            in_channels=in_channels,
            out_channels=out_channels,
            kind="bottleneck",
            stride=stride,
            dilation=dilation,
            groups=groups,
            base_width=base_width,
            shortcut=shortcut,
            stride_on=stride_on,
            attention=attention,
            attention_ratio=attention_ratio,
            antialias=antialias,
        )
        layers = Layers(rngs, options)
        width = config.inner_width
        first, second, _ = config.strides
        self.conv1 = layers.conv(in_channels, width, 1, stride=first)
        self.norm1 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3, stride=second, dilation=dilation, groups=groups)
        self.norm2 = layers.norm(width)
        self.conv3 = layers.conv(width, out_channels, 1)
        self.norm3 = layers.norm(out_channels, ends_residual=True)
        self.blur = Blur(stride) if config.blurs else None
        self.attention = build_attention(config, layers)
        self.shortcut = build_shortcut(config, layers)

    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``; arguments as for
        :class:`ResidualBlock`.
        """
        y = nnx.relu(self.norm1(self.conv1(x), use_running_average=use_running_average))
        y = nnx.relu(self.norm2(self.conv2(y), use_running_average=use_running_average))
        y = y if self.blur is None else self.blur(y)
        y = self.norm3(self.conv3(y), use_running_average=use_running_average)
        y = y if self.attention is None else self.attention(y)
        return joined(
            y, self.shortcut(x, use_running_average=use_running_average), self.conv1.conv_lowering
        )


def build_block(
    config: BlockConfig, *, rngs: nnx.Rngs | None, **options: Unpack[LayerOptions]
) -> ResidualBlock | BottleneckBlock:
    """The block that ``config`` describes; ``rngs`` and ``options`` as for
    :class:`ResidualBlock`.
    """
    fields = asdict(config)
    kind = fields.pop("kind")
    if kind == "bottleneck":
        return BottleneckBlock(**fields, rngs=rngs, **options)
    del fields["base_width"], fields["stride_on"]  # a basic block has neither
    return ResidualBlock(**fields, rngs=rngs, **options)
