"""Transposed convolution, the gradient of a convolution used as a layer."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_resblock.nn.conv import LAYOUTS, check_channels, check_groups, in_one_dtype
from flax_resblock.nn.geometry import Size, per_axis
from flax_resblock.nn.initializers import parameter, uniform_bias
from flax_resblock.nn.scopes import in_slot


def conv_transpose(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """``torch.nn.functional.conv_transpose2d``, or with one spatial axis ``conv_transpose1d``.

    Args:
      x: ``(N, H, W, I)``, or ``(N, L, I)``.
      kernel: ``(kh, kw, I, O // groups)``, or ``(k, I, O // groups)``: PyTorch's kernel with its
        spatial axes first.
      bias: ``(O,)``, or None.
      stride, padding, output_padding, dilation: In pixels: one number, or one for each spatial
        axis.
      groups: Channel groups.
      precision: ``lax.Precision`` of the products.
    Returns:
      ``(N, H', W', O)`` with ``H' = (H - 1) stride - 2 padding + dilation (kh - 1) +
      output_padding + 1``.
    Raises:
      ValueError: Neither one nor two spatial axes, or sizes that do not fit their number.
    """
    axes = kernel.ndim - 2
    if axes not in LAYOUTS or x.ndim != kernel.ndim:
        raise ValueError(
            f"conv_transpose takes (N, H, W, C) and (kh, kw, I, O), or (N, L, C) and (k, I, O); "
            f"got shapes {tuple(x.shape)} and {tuple(kernel.shape)}."
        )
    *window, inputs, outputs = kernel.shape
    strides, holes = per_axis(stride, axes, "stride"), per_axis(dilation, axes, "dilation")
    more = per_axis(output_padding, axes, "output_padding")
    reach = [hole * (size - 1) for hole, size in zip(holes, window, strict=True)]
    sides = zip(reach, per_axis(padding, axes, "padding"), more, strict=True)
    parts = kernel.reshape(*window, groups, inputs // groups, outputs)
    parts = jnp.swapaxes(parts, axes, axes + 1).reshape(*window, inputs // groups, -1)
    y = lax.conv_general_dilated(
        x,
        jnp.flip(parts, tuple(range(axes))),
        window_strides=(1,) * axes,
        padding=[(size - pad, size - pad + extra) for size, pad, extra in sides],
        lhs_dilation=strides,
        rhs_dilation=holes,
        dimension_numbers=LAYOUTS[axes],
        feature_group_count=groups,
        precision=precision,
    )
    return y if bias is None else y + bias


class ConvTranspose(nnx.Module):
    """2-d transposed convolution, equal to ``torch.nn.ConvTranspose2d`` up to the layout; without
    bias unless asked for.

    Attributes:
      kernel: ``nnx.Param``, ``(kh, kw, in_channels, out_channels // groups)``.
      bias: ``nnx.Param``, ``(out_channels,)``, or None.

    Args:
      in_channels, out_channels: Channels of input ``(N, H, W, in_channels)`` and output.
      kernel_size, stride, padding, output_padding, dilation, groups, precision: See
        :func:`conv_transpose`.
      use_bias: Whether there is a bias. Both parameters start as PyTorch starts them.
      dtype: Dtype of the computation; None: the promotion of input and kernel.
      param_dtype: Dtype of the parameters at initialisation.
      rngs: Source of the ``params`` stream; None builds the module without values.
    Raises:
      ValueError: ``groups`` does not divide the channels; on a call, an input of another shape.
    """

    _axes = "H, W"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: lax.PrecisionLike = None,
        rngs: nnx.Rngs | None,
    ) -> None:
        check_groups(in_channels, out_channels, groups)
        self.in_channels = in_channels
        self.stride = stride
        self.padding = padding
        self.output_padding = output_padding
        self.dilation = dilation
        self.groups = groups
        self.dtype = dtype
        self.precision = precision
        window = per_axis(kernel_size, len(self._axes.split(",")), "kernel_size")
        shape = (*window, in_channels, out_channels // groups)
        init = uniform_bias(math.prod(window) * out_channels // groups)
        self.kernel = parameter(init, rngs, shape, param_dtype)
        self.bias = parameter(init, rngs, (out_channels,), param_dtype, use_bias)

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``."""
        check_channels(self, x, self._axes)
        x, bias = in_one_dtype(self, x)
        return conv_transpose(
            x,
            jnp.asarray(self.kernel[...], x.dtype),
            bias,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation=self.dilation,
            groups=self.groups,
            precision=self.precision,
        )


class ConvTranspose1d(ConvTranspose):
    """1-d transposed convolution of ``(N, L, in_channels)``, equal to
    ``torch.nn.ConvTranspose1d`` up to the layout; without bias unless asked for.

    Attributes:
      kernel: ``nnx.Param``, ``(k, in_channels, out_channels // groups)``.
      bias: ``nnx.Param``, ``(out_channels,)``, or None.

    Args:
      in_channels, out_channels, kernel_size: As for :class:`ConvTranspose`, and so are all options.
    """

    _axes = "L"
