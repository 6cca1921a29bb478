"""The residual blocks and their shortcuts (He et al. 2016, arXiv:1512.03385)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_resblock.architecture import BlockConfig, Shortcut, StridePlacement
from flax_resblock.conv import Conv
from flax_resblock.initializers import INITIALIZERS, InitName
from flax_resblock.norm import BatchNorm


class LayerOptions(TypedDict, total=False):
    """Options that a block or network hands to each of its layers.

    Keys:
      dtype: Dtype of the computation; None (default): the promotion of input and parameters. Batch statistics stay in float32 at least.
      param_dtype: Dtype of the parameters at initialisation, float32 by default.
      precision: ``lax.Precision`` of convolutions and products; for true float32 on TPU and GPU use ``lax.Precision.HIGHEST``.
      eps, momentum, axis_name: See :class:`flax_resblock.BatchNorm`.
      init: ``"torch_default"`` as a bare ``nn.Conv2d`` (default of a block) or ``"kaiming_fan_out"`` (default of a network).
      zero_init_residual: Start the last norm's scale of every block at zero (Goyal et al. 2017); False by default, as in torchvision.
    """

    dtype: Any
    param_dtype: Any
    precision: lax.PrecisionLike
    eps: float
    momentum: float | None
    axis_name: Hashable | None
    init: InitName
    zero_init_residual: bool


class Layers:
    """Builds the layers of one block or stem with the same options."""

    def __init__(self, rngs: nnx.Rngs | None, options: LayerOptions) -> None:
        unknown = set(options) - set(LayerOptions.__annotations__)
        if unknown:
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}; known: {', '.join(LayerOptions.__annotations__)}.")
        self.rngs = rngs
        self.options = options
        self.shared: dict[str, Any] = {key: value for key, value in options.items() if key in ("dtype", "param_dtype")}

    def conv(self, in_channels: int, out_channels: int, size: int, *, stride: int = 1, dilation: int = 1, groups: int = 1) -> Conv:
        """A convolution padded so that stride 1 keeps the resolution."""
        init = self.options.get("init", "torch_default")
        if init not in INITIALIZERS:
            raise ValueError(f"init {init!r} is unknown; choose from {', '.join(INITIALIZERS)}.")
        return Conv(
            in_channels,
            out_channels,
            size,
            stride=stride,
            padding=dilation * (size // 2),
            dilation=dilation,
            groups=groups,
            precision=self.options.get("precision"),
            kernel_init=INITIALIZERS[init],
            rngs=self.rngs,
            **self.shared,
        )

    def norm(self, channels: int, *, ends_residual: bool = False) -> BatchNorm:
        """A batch norm; ``ends_residual`` marks the one that ``zero_init_residual`` starts at zero."""
        norm = BatchNorm(
            channels,
            eps=self.options.get("eps", 1e-5),
            momentum=self.options.get("momentum", 0.1),
            axis_name=self.options.get("axis_name"),
            rngs=self.rngs,
            **self.shared,
        )
        if ends_residual and self.options.get("zero_init_residual", False) and self.rngs is not None:
            norm.scale.set_value(jnp.zeros_like(norm.scale[...]))
        return norm


class IdentityShortcut(nnx.Module):
    """Copies the input."""

    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """Returns ``x``."""
        return x


class ZeroPadShortcut(nnx.Module):
    """Option A of He et al. 2016: every ``stride``-th pixel, new channels filled with zeros, half of them (rounded down) in front.

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
        return jnp.pad(x[:, :: self.stride, :: self.stride, :], ((0, 0), (0, 0), (0, 0), (front, self.extra_channels - front)))


class ProjectionShortcut(nnx.Module):
    """A 1x1 convolution that carries the stride and the channel change, followed by a norm (option B)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, layers: Layers) -> None:
        self.conv = layers.conv(in_channels, out_channels, 1, stride=stride)
        self.norm = layers.norm(out_channels)

    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, ceil(H / stride), ceil(W / stride), out_channels)``."""
        return self.norm(self.conv(x), use_running_average=use_running_average)


def _shortcut(config: BlockConfig, layers: Layers) -> IdentityShortcut | ZeroPadShortcut | ProjectionShortcut:
    if config.projects:
        return ProjectionShortcut(config.in_channels, config.out_channels, config.stride, layers)
    if config.changes_shape:
        return ZeroPadShortcut(config.stride, config.out_channels - config.in_channels)
    return IdentityShortcut()


