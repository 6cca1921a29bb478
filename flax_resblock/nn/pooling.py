"""Pooling and low-pass filters with explicit padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_resblock.nn.conv import convolve, cpu_forms, on_accelerator
from flax_resblock.nn.geometry import (
    Size,
    equal,
    pad,
    per_axis_of,
    sides,
    stacked_taps,
    window_taps,
)
from flax_resblock.nn.scopes import in_slot
from flax_resblock.nn.selection import maximum_along


class _Windows(NamedTuple):
    """The windows of a pooling, one entry for each spatial axis."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls,
        x: jax.Array,
        kernel_size: Size,
        stride: Size | None,
        padding: Size | Literal["SAME"],
        dilation: Size,
        ceil_mode: bool,
    ) -> _Windows:
        """PyTorch's windows; with ``ceil_mode`` the last ones need more padding at the end."""
        size = per_axis_of(kernel_size, x)
        steps = size if stride is None else per_axis_of(stride, x)
        holes = per_axis_of(dilation, x)
        if isinstance(padding, str):
            return cls(size, steps, sides(padding, size, holes, steps, x.shape[1:-1]), holes)
        asked = per_axis_of(padding, x)
        if any(2 * one > extent for one, extent in zip(asked, size, strict=True)):
            raise ValueError(
                f"padding={padding} must be at most half of kernel_size={kernel_size}, as in "
                f"PyTorch."
            )
        reach = [hole * (extent - 1) + 1 for hole, extent in zip(holes, size, strict=True)]
        ends = [
            _end(n, *rest) if ceil_mode else rest[-1]
            for n, *rest in zip(x.shape[1:-1], reach, steps, asked, strict=True)
        ]
        return cls(size, steps, tuple(zip(asked, ends, strict=True)), holes)

    def reduce(self, x: jax.Array, start: float, combine: Callable[[Any, Any], Any]) -> jax.Array:
        """``combine`` over each window, beginning with ``start``."""
        return lax.reduce_window(
            x,
            np.asarray(start, x.dtype),  # a constant, by which jax knows its gradient
            combine,
            (1, *self.size, 1),
            (1, *self.stride, 1),
            ((0, 0), *self.pads, (0, 0)),
            window_dilation=(1, *self.dilation, 1),
        )


