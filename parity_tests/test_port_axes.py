"""Plans for moving axes, against numpy on PyTorch's own order."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_resblock.port import axes

SIZES = st.sampled_from([1, 1, 2, 3, 4, 6])


@st.composite
def tensors(draw: st.DrawFn, least: int = 1, most: int = 5) -> tuple[np.ndarray, axes.Order]:
    """A tensor as PyTorch has it, and an order for ours."""
    shape = draw(st.lists(SIZES, min_size=least, max_size=most))
    order = draw(st.permutations(range(len(shape))))
    return np.arange(math.prod(shape)).reshape(shape), tuple(order)


@st.composite
def factorings(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """A shape of so many elements."""
    shape = []
    while size > 1:
        divisors = [one for one in range(2, size + 1) if size % one == 0]
        shape.append(draw(st.sampled_from(divisors)))
        size //= shape[-1]
    for place in draw(st.lists(st.integers(0, len(shape)), max_size=2)):
        shape.insert(place, 1)
    return tuple(shape)


def brought(array: np.ndarray, order: axes.Order, wanted: axes.Order) -> np.ndarray:
    """Our array from one order to another."""
    if not axes.moves_data(_torch_shape(array, order), order, wanted):
        shape = _torch_shape(array, order)
        return array.reshape([shape[axis] for axis in wanted])  # what the emitted code does
    return array.transpose(axes.permutation(order, wanted))


def _torch_shape(array: np.ndarray, order: axes.Order) -> tuple[int, ...]:
    return tuple(array.shape[order.index(axis)] for axis in range(len(order)))


@given(tensors(), tensors())
def test_an_array_is_brought_from_any_order_to_any_other(one: tuple, other: tuple) -> None:
    x, order = one
    wanted = tuple(axis for axis in other[1] if axis < x.ndim)
    wanted += tuple(axis for axis in range(x.ndim) if axis not in wanted)
    assert np.array_equal(brought(x.transpose(order), order, wanted), x.transpose(wanted))


@given(st.data())
@settings(max_examples=400)
def test_a_reshape_has_the_elements_of_pytorchs(data: st.DataObject) -> None:
    x, order = data.draw(tensors())
    wanted = data.draw(factorings(x.size))
    plan = axes.reshape(x.shape, order, wanted)
    ours = brought(x.transpose(order), order, plan.before).reshape(plan.shape)
    assert sorted(plan.order) == list(range(len(wanted)))
    assert np.array_equal(ours, x.reshape(wanted).transpose(plan.order))


@given(st.sampled_from([2, 3, 5]), st.sampled_from([1, 2]), st.sampled_from([2, 4]))
def test_a_flattened_map_moves_and_a_pixel_does_not(n: int, pixels: int, channels: int) -> None:
    shape, order = (n, channels, pixels, 1), axes.channels_last(4)
    plan = axes.reshape(shape, order, (n, channels * pixels))
    assert axes.moves_data(shape, order, plan.before) is (pixels > 1)


@given(st.data())
def test_a_transpose_changes_the_order_alone(data: st.DataObject) -> None:
    x, order = data.draw(tensors())
    moved = data.draw(st.permutations(range(x.ndim)))
    after = axes.transposed(order, moved)
    assert np.array_equal(x.transpose(order), x.transpose(moved).transpose(after))


@given(st.data())
def test_axes_that_go_leave_the_others_in_order(data: st.DataObject) -> None:
    x, order = data.draw(tensors())
    gone = data.draw(st.sets(st.integers(0, x.ndim - 1)))
    places = tuple(order.index(axis) for axis in gone)
    ours = x.transpose(order).sum(places)
    assert np.array_equal(ours, x.sum(tuple(gone)).transpose(axes.without(order, list(gone))))


@given(st.data())
def test_a_new_axis_is_where_the_order_says(data: st.DataObject) -> None:
    x, order = data.draw(tensors())
    axis = data.draw(st.integers(0, x.ndim))
    place, after = axes.place_of_new(order, axis)
    ours = np.stack([x.transpose(order), -x.transpose(order)], place)
    assert np.array_equal(ours, np.stack([x, -x], axis).transpose(after))


@given(st.data())
@settings(max_examples=400)
def test_broadcasting_aligns_at_pytorchs_last_axis(data: st.DataObject) -> None:
    large, wanted = data.draw(tensors())
    rank = data.draw(st.integers(0, large.ndim))
    kept = large.shape[large.ndim - rank :]
    shape = [size if data.draw(st.booleans()) else 1 for size in kept]
    order = tuple(data.draw(st.permutations(range(rank))))
    small = np.arange(math.prod(shape)).reshape(shape)
    plan = axes.aligned(small.shape, order, wanted)
    ours = brought(small.transpose(order), order, plan.before).reshape(plan.shape)
    assert np.array_equal(large.transpose(wanted) + ours, (large + small).transpose(wanted))


def test_a_wrong_plan_would_be_noticed() -> None:
    x, order = np.arange(24).reshape(1, 2, 3, 4), axes.channels_last(4)
    plan = axes.reshape(x.shape, order, (1, 24))
    unmoved = x.transpose(order).reshape(plan.shape)
    assert not np.array_equal(unmoved, x.reshape(1, 24).transpose(plan.order))
