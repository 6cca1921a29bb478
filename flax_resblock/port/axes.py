"""Where PyTorch's axes are in an array whose channels come last.

An *order* says which PyTorch axis every axis of our array is: ``(0, 2, 3, 1)`` for an image
batch, which PyTorch holds as ``(N, C, H, W)`` and we hold as ``(N, H, W, C)``. A PyTorch transpose
only changes the order, and nothing moves until an operator depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Order = tuple[int, ...]
Shape = tuple[int, ...]


def torch_order(rank: int) -> Order:
    """PyTorch's own order of the axes."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """Axis 1 behind the spatial axes; PyTorch's order for fewer than three axes."""
    return (0, *range(2, rank), 1) if rank > 2 else torch_order(rank)


def permutation(order: Order, wanted: Order) -> tuple[int, ...]:
    """The argument of ``jnp.transpose`` that brings an array from one order to another."""
    return tuple(order.index(axis) for axis in wanted)


def moves_data(shape: Shape, order: Order, wanted: Order) -> bool:
    """Whether the permutation changes more than the places of axes of size 1."""

    def long_axes(one: Order) -> list[int]:
        return [axis for axis in one if shape[axis] != 1]

    return long_axes(order) != long_axes(wanted)


def without(order: Order, axes: Sequence[int]) -> Order:
    """The order after PyTorch axes were removed."""
    kept = [axis for axis in order if axis not in axes]
    return tuple(sum(other < axis for other in kept) for axis in kept)


def transposed(order: Order, axes: Sequence[int]) -> Order:
    """The order after ``tensor.permute(axes)``; the array stays as it is."""
    return tuple(list(axes).index(axis) for axis in order)


def place_of_new(order: Order, axis: int) -> tuple[int, Order]:
    """Where a new PyTorch axis goes in our array, and the order that results.

    Channels stay last where they are last; otherwise the new axis goes next to its neighbour.
    """
    shifted = [other + (other >= axis) for other in order]
    rank = len(order) + 1
    for wanted in (channels_last(rank), torch_order(rank)):
        if [other for other in wanted if other != axis] == shifted:
            return wanted.index(axis), wanted
    place = shifted.index(axis - 1) + 1 if axis else 0
    return place, (*shifted[:place], axis, *shifted[place:])


@dataclass(frozen=True)
class Reshape:
    """A PyTorch reshape in terms of our array.

    Attributes:
      before: The order that the array must have first.
      shape: The shape of our array afterwards.
      order: Its order.
    """

    before: Order
    shape: Shape
    order: Order


def reshape(shape: Shape, order: Order, wanted: Shape) -> Reshape:
    """Plans ``tensor.reshape(wanted)``.

    Args:
      shape: PyTorch's shape before.
      order: Of our array.
      wanted: PyTorch's shape afterwards, of as many elements.
    """
    groups = _groups(shape, wanted)
    group_of = {axis: group for group in groups for axis in group[0]}
    before: list[int] = []
    parts: list[int] = []
    for axis in order:
        if axis in before:
            continue
        sources, targets = group_of.get(axis, ((axis,), ()))
        before += sources
        parts += targets
    after = _with_ones(parts, wanted)
    return Reshape(tuple(before), tuple(wanted[axis] for axis in after), after)


def _groups(shape: Shape, wanted: Shape) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The smallest groups of axes, all longer than 1, that become one another."""
    left = [axis for axis, size in enumerate(shape) if size != 1]
    right = [axis for axis, size in enumerate(wanted) if size != 1]
    groups = []
    while left or right:
        sources, targets = [left.pop(0)], [right.pop(0)]
        while True:
            have = math.prod(shape[axis] for axis in sources)
            want = math.prod(wanted[axis] for axis in targets)
            if have == want:
                break
            if have < want:
                sources.append(left.pop(0))
            else:
                targets.append(right.pop(0))
        groups.append((tuple(sources), tuple(targets)))
    return groups


def _with_ones(parts: Sequence[int], wanted: Shape) -> Order:
    """An order of all axes in which those longer than 1 keep their sequence."""
    rank = len(wanted)
    for candidate in (channels_last(rank), torch_order(rank)):
        if [axis for axis in candidate if wanted[axis] != 1] == list(parts):
            return candidate
    result = list(parts)
    for axis in (axis for axis in range(rank) if wanted[axis] == 1):
        result.insert(result.index(axis - 1) + 1 if axis else 0, axis)
    return tuple(result)


def aligned(shape: Shape, order: Order, wanted: Order) -> Reshape:
    """How a tensor of fewer axes is broadcast against one with order ``wanted``.

    Args:
      shape: PyTorch's shape of the smaller tensor; PyTorch aligns it at its last axis.
      order: Of our array.
      wanted: The order of the larger tensor.
    Returns:
      A reshape whose ``shape`` has as many axes as ``wanted``, less leading ones.
    """
    missing = len(wanted) - len(shape)
    padded = (1,) * missing + shape
    before = tuple(axis - missing for axis in wanted if axis >= missing)
    if not moves_data(shape, order, before):
        before = order
    result = [padded[axis] for axis in wanted]
    while len(result) > 1 and result[0] == 1 and len(result) > len(shape) - shape.count(1):
        result.pop(0)
    return Reshape(before, tuple(result), wanted)


def inserted(have: Shape, want: Shape) -> str | None:
    """The index that does nothing but insert axes of size 1; None where more is needed."""
    index: list[str] = []
    place = 0
    for size in want:
        if place < len(have) and have[place] == size:
            index.append(":")
            place += 1
        elif size == 1:
            index.append("None")
        else:
            return None
    if place != len(have) or "None" not in index:
        return None
    while index[-1] == ":":
        index.pop()
    return ", ".join(index)
