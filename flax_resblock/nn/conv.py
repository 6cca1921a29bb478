"""Convolution with explicit padding, and the hook to the forms that a CPU computes it in."""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_resblock.config import Lowering
from flax_resblock.nn.initializers import Initializer, initial_value, torch_default, uniform_bias
from flax_resblock.nn.scopes import in_slot


def cpu_forms(lowering: Lowering = "auto") -> Any:
    """:mod:`flax_resblock.cpu.forms` if code that is traced now takes a CPU's own forms, else None.

    This is the only place where the layers meet :mod:`flax_resblock.cpu`.

    Args:
      lowering: The layer's own choice; see :func:`flax_resblock.conv_lowering`.
    """
    from flax_resblock.cpu import switch

    return switch.forms(lowering)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    precision: lax.PrecisionLike,
    lowering: Lowering = "auto",
) -> jax.Array:
    """2-d cross-correlation, NHWC by HWIO, ``padding`` pixels on *each* side (``'SAME'`` pads (0,
    1) at stride 2 on even sizes; PyTorch pads (1, 1)).

    Args:
      x: ``(N, H, W, I)``.
      kernel: ``(kh, kw, I // groups, O)``, same dtype as ``x``.
      stride, padding, dilation: In pixels, equal in both directions.
      groups: Channel groups; output channels are assigned to groups in order, as in PyTorch.
      precision: ``lax.Precision`` of the products; only HIGHEST is float32 on TPU and on CUDA
        tensor cores.
      lowering: ``"auto"``: on a CPU, in the form that is fastest for the shapes; elsewhere, and
        everywhere with ``"xla"``, ``lax.conv_general_dilated``.
    Returns:
      ``(N, H', W', O)`` with ``H' = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1``.
    """
    forms = cpu_forms(lowering)
    if forms is not None:
        y = forms.convolve(
            x,
            kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            precision=precision,
        )
        if y is not None:
            return y
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
    """2-d convolution, equal to ``torch.nn.Conv2d`` up to the layout; without bias unless asked
    for.

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
      precision, conv_lowering: See :func:`convolve`.
      kernel_init: Default as ``nn.Conv2d`` does.
      rngs: Source of the ``params`` stream; None builds the module without values.
    Raises:
      ValueError: ``groups`` does not divide the channels; on a call, an input that is not ``(N, H,
        W, in_channels)``.
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
        conv_lowering: Lowering = "auto",
        kernel_init: Initializer = torch_default,
        rngs: nnx.Rngs | None,
    ) -> None:
        if conv_lowering not in get_args(Lowering):
            raise ValueError(
                f"conv_lowering {conv_lowering!r} is unknown; choose from "
                f"{', '.join(get_args(Lowering))}."
            )
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} must divide in_channels={in_channels} and "
                f"out_channels={out_channels}."
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.dtype = dtype
        self.precision = precision
        self.conv_lowering: Lowering = conv_lowering
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(initial_value(kernel_init, rngs, shape, param_dtype))
        fan_in = kernel_size**2 * in_channels // groups
        self.bias = (
            nnx.Param(initial_value(uniform_bias(fan_in), rngs, (out_channels,), param_dtype))
            if use_bias
            else None
        )

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``."""
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(
                f"Conv expects (N, H, W, {self.in_channels}) with channels last (NHWC); got "
                f"shape {tuple(x.shape)}."
            )
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
            lowering=self.conv_lowering,
        )
        return y if self.bias is None else y + jnp.asarray(self.bias[...], dtype)


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
        self.kernel = nnx.Param(initial_value(kernel_init, rngs, (window, 1, 1), param_dtype))

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, 1, C)`` to ``(N, 1, C)``, as ``torch.nn.Conv1d`` has it."""
        kernel = self.kernel[...]
        dtype = self.dtype or jnp.result_type(x, kernel)
        side = kernel.shape[0] // 2
        rows = jnp.swapaxes(x.astype(dtype), 1, 2)
        y = lax.conv_general_dilated(
            rows,
            jnp.asarray(kernel, dtype),
            (1,),
            [(side, side)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=self.precision,
        )
        return jnp.swapaxes(y, 1, 2)
