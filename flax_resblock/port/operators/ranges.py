"""Operators that make numbers from nothing but sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax_resblock.port.operator_names import name_of
from flax_resblock.port.operators.rules import rule, several
from flax_resblock.port.placing import Values
from flax_resblock.port.sizes import number_of, shape_of
from flax_resblock.port.values import Constant, Value


@rule("arange", "linspace")
def _numbers(b: Values, node: Any, *arguments: Any, **_: Any) -> Value:
    numbers = ", ".join("{}" for _ in arguments)
    text = f"jnp.{name_of(node).replace('spaced', 'linspace')}({numbers}, dtype={b.dtype})"
    holes = [Constant(one, "end") for one in arguments]
    return b.new(text, holes, shape_of(node), (0,), hint="numbers")


@rule("spaced")
def _spaced(b: Values, node: Any, places: Any, start: Any, end: Any) -> Value:
    return _numbers(b, node, start, end, shape_of(node)[0])


@rule("meshgrid")
def _meshgrid(b: Values, node: Any, tensors: Sequence[Any], indexing: str = "ij") -> Value:
    places = list(range(len(tensors)))
    if indexing == "xy":
        places[:2] = places[:2][::-1]
    values = [b.settled(b.value(one)) for one in tensors]
    shape = tuple(number_of(size) for size in node.meta["val"][0].shape)
    items = []
    for place, value in zip(places, values, strict=True):
        sizes = tuple(size if axis == place else 1 for axis, size in enumerate(shape))
        made = b.relabelled_plain(b.reshaped(value, sizes))
        made.expanded = shape
        items.append(made)
    return several(b, items)
