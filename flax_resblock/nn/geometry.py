"""Sizes of windows, one number or one for each spatial axis; and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Size = int | Sequence[int]
"""The same number for every spatial axis, or one number for each, such as ``(height, width)``."""
Padding = int | Sequence[int] | Sequence[tuple[int, int]] | Literal["same", "valid"]
"""Pixels on each side as a :data:`Size`, or a pair, before and after, for each axis; or a name."""
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
    padding: Padding, window: Sequence[int], dilation: Sequence[int], stride: Size
) -> tuple[tuple[int, int], ...]:
    """Pixels before and after each spatial axis.

    ``"same"`` is PyTorch's: the output of stride 1 has the size of the input, and an odd number
    of pixels has its larger half at the end.

    Raises:
      ValueError: An unknown name, or ``"same"`` with a stride, which PyTorch refuses too.
    """
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * len(window)
        if padding != "same":
            raise ValueError(f"padding {padding!r} is unknown; choose 'same', 'valid' or numbers.")
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
