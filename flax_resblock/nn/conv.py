"""Convolution with explicit padding, and the hook to the forms that a CPU computes it in."""

from __future__ import annotations

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_resblock.config import Lowering
from flax_resblock.cpu.switch import forms as cpu_forms
from flax_resblock.cpu.switch import in_memory, on_accelerator
from flax_resblock.nn.geometry import Padding, PaddingMode, Size, equal, pad, per_axis, sides
from flax_resblock.nn.initializers import Initializer, parameter, torch_default, uniform_bias
from flax_resblock.nn.norm_functions import broadcast_over, normalised
from flax_resblock.nn.scopes import in_slot
from flax_resblock.nn.variables import refuse_integers

__all__ = ["Conv", "Conv1d", "convolve", "cpu_forms", "in_memory", "on_accelerator"]

LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}
"""The memory layouts of input, kernel and output, by the number of spatial axes."""


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    precision: lax.PrecisionLike = None,
    lowering: Lowering = "auto",
) -> jax.Array:
    """Cross-correlation along one or two spatial axes, NHWC by HWIO, ``padding`` pixels on *each*
    side.

    Args:
      x: ``(N, H, W, I)``, or ``(N, L, I)``.
      kernel: ``(kh, kw, I // groups, O)``, or ``(k, I // groups, O)``, same dtype as ``x``.
      bias: ``(O,)``, same dtype; or None.
      stride, dilation: In pixels: one number, or one for each spatial axis.
      padding: As ``stride``, or ``"valid"``, or ``"same"``, which is PyTorch's and needs stride 1,
        or ``"SAME"``, which is JAX's: a 3x3 window of stride 2 pads (0, 1) pixels of even sizes and
        (1, 1) of odd ones, where PyTorch's networks pad (1, 1).
      groups: Channel groups; output channels are assigned to groups in order, as in PyTorch.
      precision: ``lax.Precision`` of the products; only HIGHEST is float32 on TPU and on CUDA
        tensor cores.
      lowering: ``"auto"``: on a CPU, in the form that is fastest for the shapes; elsewhere, and
        everywhere with ``"xla"``, ``lax.conv_general_dilated``.
    Returns:
      ``(N, H', W', O)`` with ``H' = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1``.
    Raises:
      ValueError: Neither one nor two spatial axes, or sizes that do not fit their number.
    """
    axes = kernel.ndim - 2
    if axes not in LAYOUTS or x.ndim != kernel.ndim:
        raise ValueError(
            f"convolve takes (N, H, W, C) and (kh, kw, I, O), or (N, L, C) and (k, I, O); got "
            f"shapes {tuple(x.shape)} and {tuple(kernel.shape)}."
        )
    strides, dilations = per_axis(stride, axes, "stride"), per_axis(dilation, axes, "dilation")
    pads = sides(padding, kernel.shape[:-2], dilations, strides, x.shape[1:-1])
    y = None
    forms = cpu_forms(lowering)
    if forms is not None and axes == 2 and equal(strides, dilations, pads[0], pads[1], pads):
        square = {"stride": strides[0], "padding": pads[0][0], "dilation": dilations[0]}
        y = forms.convolve(x, kernel, **square, groups=groups, precision=precision)
    if y is None:
        y = lax.conv_general_dilated(
            x,
            kernel,
            window_strides=strides,
            padding=pads,
            rhs_dilation=dilations,
            dimension_numbers=LAYOUTS[axes],
            feature_group_count=groups,
            precision=precision,
        )
    return y if bias is None else y + broadcast_over(bias, y.shape)


def check_groups(in_channels: int, out_channels: int, groups: int) -> None:
    """Raises ValueError unless the groups divide both numbers of channels."""
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"groups={groups} must divide in_channels={in_channels} and "
            f"out_channels={out_channels}."
        )


def check_channels(layer: Any, x: jax.Array, axes: str) -> None:
    """Raises ValueError unless a convolution's input is floating and has its channels last, behind
    ``axes``.
    """
    refuse_integers(layer, x)
    if x.ndim != layer.kernel.ndim or x.shape[-1] != layer.in_channels:
        raise ValueError(
            f"{type(layer).__name__} expects (N, {axes}, {layer.in_channels}) with "
            f"channels last; got shape {tuple(x.shape)}."
        )


