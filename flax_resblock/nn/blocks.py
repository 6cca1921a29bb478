"""The residual blocks (He et al. 2016, arXiv:1512.03385 and arXiv:1603.05027)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Unpack

import jax
from flax import nnx

from flax_resblock.config import BlockConfig, StridePlacement
from flax_resblock.config.options import SharedOptions
from flax_resblock.nn.attention import build_attention
from flax_resblock.nn.conv import Conv
from flax_resblock.nn.layers import ACTIVATIONS, LayerOptions, Layers, NormLayer, divided, joined
from flax_resblock.nn.pooling import Blur
from flax_resblock.nn.scopes import in_slot
from flax_resblock.nn.shortcuts import build_shortcut


class ResidualOptions(LayerOptions, SharedOptions, total=False):
    """Options of a :class:`ResidualBlock`: fields of :class:`flax_resblock.BlockConfig` with its
    defaults, and :class:`LayerOptions`.
    """

    dilation: int


class BottleneckOptions(ResidualOptions, total=False):
    """Options of a :class:`BottleneckBlock`."""

    base_width: int
    stride_on: StridePlacement


def _described(
    options: Mapping[str, Any], known: Mapping[str, Any], **fields: Any
) -> tuple[BlockConfig, LayerOptions]:
    """The configuration of a block and the options of its layers, from its arguments."""
    if unknown := set(options) - set(known):
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; known: {', '.join(known)}.")
    rest, own = divided(options)
    return BlockConfig(**fields, **own), rest


class _Block(nnx.Module):
    """The convolutions and norms of a main path, ``conv1``, ``norm1`` and so on, and what is added
    to it."""

    conv1: Conv
    norm1: NormLayer

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs | None, options: LayerOptions) -> None:
        self.config, layers = config, Layers(rngs, options, config)
        last, before = len(config.convolutions), config.norm_first
        for i, (inputs, outputs, size, stride) in enumerate(config.convolutions, start=1):
            spread = {} if size == 1 else {"dilation": config.dilation, "groups": config.groups}
            numbers: dict[str, Any] = {"stride": stride, "use_bias": config.conv_bias, **spread}
            numbers["ends_residual"] = i == last and before
            normed, ends = inputs if before else outputs, i == last and not before
            setattr(self, f"conv{i}", layers.conv(inputs, outputs, size, **numbers))
            setattr(self, f"norm{i}", layers.norm(normed, ends_residual=ends))
        self.dropout = layers.dropout()
        self.blur = Blur(config.stride) if config.blurs else None
        self.attention = build_attention(config, layers)
        self.shortcut = build_shortcut(config, layers)

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``.

        Args:
          x: Activations.
          use_running_average: Overrides the mode of every norm for this call.
        """
        config, act = self.config, ACTIVATIONS[self.config.activation]
        y, skipped, last = x, x, len(config.convolutions)
        for i in range(1, last + 1):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"norm{i}")
            if config.norm_first:
                y = act(norm(y, use_running_average=use_running_average))
                skipped = y if i == 1 and config.skips_activated else skipped
            y = y if self.dropout is None or i != 2 else self.dropout(y)
            y = conv(y)
            if not config.norm_first:
                y = norm(y, use_running_average=use_running_average)
                y = act(y) if i < last or config.branch_activation else y
            y = y if self.blur is None or i != last - 1 else self.blur(y)
        weighs = {} if self.attention is None else {config.attention_place: self.attention}
        y = weighs["branch"](y) if "branch" in weighs else y
        skip, lowering = None, self.conv1.conv_lowering
        if self.shortcut is not None:
            skip = self.shortcut(skipped, use_running_average=use_running_average)
        if "sum" in weighs:
            y, skip = weighs["sum"](joined(y, skip, None, lowering)), None
        y = joined(y, skip, config.ending, lowering)
        return weighs["output"](y) if "output" in weighs else y


class ResidualBlock(_Block):
    r"""Two 3x3 convolutions with batch norm, plus the skip connection.

    .. math:: y = act(norm_2(conv_2(act(norm_1(conv_1(x))))) + shortcut(x))

    The convolutions have no bias unless asked otherwise and pad one pixel (``dilation`` pixels) on
    each side; the first carries the stride. The shortcut copies the input where stride and channels
    stay, else it is a 1x1 convolution followed by a norm. The activation is ReLU unless asked
    otherwise. With ``order="pre_activation"`` it is

    .. math:: y = conv_2(act(norm_2(conv_1(a)))) + shortcut(a),\quad a = act(norm_1(x))

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
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "stride": stride}
        config, rest = _described(options, ResidualOptions.__annotations__, **sizes)
        super().__init__(config, rngs, rest)


class BottleneckBlock(_Block):
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
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "stride": stride}
        known = BottleneckOptions.__annotations__
        config, rest = _described(options, known, kind="bottleneck", **sizes)
        super().__init__(config, rngs, rest)


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
