"""Convolution and pooling with explicit padding; how a convolution is lowered is decided here and nowhere else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_resblock.initializers import Initializer, initial_value, torch_default, uniform_bias


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int, dilation: int, groups: int, precision: lax.PrecisionLike) -> jax.Array:
    """2-d cross-correlation, NHWC by HWIO, ``padding`` pixels on *each* side (``'SAME'`` pads (0, 1) at stride 2 on even sizes; PyTorch pads (1, 1)).

    Args:
      x: ``(N, H, W, I)``.
      kernel: ``(kh, kw, I // groups, O)``, same dtype as ``x``.
      stride, padding, dilation: In pixels, equal in both directions.
      groups: Channel groups; output channels are assigned to groups in order, as in PyTorch.
      precision: ``lax.Precision`` of the products; only HIGHEST is float32 on TPU and on CUDA tensor cores.
    Returns:
      ``(N, H', W', O)`` with ``H' = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1``.
    """
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )


class Conv(nnx.Module):
    """2-d convolution, equal to ``torch.nn.Conv2d`` up to the layout; without bias unless asked for.

    Attributes:
      kernel: ``nnx.Param``, ``(kernel_size, kernel_size, in_channels // groups, out_channels)``.
      bias: ``nnx.Param``, ``(out_channels,)``, or None.

    Args:
      in_channels, out_channels: Channels of input ``(N, H, W, in_channels)`` and output.
      kernel_size, stride, padding, dilation: In pixels, square; padding is on each side.
      groups: Must divide both channel counts.
      use_bias: Whether there is a bias; it starts as ``nn.Conv2d`` starts it.
      dtype: Dtype of the computation; None: the promotion of input and kernel.
      param_dtype: Dtype of the kernel at initialisation.
      precision: See :func:`convolve`.
      kernel_init: Default as ``nn.Conv2d`` does.
      rngs: Source of the ``params`` stream; None builds the module without values.
    Raises:
      ValueError: ``groups`` does not divide the channels; on a call, an input that is not ``(N, H, W, in_channels)``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = torch_default,
        rngs: nnx.Rngs | None,
    ) -> None:
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.dtype = dtype
        self.precision = precision
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(initial_value(kernel_init, rngs, shape, param_dtype))
        fan_in = kernel_size**2 * in_channels // groups
        self.bias = nnx.Param(initial_value(uniform_bias(fan_in), rngs, (out_channels,), param_dtype)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``."""
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"Conv expects (N, H, W, {self.in_channels}) with channels last (NHWC); got shape {tuple(x.shape)}.")
        kernel = self.kernel[...]
        dtype = self.dtype or jnp.result_type(x, kernel)
        y = convolve(
            x.astype(dtype),
            jnp.asarray(kernel, dtype),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            precision=self.precision,
        )
        return y if self.bias is None else y + jnp.asarray(self.bias[...], dtype)


class ChannelConv(nnx.Module):
    """A convolution along the channels, without bias and padded to keep their number.

    Attributes:
      kernel: ``nnx.Param``, ``(window, 1, 1)``.

    Args:
      window: Channels that each output sees; odd.
      dtype, param_dtype, precision, rngs: As for :class:`flax_resblock.conv.Conv`.
      kernel_init: Its initialiser.
    """

    def __init__(
        self,
        window: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.dtype = dtype
        self.precision = precision
        self.kernel = nnx.Param(initial_value(kernel_init, rngs, (window, 1, 1), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, 1, C)`` to ``(N, 1, C)``, as ``torch.nn.Conv1d`` has it."""
        kernel = self.kernel[...]
        dtype = self.dtype or jnp.result_type(x, kernel)
        side = kernel.shape[0] // 2
        rows = jnp.swapaxes(x.astype(dtype), 1, 2)
        y = lax.conv_general_dilated(rows, jnp.asarray(kernel, dtype), (1,), [(side, side)], dimension_numbers=("NWC", "WIO", "NWC"), precision=self.precision)
        return jnp.swapaxes(y, 1, 2)


class MaxPool(nnx.Module):
    """Max pooling, equal to ``torch.nn.MaxPool2d``: pads with minus infinity on both sides.

    Args:
      window, stride, padding: In pixels, square.
    """

    def __init__(self, window: int, stride: int, padding: int) -> None:
        self.window = window
        self.stride = stride
        self.padding = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H', W', C)``."""
        pad = (self.padding, self.padding)
        return nnx.max_pool(x, (self.window, self.window), (self.stride, self.stride), (pad, pad))  # pyright: ignore[reportArgumentType]


class AveragePool(nnx.Module):
    """Mean over ``stride`` by ``stride`` pixels; at the end of an odd size over those that are there.

    Equal to ``torch.nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)``.

    Args:
      stride: And window, in pixels; 1 copies the input.
    """

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, ceil(H / stride), ceil(W / stride), C)``."""
        if self.stride == 1:
            return x
        window = (self.stride, self.stride)
        pads = [(0, -size % self.stride) for size in x.shape[1:3]]
        return nnx.avg_pool(x, window, window, pads, count_include_pad=False)  # pyright: ignore[reportArgumentType]


class Blur(nnx.Module):
    """The binomial filter ``[1, 2, 1] / 4`` in both directions, with one pixel of reflection on each side (Zhang 2019, arXiv:1904.11486).

    Args:
      stride: In pixels.
    """

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, ceil(H / stride), ceil(W / stride), C)``; height and width at least 2."""
        row = jnp.asarray([0.25, 0.5, 0.25], x.dtype)
        channels = x.shape[-1]
        kernel = jnp.broadcast_to((row[:, None] * row)[:, :, None, None], (3, 3, 1, channels))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        return convolve(padded, kernel, stride=self.stride, padding=0, dilation=1, groups=channels, precision=lax.Precision.HIGHEST)


class Linear(nnx.Module):
    """Affine map of the last axis, equal to ``torch.nn.Linear`` up to the transposed kernel.

    Attributes:
      kernel: ``nnx.Param``, ``(in_features, out_features)``.
      bias: ``nnx.Param``, ``(out_features,)``.

    Args:
      in_features, out_features: Sizes of the last axis.
      dtype, param_dtype, precision, rngs: As for :class:`Conv`. Both parameters start as ``nn.Linear`` starts them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: lax.PrecisionLike = None,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.dtype = dtype
        self.precision = precision
        self.kernel = nnx.Param(initial_value(torch_default, rngs, (in_features, out_features), param_dtype))
        self.bias = nnx.Param(initial_value(uniform_bias(in_features), rngs, (out_features,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(..., in_features)`` to ``(..., out_features)``."""
        kernel, bias = self.kernel[...], self.bias[...]
        dtype = self.dtype or jnp.result_type(x, kernel, bias)
        return lax.dot_general(x.astype(dtype), jnp.asarray(kernel, dtype), (((x.ndim - 1,), (0,)), ((), ())), precision=self.precision) + jnp.asarray(
            bias, dtype
        )