def in_one_dtype(layer: Any, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The input and the bias of a layer in the dtype that it computes in."""
    x = x.astype(layer.dtype or jnp.result_type(x, layer.kernel[...]))
    return x, None if layer.bias is None else jnp.asarray(layer.bias[...], x.dtype)


class Conv(nnx.Module):
    """2-d convolution, equal to ``torch.nn.Conv2d`` up to the layout; without bias unless asked
    for.

    Attributes:
      kernel: ``nnx.Param``, ``(kh, kw, in_channels // groups, out_channels)``.
      bias: ``nnx.Param``, ``(out_channels,)``, or None.

    Args:
      in_channels, out_channels: Channels of input ``(N, H, W, in_channels)`` and output.
      kernel_size, stride, dilation: In pixels: one number, or one for each spatial axis.
      padding: As ``stride``, on each side; or a name, see :func:`convolve`.
      groups: Must divide both channel counts.
      padding_mode: ``"zeros"``, or what stands beyond the edge instead: ``"reflect"``,
        ``"replicate"`` or ``"circular"``.
      use_bias: Whether there is a bias; it starts as ``nn.Conv2d`` starts it.
      standardized: Each output channel's kernel is standardised before it is used, and this is
        added to its variance (Qiao et al. 2019, arXiv:1903.10520); None: it is used as it is.
      dtype: Dtype of the computation; None: the promotion of input and kernel.
      param_dtype: Dtype of the kernel at initialisation.
      precision, conv_lowering: See :func:`convolve`.
      kernel_init: Default as ``nn.Conv2d`` does.
      rngs: Source of the ``params`` stream; None builds the module without values.
    Raises:
      ValueError: ``groups`` does not divide the channels; on a call, an input that is not ``(N, H,
        W, in_channels)``.
    """

    _axes = "H, W"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        use_bias: bool = False,
        standardized: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: lax.PrecisionLike = None,
        conv_lowering: Lowering = "auto",
        kernel_init: Initializer = torch_default,
        rngs: nnx.Rngs | None,
    ) -> None:
        named = {"conv_lowering": (conv_lowering, Lowering)}
        for name, (value, kind) in {**named, "padding_mode": (padding_mode, PaddingMode)}.items():
            if value not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name} {value!r} is unknown; choose from {known}.")
        check_groups(in_channels, out_channels, groups)
        axes = len(self._axes.split(","))
        window = per_axis(kernel_size, axes, "kernel_size")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.padding: Padding = padding
        self.dilation = dilation
        self.groups = groups
        self.padding_mode: PaddingMode = padding_mode
        self.standardized = standardized
        self.dtype = dtype
        self.precision = precision
        self.conv_lowering: Lowering = conv_lowering
        shape = (*window, in_channels // groups, out_channels)
        self.kernel = parameter(kernel_init, rngs, shape, param_dtype)
        start = uniform_bias(math.prod(shape[:-1]))
        self.bias = parameter(start, rngs, (out_channels,), param_dtype, use_bias)

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``."""
        check_channels(self, x, self._axes)
        kernel, padding = self.kernel[...], self.padding
        x, bias = in_one_dtype(self, x)
        if self.standardized is not None:
            kernel = normalised(kernel, range(kernel.ndim - 1), self.standardized)
        if self.padding_mode != "zeros":
            dilation = per_axis(self.dilation, x.ndim - 2, "dilation")
            around = sides(padding, kernel.shape[:-2], dilation, self.stride, x.shape[1:-1])
            x, padding = pad(x, ((0, 0), *around, (0, 0)), mode=self.padding_mode), 0
        return convolve(
            x,
            jnp.asarray(kernel, x.dtype),
            bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            precision=self.precision,
            lowering=self.conv_lowering,
        )


class Conv1d(Conv):
    """1-d convolution of ``(N, L, in_channels)``, equal to ``torch.nn.Conv1d`` up to the layout;
    without bias unless asked for.

    Attributes:
      kernel: ``nnx.Param``, ``(k, in_channels // groups, out_channels)``.
      bias: ``nnx.Param``, ``(out_channels,)``, or None.

    Args:
      in_channels, out_channels, kernel_size: As for :class:`Conv`, and so are all options.
    """

    _axes = "L"


class ChannelConv(nnx.Module):
    """A convolution along the channels, without bias and padded to keep their number.

    Attributes:
      kernel: ``nnx.Param``, ``(window, 1, 1)``.

    Args:
      window: Channels that each output sees; odd.
      dtype, param_dtype, precision, rngs: As for :class:`flax_resblock.nn.conv.Conv`.
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
        self.kernel = parameter(kernel_init, rngs, (window, 1, 1), param_dtype)

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, 1, C)`` to ``(N, 1, C)``, as ``torch.nn.Conv1d`` has it."""
        kernel = self.kernel[...]
        dtype = self.dtype or jnp.result_type(x, kernel)
        rows = jnp.swapaxes(x.astype(dtype), 1, 2)
        kernel, half = jnp.asarray(kernel, dtype), kernel.shape[0] // 2
        y = convolve(rows, kernel, padding=half, precision=self.precision)
        return jnp.swapaxes(y, 1, 2)
