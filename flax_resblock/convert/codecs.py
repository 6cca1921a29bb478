"""Codecs: how a tensor's memory layout differs between the frameworks. Nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

_ALIGNMENT = 64
"""Bytes of a cache line."""
_LINE = 16
"""Rows moved at a time: 16 float32 are one cache line, which is then written whole."""
_BLOCK = 1 << 18
"""Bytes moved at a time where runs are taken apart, which stay in the second-level cache."""


def _collapse(shape: Sequence[int], axes: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
    """The same permutation over fewer axes: size 1 dropped, those that move together merged."""
    groups: list[list[int]] = []
    for axis in (axis for axis in axes if shape[axis] != 1):
        if groups and groups[-1][-1] == axis - 1:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    order = sorted(range(len(groups)), key=lambda i: groups[i][0])
    sizes = [math.prod(shape[axis] for axis in groups[i]) for i in order]
    return sizes, tuple(order.index(i) for i in range(len(groups)))


def one_block(like: Sequence[tuple[Sequence[int], np.dtype]]) -> list[np.ndarray]:
    """Uninitialised arrays of these shapes and dtypes, side by side in one block of memory.

    Each begins on a cache line, which lets jax take it over on the CPU without a copy; and the
    kernel gives numpy large pages for one large block, which cost a tenth of the time that the
    small pages of many arrays do."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in like]
    starts = [0, *accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    raw = np.empty(starts[-1] + _ALIGNMENT, np.uint8)
    raw = raw[-raw.ctypes.data % _ALIGNMENT :]
    return [
        raw[start : start + size].view(dtype).reshape(shape)
        for start, size, (shape, dtype) in zip(starts, sizes, like, strict=False)
    ]


def permute(array: np.ndarray, axes: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
    """``np.ascontiguousarray(array.transpose(axes))``, two to ten times as fast for the kernels of
    a network.

    numpy copies a transposed array in the order of the result, which touches a new cache line per
    element; here a cache line, or a block that fits the cache, is moved at a time. Bits are moved
    as unsigned integers: NaN payloads survive, and dtypes that numpy does not know natively are as
    fast as the others.

    Args:
      array: Any shape and dtype of 1, 2, 4 or 8 bytes.
      axes: A permutation of its axes.
      out: Where to put the result: C-contiguous, of its shape and dtype. None: in a new array that
        begins on a cache line.
    Returns:
      The result. A view of memory that is in this order already is not copied into a new array.
    """
    if out is None and not array.flags.c_contiguous:
        seen = array.transpose(axes)
        if seen.flags.c_contiguous:
            return seen
    if out is None:
        (out,) = one_block([([array.shape[axis] for axis in axes], array.dtype)])
    if array.size:
        shape, order = _collapse(array.shape, axes)
        bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(shape)
        _move(bits, order, out.view(bits.dtype).reshape([shape[axis] for axis in order]))
    return out


def _move(bits: np.ndarray, order: tuple[int, ...], out: np.ndarray) -> None:
    """``out[...] = bits.transpose(order)``."""
    if order == (2, 1, 0) and bits.shape[2] <= bits.shape[0]:
        _reverse(bits, out)
    elif order == (2, 1, 0):
        _reverse(out, bits, backwards=True)
    elif len(order) > 1:
        view = bits.transpose(order)
        for start in range(0, view.shape[-1], _LINE):
            out[..., start : start + _LINE] = view[..., start : start + _LINE]
    else:
        out[...] = bits


def _reverse(short: np.ndarray, long: np.ndarray, *, backwards: bool = False) -> None:
    """``long[...] = short.transpose(2, 1, 0)``, or ``short[...] = long.transpose(2, 1, 0)``, where
    the last axis of ``short`` is the short one.

    A whole run along the short axis (the nine taps of a kernel) moves as one element, and is taken
    apart, or put together, within the cache."""
    first, middle, run = short.shape
    runs = short.reshape(first, middle * run).view(f"V{run * short.itemsize}")  # (first, middle)
    step = max(1, _BLOCK // (first * run * short.itemsize))
    for start in range(0, middle, step):
        block = slice(start, start + step)
        if backwards:
            together = np.ascontiguousarray(long[:, block].transpose(1, 2, 0))
            runs[:, block] = together.reshape(-1, first * run).view(runs.dtype).T
        else:
            together = np.ascontiguousarray(runs[:, block].T).view(short.dtype)
            long[:, block] = together.reshape(-1, first, run).transpose(2, 0, 1)


@dataclass(frozen=True)
class Codec:
    """The change of memory layout of one tensor.

    Attributes:
      name: For messages.
      axes: ``flax = torch.transpose(axes)``; None keeps the layout.
      columns: Of a matrix: the map ``(C, H, W)`` that its columns are in PyTorch, whose channels
        come last among the rows that they are in Flax.
      pixels: Axes of length 1 that PyTorch has behind the others, and Flax does not.
      leading: Such axes in front of the others, which programs of JAX have.
      flax_leading: Such axes that Flax has in front of the others.
    """

    name: str
    axes: tuple[int, ...] | None = None
    columns: tuple[int, int, int] | None = None
    pixels: int = 0
    leading: int = 0
    flax_leading: int = 0

    @cached_property
    def inverse_axes(self) -> tuple[int, ...] | None:
        """``torch = flax.transpose(inverse_axes)``."""
        return None if self.axes is None else tuple(int(axis) for axis in np.argsort(self.axes))

    def to_flax(self, array: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """PyTorch's layout to Flax's; the array itself where nothing moves into no place."""
        if self.axes is None and out is None:
            return array
        if self.columns is not None:
            (count, _), (c, h, w) = array.shape, self.columns
            place = None if out is None else out.reshape(h, w, c, count)
            moved = permute(array.reshape(count, c, h, w), (2, 3, 1, 0), place)
            return moved.reshape(-1, count)
        array = array.reshape(array.shape[self.leading : array.ndim - self.pixels])
        place = None if out is None else out.reshape(out.shape[self.flax_leading :])
        moved = permute(array, self.axes or range(array.ndim), place)
        return moved.reshape((1,) * self.flax_leading + moved.shape) if out is None else out

    def seen_by_torch(self, array: np.ndarray) -> np.ndarray:
        """:meth:`to_torch` as a view of the same memory where there is one."""
        if self.columns is not None or self.inverse_axes is None:
            return self.to_torch(array)
        moved = array.reshape(array.shape[self.flax_leading :]).transpose(self.inverse_axes)
        return moved.reshape(self._framed(moved.shape))

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Flax's layout to PyTorch's; the array itself where nothing moves."""
        if self.columns is not None:
            c, h, w = self.columns
            apart = array.reshape(h, w, c, -1)
            return permute(apart, (3, 2, 0, 1)).reshape(apart.shape[-1], -1)
        array = array.reshape(array.shape[self.flax_leading :])
        moved = array if self.inverse_axes is None else permute(array, self.inverse_axes)
        return moved.reshape(self._framed(moved.shape))

    def flax_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The Flax shape of a PyTorch shape; None where the number of axes does not fit."""
        if self.axes is None:
            return tuple(shape)
        inner = tuple(shape[self.leading : len(shape) - self.pixels])
        if len(inner) != len(self.axes) or self._framed(inner) != tuple(shape):
            return None
        return (1,) * self.flax_leading + tuple(inner[axis] for axis in self.axes)

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The PyTorch shape of a tensor of Flax shape ``shape``."""
        shape = shape[self.flax_leading :]
        axes = self.inverse_axes or range(len(shape))
        return self._framed(tuple(shape[axis] for axis in axes))

    def _framed(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * self.leading + shape + (1,) * self.pixels


AS_IS = Codec("as is")
OIHW_HWIO = Codec("OIHW <-> HWIO", (2, 3, 1, 0))
OIW_WIO = Codec("OIW <-> WIO", (2, 1, 0))
TRANSPOSED = Codec("transposed", (1, 0))
PIXEL = Codec("OI11 <-> IO", (1, 0), pixels=2)
MATRIX = Codec("OI <-> 11IO", (1, 0), flax_leading=2)
LED_PIXEL = Codec("11IO <-> IO", (0, 1), leading=2)
LED_VECTOR = Codec("111C <-> C", (0,), leading=3)
IOHW_HWIO = Codec("IOHW <-> HWIO", (2, 3, 0, 1))
IOW_WIO = Codec("IOW <-> WIO", (2, 0, 1))
CHW_HWC = Codec("CHW <-> HWC", (1, 2, 0))


def folded(columns: tuple[int, int, int]) -> Codec:
    """Of the weight of a linear layer over a flattened map ``(C, H, W)``, with channels last."""
    return Codec("transposed, a map's channels last", (1, 0), columns)