def _end(extent: int, reach: int, stride: int, padding: int) -> int:
    """The padding at the end of an axis that ``ceil_mode`` needs; a window that would begin in it
    is left out."""
    steps = -(-(extent + 2 * padding - reach) // stride)
    end = steps * stride + reach - extent - padding
    if stride > reach - padding and steps * stride >= extent + padding:
        return max(0, end - stride)
    return end


def _first_greatest(x: jax.Array, windows: _Windows) -> jax.Array:
    """Max pooling of windows with holes, which XLA's operation has no gradient for."""
    x = pad(x, ((0, 0), *windows.pads, (0, 0)), value=-jnp.inf)
    stacked = stacked_taps(x, windows.size, windows.stride, windows.dilation)
    first = jnp.argmax(stacked, -1, keepdims=True)
    return jnp.take_along_axis(stacked, first, -1)[..., 0]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _compared(x: jax.Array, windows: _Windows, shape: tuple[int, ...]) -> jax.Array:
    """Max pooling whose gradient is gathered. XLA's own is a scatter, which takes an accelerator
    several passes and adds in no fixed order.

    Args:
      x: ``(N, H, W, C)``.
      windows: Without dilation.
      shape: Of ``x``.
    """
    return windows.reduce(x, -jnp.inf, lax.max)


def _compared_forward(
    x: jax.Array, windows: _Windows, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The greatest values, and the places of the first of them in their windows."""
    padded = pad(x, ((0, 0), *windows.pads, (0, 0)), value=-jnp.inf)
    taps = window_taps(padded, windows.size, windows.stride, windows.dilation)
    greatest, places = taps[0], jnp.zeros(taps[0].shape, jnp.int8)
    for place, tap in enumerate(taps[1:], start=1):
        places = jnp.where(tap > greatest, jnp.int8(place), places)
        greatest = jnp.maximum(greatest, tap)
    return greatest, places


def _compared_backward(
    windows: _Windows, shape: tuple[int, ...], places: jax.Array, dy: jax.Array
) -> tuple[jax.Array]:
    total, zero = jnp.zeros(shape, dy.dtype), np.zeros((), dy.dtype)
    taps = product(*map(range, windows.size))
    for place, offsets in enumerate(taps):
        share = jnp.where(places == place, dy, zero)
        around = [
            (offset - low, extent - (offset - low + stride * (outputs - 1) + 1), stride - 1)
            for offset, (low, _), stride, extent, outputs in zip(
                offsets, windows.pads, windows.stride, shape[1:-1], dy.shape[1:-1], strict=True
            )
        ]
        total += lax.pad(share, zero, ((0, 0, 0), *around, (0, 0, 0)))
    return (lax.optimization_barrier(total),)


_compared.defvjp(_compared_forward, _compared_backward)
_MOST_TAPS = 16


def max_pool(
    x: jax.Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size | Literal["SAME"] = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> jax.Array:
    """The greatest value of each window, as ``torch.nn.functional.max_pool2d`` finds it. If values
    are equal, the first one receives the gradient.

    Args:
      x: ``(N, *spatial, C)``.
      kernel_size, padding, dilation: In pixels: one number, or one for each spatial axis.
        Padding is minus infinity and stands on each side, or is ``"SAME"``, which is JAX's.
      stride: As ``kernel_size``, which is its default.
      ceil_mode: Whether a window that reaches beyond the end counts, unless it begins there.
    """
    windows = _Windows.of(x, kernel_size, stride, padding, dilation, ceil_mode)
    dense = set(windows.dilation) == {1}
    if windows.size == x.shape[1:-1] and dense and not any(map(any, windows.pads)):
        flat = x.reshape(x.shape[0], -1, x.shape[-1])  # one window, too large to be unrolled
        kept = (x.shape[0], *(1 for _ in windows.size), x.shape[-1])
        return maximum_along(flat, 1, keepdims=True).reshape(kept)
    forms = cpu_forms()
    fixed = all(isinstance(size, int) for size in x.shape[1:-1])  # not symbolic, as in exports
    plain = len(windows.size) == 2 and dense
    if forms is not None and fixed and plain and equal(windows.size, windows.stride):
        pads = {*windows.pads[0], *windows.pads[1]}
        if len(pads) == 1:
            return forms.max_pool(x, windows.size[0], windows.stride[0], pads.pop())
    if on_accelerator() and fixed and plain and math.prod(windows.size) <= _MOST_TAPS:
        return _compared(x, windows, x.shape)
    if not dense:
        return _first_greatest(x, windows)
    return windows.reduce(x, -jnp.inf, lax.max)


def avg_pool(
    x: jax.Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> jax.Array:
    """The mean of each window, as ``torch.nn.functional.avg_pool2d`` computes it.

    Args:
      x: ``(N, *spatial, C)``.
      kernel_size, stride, padding, ceil_mode: As for :func:`max_pool`; padding is zeros.
      count_include_pad: Whether the padding counts as values. What ``ceil_mode`` adds beyond it
        never does.
      divisor_override: Divides the sums instead of the number of values.
    """
    windows = _Windows.of(x, kernel_size, stride, padding, 1, ceil_mode)
    sums = windows.reduce(x, 0.0, lax.add)
    whole = all(pad == (0, 0) for pad in windows.pads) or (count_include_pad and not ceil_mode)
    if divisor_override is not None:
        return sums / divisor_override
    if whole:
        return sums / math.prod(windows.size)
    ones, asked = jnp.ones((1, *x.shape[1:-1], 1), x.dtype), per_axis_of(padding, x)
    if count_include_pad:
        ones = pad(ones, ((0, 0), *((one, one) for one in asked), (0, 0)), value=1.0)
        left = zip(windows.pads, asked, strict=True)
        windows = windows._replace(pads=tuple((low - one, high - one) for (low, high), one in left))
    return sums / windows.reduce(ones, 0.0, lax.add)


def lp_pool(
    x: jax.Array,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> jax.Array:
    """The sum of the ``norm_type``-th powers of each window, to the power ``1 / norm_type``, as
    ``torch.nn.functional.lp_pool2d`` computes it.

    Args:
      x: ``(N, *spatial, C)``.
      norm_type: The exponent.
      kernel_size, stride, ceil_mode: As for :func:`max_pool`.
    """
    means = avg_pool(x**norm_type, kernel_size, stride, ceil_mode=ceil_mode)
    count = math.prod(per_axis_of(kernel_size, x))
    return (jnp.sign(means) * jax.nn.relu(jnp.abs(means)) * count) ** (1 / norm_type)


class MaxPool(nnx.Module):
    """Max pooling, equal to ``torch.nn.MaxPool2d``: pads with minus infinity on both sides.

    Args:
      window, stride, padding: In pixels, square; ``"SAME"`` pads as JAX does.
    """

    def __init__(self, window: int, stride: int, padding: int | Literal["SAME"]) -> None:
        self.window = window
        self.stride = stride
        self.padding: int | Literal["SAME"] = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H', W', C)``."""
        return max_pool(x, self.window, self.stride, self.padding)


class AveragePool(nnx.Module):
    """Mean over ``stride`` by ``stride`` pixels; at the end of an odd size over those that are
    there.

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
        return avg_pool(x, self.stride, ceil_mode=True, count_include_pad=False)


class Blur(nnx.Module):
    """The binomial filter ``[1, 2, 1] / 4`` in both directions, with one pixel of reflection on
    each side (Zhang 2019, arXiv:1904.11486).

    Args:
      stride: In pixels.
    """

    def __init__(self, stride: int) -> None:
        self.stride = stride

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, ceil(H / stride), ceil(W / stride), C)``; height and width at
        least 2.
        """
        row = jnp.asarray([0.25, 0.5, 0.25], x.dtype)
        channels = x.shape[-1]
        kernel = jnp.broadcast_to((row[:, None] * row)[:, :, None, None], (3, 3, 1, channels))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        stride, exact = self.stride, lax.Precision.HIGHEST
        return convolve(padded, kernel, stride=stride, groups=channels, precision=exact)
