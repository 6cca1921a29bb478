"""Array codecs: how one tensor is laid out in PyTorch and in Flax. A permutation knows its own inverse; no value is ever computed with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BAND = 32
"""Rows moved at a time: 32 float32 are two cache lines, so both sides of the transposition stay in the first-level cache."""


def _collapse(shape: Sequence[int], axes: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
    """The same permutation over fewer axes: those of size 1 dropped, those that move together merged."""
    groups: list[list[int]] = []
    for axis in (axis for axis in axes if shape[axis] != 1):
        if groups and groups[-1][-1] == axis - 1:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    order = sorted(range(len(groups)), key=lambda i: groups[i][0])
    return [math.prod(shape[axis] for axis in groups[i]) for i in order], tuple(order.index(i) for i in range(len(groups)))


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that begins on a cache line, which lets jax take it over on the CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def permute(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """``np.ascontiguousarray(array.transpose(axes))``, about twice as fast for the kernels of a network.

    numpy copies a transposed array in the order of the result, which touches a new cache line per element; here a band of rows is moved at a time. Bits are
    moved as unsigned integers: NaN payloads survive, and dtypes that numpy does not know natively are as fast as the others.

    Args:
      array: Any shape and dtype of 1, 2, 4 or 8 bytes.
      axes: A permutation of its axes.
    Returns:
      A new C-contiguous array.
    """
    shape, order = _collapse(array.shape, axes)
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(shape)
    view = bits.transpose(order)
    out = _aligned_empty(view.shape, view.dtype)
    if view.ndim < 2:
        out[...] = view
    elif order == (2, 1, 0):
        rows = out.reshape(shape[2], shape[1] * shape[0])
        for start in range(0, shape[2], _BAND):  # HWIO -> OIHW: whole runs of output channels first, then a plain matrix transposition
            band = np.ascontiguousarray(bits[:, :, start : start + _BAND].transpose(1, 0, 2))
            rows[start : start + _BAND] = band.reshape(shape[1] * shape[0], band.shape[2]).T
    else:
        for start in range(0, view.shape[-1], _BAND):
            out[..., start : start + _BAND] = view[..., start : start + _BAND]
    return out.reshape([array.shape[axis] for axis in axes]).view(array.dtype)


@dataclass(frozen=True)
class Codec:
    """A layout change of one tensor.

    Attributes:
      name: For people.
      axes: ``flax = torch.transpose(axes)``; None keeps the layout.
    """

    name: str
    axes: tuple[int, ...] | None = None

    @property
    def inverse_axes(self) -> tuple[int, ...] | None:
        """``torch = flax.transpose(inverse_axes)``."""
        return None if self.axes is None else tuple(int(axis) for axis in np.argsort(self.axes))

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """PyTorch's layout to Flax's; the array itself where nothing moves."""
        return array if self.axes is None else permute(array, self.axes)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Flax's layout to PyTorch's; the array itself where nothing moves."""
        return array if self.inverse_axes is None else permute(array, self.inverse_axes)

    def flax_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The Flax shape of a tensor of PyTorch shape ``shape``; None where the number of axes does not fit."""
        if self.axes is None:
            return tuple(shape)
        return tuple(shape[axis] for axis in self.axes) if len(shape) == len(self.axes) else None

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The PyTorch shape of a tensor of Flax shape ``shape``."""
        return tuple(shape) if self.inverse_axes is None else tuple(shape[axis] for axis in self.inverse_axes)


AS_IS = Codec("as is")
OIHW_HWIO = Codec("OIHW <-> HWIO", (2, 3, 1, 0))
OIW_WIO = Codec("OIW <-> WIO", (2, 1, 0))
TRANSPOSED = Codec("transposed", (1, 0))
