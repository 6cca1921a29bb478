"""Writes into a part of a tensor, as functions."""

from __future__ import annotations

from typing import Any

from flax_resblock.port import axes
from flax_resblock.port.axes import Order
from flax_resblock.port.operator_names import name_of
from flax_resblock.port.operators.rules import rule
from flax_resblock.port.operators.shapes import indexed, sliced
from flax_resblock.port.placing import Values
from flax_resblock.port.sizes import shape_of
from flax_resblock.port.values import Constant, Value


@rule("copy")
def _copy(b: Values, node: Any, x: Any, source: Any, *_: Any) -> Value:
    value, made = b.value(x), b.value(source)
    if source.meta["val"].dtype != node.meta["val"].dtype:
        raise b.refusal(f"it writes {source.meta['val'].dtype} into {node.meta['val'].dtype}")
    if made.shape == value.shape:
        return made
    made = b.relabelled_plain(made)
    made.expanded = value.shape
    return made


@rule("fill")
def _fill(b: Values, node: Any, x: Any, amount: Any) -> Value:
    value = b.settled(b.value(x))
    holes = (value, b.number(amount))
    holes = (value, holes[1] if isinstance(holes[1], Value) else Constant(holes[1], "amount"))
    return b.new("jnp.full_like({}, {})", holes, value.shape, value.order, hint="filled")


@rule("empty", "new_empty")
def _empty(b: Values, node: Any, *_: Any, **__: Any) -> Value:
    if [name_of(user) for user in list(node.users)[:1]] != ["fill"]:
        raise b.refusal("it uses memory that nothing was written to")
    shape = shape_of(node)
    order = axes.channels_last(len(shape))
    text, holes = b.sizes(tuple(shape[axis] for axis in order), None)
    return b.new(f"jnp.zeros(({text}), {b.dtype})", holes, shape, order, hint="zeros")


@rule("slice_scatter")
def _slice_scatter(
    b: Values, node: Any, x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> Value:  # fmt: skip
    value = b.settled(b.value(x))
    index = sliced(b, value, dim, start, end, step)
    if index is None:
        return b.value(source)
    text, holes = index
    return _written(b, value, text, holes, source, value.order)


@rule("select_scatter")
def _select_scatter(b: Values, node: Any, x: Any, source: Any, dim: int, place: int) -> Value:
    value = b.settled(b.value(x))
    dim %= len(value.shape)
    text = indexed(value.order.index(dim), len(value.shape), "{}")
    order = axes.without(value.order, [dim])
    return _written(b, value, text, [Constant(b.number(place), "index")], source, order)


def _written(
    b: Values, value: Value, index: str, holes: list[Any], source: Any, order: Order
) -> Value:
    """The value with ``source``, whose axes are brought in this order, at this index."""
    amount = b.number(source.args[1]) if name_of(source) == "fill" else None
    part: Any = amount
    if amount is None or isinstance(amount, Value):
        part = b.bring(b.value(source), order)
    else:
        part = Constant(amount, "amount")
    text = f"{{3}}.at[{index}].set({{}})"
    return b.new(text, (value, *holes, part), value.shape, value.order, hint=value.hint)
