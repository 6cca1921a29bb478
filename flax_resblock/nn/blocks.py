"""The residual blocks (He et al. 2016, arXiv:1512.03385)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypedDict, Unpack

import jax
from flax import nnx

from flax_resblock.config import (
    Activation,
    Antialias,
    Attention,
    BlockConfig,
    PaddingRule,
    Shortcut,
    StridePlacement,
)
from flax_resblock.nn.attention import build_attention
from flax_resblock.nn.layers import ACTIVATIONS, LayerOptions, Layers, joined
from flax_resblock.nn.pooling import Blur
from flax_resblock.nn.scopes import in_slot
from flax_resblock.nn.shortcuts import build_shortcut

__all__ = ["BottleneckBlock", "LayerOptions", "Layers", "ResidualBlock", "build_block"]


class ResidualOptions(LayerOptions, total=False):
    """Options of a :class:`ResidualBlock`: fields of :class:`flax_resblock.BlockConfig` with its
    defaults, and :class:`LayerOptions`.
    """

    dilation: int
    groups: int
    shortcut: Shortcut
    attention: Attention
    attention_ratio: float
    antialias: Antialias
    activation: Activation
    conv_bias: bool
    shortcut_bias: bool
    padding: PaddingRule


class BottleneckOptions(ResidualOptions, total=False):
    """Options of a :class:`BottleneckBlock`."""

    base_width: int
    stride_on: StridePlacement


class _Spread(TypedDict):
    """Of a 3x3 convolution."""

    dilation: int
    groups: int
    use_bias: bool
    padding_rule: str


def _spread(config: BlockConfig) -> _Spread:
    return _Spread(
        dilation=config.dilation,
        groups=config.groups,
        use_bias=config.conv_bias,
        padding_rule=config.padding,
    )


def _described(
    options: Mapping[str, Any], known: Mapping[str, Any], **fields: Any
) -> tuple[BlockConfig, LayerOptions]:
    """The configuration of a block and the options of its layers, from its arguments."""
    if unknown := set(options) - set(known):
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; known: {', '.join(known)}.")
    own = {
        name: value for name, value in options.items() if name not in LayerOptions.__annotations__
    }
    rest = {name: value for name, value in options.items() if name not in own}
    return BlockConfig(**fields, **own), rest  # pyright: ignore[reportReturnType]


class ResidualBlock(nnx.Module):
    r"""Two 3x3 convolutions with batch norm, plus the skip connection.

    .. math:: y = act(norm_2(conv_2(act(norm_1(conv_1(x))))) + shortcut(x))

    The convolutions have no bias unless asked otherwise and pad one pixel (``dilation`` pixels) on
    each side; the first carries the stride. The shortcut copies the input where stride and channels
    stay, else it is a 1x1 convolution followed by a norm. The activation is ReLU unless asked
    otherwise.

    Args:
      in_channels, out_channels: Channels of input ``(N, H, W, in_channels)`` and output ``(N,
        ceil(H / stride), ceil(W / stride), out_channels)``.
      stride: Of the first convolution and of the shortcut.
      rngs: Source of the ``params`` stream; None builds the module without values.
      **options: See :class:`ResidualOptions`.
    Raises:
      ValueError: Numbers that make no block; on a call, an input of another rank or channel count.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        rngs: nnx.Rngs | None,
        **options: Unpack[ResidualOptions],
    ) -> None:
        config, rest = _described(
            options,
            ResidualOptions.__annotations__,
            in_channels=in_channels,
            out_channels=out_channels,
            stride=stride,
        )
        self.config, layers = config, Layers(rngs, rest)
        wide = _spread(config)
        first, second = config.strides
        self.conv1 = layers.conv(in_channels, out_channels, 3, stride=first, **wide)
        self.norm1 = layers.norm(out_channels)
        self.conv2 = layers.conv(out_channels, out_channels, 3, stride=second, **wide)
        self.norm2 = layers.norm(out_channels, ends_residual=True)
        self.blur = Blur(stride) if config.blurs else None
        self.attention = build_attention(config, layers)
        self.shortcut = build_shortcut(config, layers)

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``.

        Args:
          x: Activations.
          use_running_average: Overrides the mode of every norm for this call.
        """
        act = ACTIVATIONS[self.config.activation]
        y = act(self.norm1(self.conv1(x), use_running_average=use_running_average))
        y = y if self.blur is None else self.blur(y)
        y = self.norm2(self.conv2(y), use_running_average=use_running_average)
        y = y if self.attention is None else self.attention(y)
        skip = self.shortcut(x, use_running_average=use_running_average)
        return joined(y, skip, self.config.activation, self.conv1.conv_lowering)


class BottleneckBlock(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, each with batch norm, plus the skip connection.

    Args:
      in_channels, out_channels: Channels of input and output; ``out_channels`` is four times
        torchvision's ``planes``.
      stride: Carried by the convolution that ``stride_on`` names, and by the shortcut.
      rngs: As for :class:`ResidualBlock`.
      **options: See :class:`BottleneckOptions`.
    Raises:
      ValueError: Numbers that make no block; on a call, an input of another rank or channel count.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        rngs: nnx.Rngs | None,
        **options: Unpack[BottleneckOptions],
    ) -> None:
        config, rest = _described(
            options,
            BottleneckOptions.__annotations__,
            kind="bottleneck",
            in_channels=in_channels,
            out_channels=out_channels,
            stride=stride,
        )
        self.config, layers = config, Layers(rngs, rest)
        bias, width, wide = config.conv_bias, config.inner_width, _spread(config)
        first, second, third = config.strides
        self.conv1 = layers.conv(in_channels, width, 1, stride=first, use_bias=bias)
        self.norm1 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3, stride=second, **wide)
        self.norm2 = layers.norm(width)
        self.conv3 = layers.conv(width, out_channels, 1, stride=third, use_bias=bias)
        self.norm3 = layers.norm(out_channels, ends_residual=True)
        self.blur = Blur(stride) if config.blurs else None
        self.attention = build_attention(config, layers)
        self.shortcut = build_shortcut(config, layers)

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``; arguments as for
        :class:`ResidualBlock`.
        """
        act = ACTIVATIONS[self.config.activation]
        y = act(self.norm1(self.conv1(x), use_running_average=use_running_average))
        y = act(self.norm2(self.conv2(y), use_running_average=use_running_average))
        y = y if self.blur is None else self.blur(y)
        y = self.norm3(self.conv3(y), use_running_average=use_running_average)
        y = y if self.attention is None else self.attention(y)
        skip = self.shortcut(x, use_running_average=use_running_average)
        return joined(y, skip, self.config.activation, self.conv1.conv_lowering)


def build_block(
    config: BlockConfig, *, rngs: nnx.Rngs | None, **options: Unpack[LayerOptions]
) -> ResidualBlock | BottleneckBlock:
    """The block that ``config`` describes; the rest as for :class:`ResidualBlock`."""
    fields = asdict(config)
    kind = fields.pop("kind")
    if kind == "bottleneck":
        return BottleneckBlock(**fields, rngs=rngs, **options)
    del fields["base_width"], fields["stride_on"]  # a basic block has neither
    return ResidualBlock(**fields, rngs=rngs, **options)
