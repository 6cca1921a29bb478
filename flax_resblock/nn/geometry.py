"""Sizes of windows, one number or one for each spatial axis; and padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Size = int | Sequence[int]
"""The same number for every spatial axis, or one number for each, such as ``(height, width)``."""
Padding = int | Sequence[int] | Sequence[tuple[int, int]] | Literal["same", "valid", "SAME"]
"""Pixels on each side as a :data:`Size`, or a pair, before and after, for each axis; or a name:
``"same"`` and ``"valid"`` are PyTorch's, ``"SAME"`` is that of JAX and TensorFlow."""
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def per_axis(size: Size, axes: int, name: str) -> tuple[int, ...]:
    """One number for each of ``axes`` spatial axes.

    Raises:
      ValueError: ``size`` has another length.
    """
    sizes = (size,) * axes if isinstance(size, int) else tuple(size)
    if len(sizes) != axes:
        raise ValueError(f"{name}={size!r} must be one number or {axes}, one for each axis.")
    return sizes


def sides(
    padding: Padding,
    window: Sequence[int],
    dilation: Sequence[int],
    stride: Size,
    extents: Sequence[int] = (),
) -> tuple[tuple[int, int], ...]:
    """Pixels before and after each spatial axis.

    ``"same"`` is PyTorch's: the output of stride 1 has the size of the input, and an odd number
    of pixels has its larger half at the end. ``"SAME"`` is JAX's: the output of any stride has
    ``ceil(extent / stride)`` pixels.

    Args:
      padding: See :data:`Padding`.
      window, dilation, stride: In pixels.
      extents: Of the input along each axis; ``"SAME"`` needs them.
    Raises:
      ValueError: An unknown name, or ``"same"`` with a stride, which PyTorch refuses too.
    """
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * len(window)
        if padding == "SAME":
            reach = [d * (size - 1) + 1 for d, size in zip(dilation, window, strict=True)]
            steps = per_axis(stride, len(window), "stride")
            return tuple(lax.padtype_to_pads(extents, reach, steps, "SAME"))
        if padding != "same":
            raise ValueError(
                f"padding {padding!r} is unknown; choose 'same', 'valid', 'SAME' or numbers."
            )
        if set(per_axis(stride, len(window), "stride")) != {1}:
            raise ValueError("padding='same' needs stride 1, as in PyTorch.")
        totals = [d * (size - 1) for d, size in zip(dilation, window, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    pads = (padding,) * len(window) if isinstance(padding, int) else tuple(padding)
    if len(pads) != len(window):
        raise ValueError(f"padding={padding!r} must be one number or {len(window)}, one each axis.")
    return tuple((one, one) if isinstance(one, int) else (one[0], one[1]) for one in pads)


def per_axis_of(size: Size, x: Any) -> tuple[int, ...]:
    """One number for each spatial axis of ``(N, *spatial, C)``.

    Raises:
      ValueError: ``x`` has no spatial axis, or ``size`` has another length.
    """
    if x.ndim < 3:
        raise ValueError(
            f"expected (N, *spatial, C) with channels last; got shape {tuple(x.shape)}."
        )
    return per_axis(size, x.ndim - 2, "size")


def equal(*sizes: Sequence[Any]) -> bool:
    """Whether each of the sizes is the same along all axes."""
    return all(len(set(size)) == 1 for size in sizes)


_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
"""PyTorch's names of padding modes and numpy's."""


def pad(
    x: jax.Array,
    widths: Sequence[tuple[int, int]],
    mode: Literal["constant"] | PaddingMode = "constant",
    value: float = 0.0,
) -> jax.Array:
    """``torch.nn.functional.pad`` with the widths in the order of the axes of ``x``.

    Args:
      x: Any shape.
      widths: How many values to add before and after each axis; negative numbers cut values off.
      mode: ``"constant"`` (``"zeros"`` is another name for it), ``"reflect"``, ``"replicate"`` or
        ``"circular"``.
      value: What ``"constant"`` adds.
    Raises:
      ValueError: An unknown mode; more reflected or wrapped values than the axis has, or negative
        widths in a mode other than ``"constant"``. PyTorch refuses these too.
    """
    if mode in ("constant", "zeros"):
        return lax.pad(x, jnp.asarray(value, x.dtype), [(low, high, 0) for low, high in widths])
    if mode not in _MODES:
        raise ValueError(f"mode {mode!r} is unknown; choose constant or {', '.join(_MODES)}.")
    for size, pair in zip(x.shape, widths, strict=True):
        most = {"reflect": size - 1, "circular": size}.get(mode)
        if min(pair) < 0 or (most is not None and max(pair) > 0 and max(pair) > most):
            raise ValueError(f"mode {mode!r} cannot pad an axis of {size} values by {pair}.")
    return jnp.pad(x, widths, mode=_MODES[mode])


def window_taps(
    x: jax.Array, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[jax.Array]:
    """The values of every window, by their place in it.

    Args:
      x: ``(N, *spatial, C)``.
      size, stride, dilation: One number for each spatial axis.
    Returns:
      One ``(N, *windows, C)`` for each place of a window, in the order of rows.
    """
    axes = list(zip(x.shape[1:-1], size, stride, dilation, strict=True))
    spans = [extent - hole * (width - 1) for extent, width, _, hole in axes]
    return [
        x[:, *(slice(i, i + span, axis[2]) for i, span, axis in zip(at, spans, axes, strict=True))]
        for at in product(*(range(0, width * hole, hole) for _, width, _, hole in axes))
    ]


def stacked_taps(
    x: jax.Array, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> jax.Array:
    """:func:`window_taps` as one array ``(N, *windows, C, K)``."""
    return jnp.stack(window_taps(x, size, stride, dilation), -1)


def unfold(
    x: jax.Array, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
) -> jax.Array:
    """The windows of images, as ``torch.nn.functional.unfold``.

    Args:
      x: ``(N, H, W, C)``.
      kernel_size, dilation, padding, stride: In pixels: one number, or one for each spatial axis.
        Padding is zeros.
    Returns:
      ``(N, L, C * K)``: ``L`` windows in rows, each with its ``K`` values of one channel, then
      those of the next.
    """
    size, hole, pads, step = (per_axis_of(s, x) for s in (kernel_size, dilation, padding, stride))
    x = pad(x, ((0, 0), *((one, one) for one in pads), (0, 0)))
    taps = stacked_taps(x, size, step, hole)
    return taps.reshape(x.shape[0], math.prod(taps.shape[1:-2]), -1)


def fold(
    x: jax.Array,
    output_size: Size,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Size = 0,
    stride: Size = 1,
) -> jax.Array:
    """The sums of windows where they overlap, as ``torch.nn.functional.fold``.

    Args:
      x: ``(N, L, C * K)``, as :func:`unfold` returns it.
      output_size: Height and width of the images.
      kernel_size, dilation, padding, stride: As for :func:`unfold`.
    Returns:
      ``(N, H, W, C)``.
    Raises:
      ValueError: Images of this size have another number of windows, or of values in a window.
    """
    channels = x.shape[-1] // math.prod(per_axis(kernel_size, 2, "kernel_size"))
    shape = (x.shape[0], *per_axis(output_size, 2, "output_size"), channels)

    def windows(images: jax.Array) -> jax.Array:
        return unfold(images, kernel_size, dilation, padding, stride)

    images = jax.ShapeDtypeStruct(shape, x.dtype)
    expected = jax.eval_shape(windows, images).shape
    if x.shape != expected:
        raise ValueError(f"fold to {shape} needs windows of shape {expected}; got {x.shape}.")
    return jax.linear_transpose(windows, images)(x)[0]