class ResidualBlock(nnx.Module):
    r"""Two 3x3 convolutions with batch norm, plus the skip connection.

    .. math:: y = \mathrm{relu}(norm_2(conv_2(\mathrm{relu}(norm_1(conv_1(x))))) + shortcut(x))

    The convolutions have no bias and pad one pixel (``dilation`` pixels) on each side; the first carries the stride. The shortcut copies the input where
    stride and channels stay, else it is a 1x1 convolution without bias followed by a norm.

    Args:
      in_channels, out_channels: Channels of input ``(N, H, W, in_channels)`` and output ``(N, ceil(H / stride), ceil(W / stride), out_channels)``.
      stride: Of the first convolution and of the shortcut.
      dilation, groups: Of both 3x3 convolutions.
      shortcut: ``"projection"`` or ``"zero_pad"``; see :class:`flax_resblock.BlockConfig`.
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
        rngs: nnx.Rngs | None,
        **options: Unpack[LayerOptions],
    ) -> None:
        config = self.config = BlockConfig(
            in_channels=in_channels, out_channels=out_channels, stride=stride, dilation=dilation, groups=groups, shortcut=shortcut
        )
        layers = Layers(rngs, options)
        self.conv1 = layers.conv(in_channels, out_channels, 3, stride=stride, dilation=dilation, groups=groups)
        self.norm1 = layers.norm(out_channels)
        self.conv2 = layers.conv(out_channels, out_channels, 3, dilation=dilation, groups=groups)
        self.norm2 = layers.norm(out_channels, ends_residual=True)
        self.shortcut = _shortcut(config, layers)

    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``.

        Args:
          x: Activations.
          use_running_average: Overrides the mode of every norm for this call.
        """
        y = nnx.relu(self.norm1(self.conv1(x), use_running_average=use_running_average))
        y = self.norm2(self.conv2(y), use_running_average=use_running_average)
        return nnx.relu(y + self.shortcut(x, use_running_average=use_running_average))


class BottleneckBlock(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, each with batch norm, plus the skip connection.

    Args:
      in_channels, out_channels: Channels of input and output; ``out_channels`` is four times torchvision's ``planes``.
      stride: Carried by the convolution that ``stride_on`` names, and by the shortcut.
      stride_on: ``"3x3"`` as torchvision (ResNet v1.5), ``"1x1"`` as Caffe and He et al. 2016.
      dilation, groups: Of the 3x3 convolution.
      base_width: The inner width is ``int(out_channels / 4 * base_width / 64) * groups``.
      shortcut, rngs, **options: As for :class:`ResidualBlock`.
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
        )
        layers = Layers(rngs, options)
        width = config.inner_width
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.conv1 = layers.conv(in_channels, width, 1, stride=first)
        self.norm1 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3, stride=second, dilation=dilation, groups=groups)
        self.norm2 = layers.norm(width)
        self.conv3 = layers.conv(width, out_channels, 1)
        self.norm3 = layers.norm(out_channels, ends_residual=True)
        self.shortcut = _shortcut(config, layers)

    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``; arguments as for :class:`ResidualBlock`."""
        y = nnx.relu(self.norm1(self.conv1(x), use_running_average=use_running_average))
        y = nnx.relu(self.norm2(self.conv2(y), use_running_average=use_running_average))
        y = self.norm3(self.conv3(y), use_running_average=use_running_average)
        return nnx.relu(y + self.shortcut(x, use_running_average=use_running_average))


def build_block(config: BlockConfig, *, rngs: nnx.Rngs | None, **options: Unpack[LayerOptions]) -> ResidualBlock | BottleneckBlock:
    """The block that ``config`` describes; ``rngs`` and ``options`` as for :class:`ResidualBlock`."""
    shape = (config.in_channels, config.out_channels, config.stride)
    if config.kind == "basic":
        return ResidualBlock(*shape, dilation=config.dilation, groups=config.groups, shortcut=config.shortcut, rngs=rngs, **options)
    return BottleneckBlock(
        *shape,
        dilation=config.dilation,
        groups=config.groups,
        base_width=config.base_width,
        shortcut=config.shortcut,
        stride_on=config.stride_on,
        rngs=rngs,
        **options,
    )
