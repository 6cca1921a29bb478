"""Operators that name axes, cut or join."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from flax_resblock.port import axes
from flax_resblock.port.folding import MARK
from flax_resblock.port.operator_names import name_of
from flax_resblock.port.operators.rules import along, rule
from flax_resblock.port.placing import Values
from flax_resblock.port.sizes import added, follows, number_of, same_size, shape_of
from flax_resblock.port.values import ANY, Constant, Value


@rule("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten")
@rule("squeeze", "unsqueeze", "squeeze_dim")
def _reshape(b: Values, node: Any, x: Any, *_: Any, **__: Any) -> Value:
    if MARK in node.meta:
        return b.reshaped(b.value(x), shape_of(node), as_it_is=True)
    return b.reshaped(b.value(x), shape_of(node))


@rule("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "to", "_to_copy", "type_as")
@rule("float", "requires_grad")
def _same(b: Values, node: Any, x: Any, *_: Any, **__: Any) -> Any:
    found = b.number(x)
    if "detach" in str(node.target) and isinstance(found, Value):
        return b.new(
            "jax.lax.stop_gradient({})", (found,), found.shape, found.order, hint=found.hint
        )
    source, made = getattr(x, "meta", {}).get("val"), node.meta["val"].dtype
    if isinstance(found, Value) and source is not None and source.dtype != made:
        if not source.dtype.is_floating_point and made.is_floating_point:
            text = f"{{3}}.astype({b.dtype})"
            return b.new(text, (found,), found.shape, found.order, hint=found.hint)
        if made == torch.bool:
            return b.new("{1} != 0", (found,), found.shape, found.order, binding=ANY, hint="mask")
        raise b.refusal(f"it casts {source.dtype} to {made}, which is not supported")
    return found


@rule("_assert_tensor_metadata")
def _nothing(b: Values, node: Any, *_: Any, **__: Any) -> None:
    return None


@rule("permute")
def _permute(b: Values, node: Any, x: Any, dims: Sequence[int]) -> Value:
    return b.transposed(b.value(x), [dim % len(dims) for dim in dims])


@rule("transpose", "t")
def _transpose(b: Values, node: Any, x: Any, first: int = 0, second: int = 1) -> Value:
    value = b.value(x)
    dims = list(range(len(value.shape)))
    first, second = first % len(dims), second % len(dims)
    dims[first], dims[second] = dims[second], dims[first]
    return b.transposed(value, dims)


@rule("zeros", "new_zeros", "zeros_like", "ones", "new_ones", "ones_like")
@rule("full", "new_full", "full_like")
def _filled(b: Values, node: Any, like: Any, *rest: Any, **_: Any) -> Value:
    name, shape = name_of(node), shape_of(node)
    if not node.meta["val"].dtype.is_floating_point:
        raise b.refusal(f"{name} of {node.meta['val'].dtype} is not supported")
    kind = name.removeprefix("new_").removesuffix("_like")
    amount = [Constant(rest[-1], "amount")] if kind == "full" else []
    filled = ", {}" if amount else ""
    if name.endswith("_like"):
        value = b.settled(b.value(like))
        return b.new(f"jnp.{name}({{}}{filled})", (value, *amount), shape, value.order, hint=kind)
    order = axes.channels_last(len(shape))
    text, holes = b.sizes(tuple(shape[axis] for axis in order), None)
    text = f"jnp.{kind}(({text}){filled}, {b.dtype})"
    return b.new(text, [*holes, *amount], shape, order, hint=kind)


@rule("repeat", "tile")
def _repeat(b: Values, node: Any, x: Any, times: Sequence[Any]) -> Value:
    value, shape = b.settled(b.value(x)), shape_of(node)
    value = b.reshaped(value, (1,) * (len(shape) - len(value.shape)) + value.shape)
    if all(have in (1, want) for have, want in zip(value.shape, shape, strict=True)):
        made = b.relabelled_plain(value)
        made.expanded = shape
        return made
    ours = tuple(number_of(times[axis]) for axis in value.order)
    holes = (value, Constant(ours, "times"))
    return b.new("jnp.tile({}, {})", holes, shape, value.order, hint=value.hint)


@rule("repeat_interleave")
def _repeat_interleave(b: Values, node: Any, x: Any, times: Any, dim: Any = None) -> Value:
    value = b.settled(b.value(x))
    if dim is None or not isinstance(times, int):
        raise b.refusal("repeat_interleave needs a number and an axis")
    text = f"jnp.repeat({{}}, {{}}, axis={along(b, value, dim)})"
    holes = (value, Constant(times, "times"))
    return b.new(text, holes, shape_of(node), value.order, hint=value.hint)


@rule("mT", "numpy_T")
def _turned(b: Values, node: Any, x: Any) -> Value:
    *outer, rows, columns = range(len(b.value(x).shape))
    turned = [*outer, columns, rows] if name_of(node) == "mT" else [columns, rows, *outer[::-1]]
    return b.transposed(b.value(x), turned)


@rule("movedim", "moveaxis")
def _movedim(b: Values, node: Any, x: Any, sources: Any, targets: Any) -> Value:
    value = b.value(x)
    rank = len(value.shape)
    ends = [[one] if isinstance(one, int) else one for one in (sources, targets)]
    before, after = ([dim % rank for dim in dims] for dims in ends)
    dims = [dim for dim in range(rank) if dim not in before]
    for place, dim in sorted(zip(after, before, strict=True)):
        dims.insert(place, dim)
    return b.transposed(value, dims)


@rule("expand", "expand_as", "broadcast_to")
def _expand(b: Values, node: Any, x: Any, *_: Any, **__: Any) -> Value:
    value, shape = b.value(x), shape_of(node)
    if shape == value.shape:
        return value
    made = b.relabelled_plain(value)
    made.expanded = shape
    return made


@rule("cat")
def _cat(b: Any, node: Any, tensors: Sequence[Any], dim: int = 0) -> Value:
    values = [b.settled(b.value(one)) for one in tensors]
    if len(values) == 1:
        return values[0]
    order = values[0].order
    values = [b.bring(one, order) for one in values]
    axis = along(b, values[0], dim)
    if values == b.listed and b.body.list_input:
        text, holes = f"jnp.concatenate({b.body.arguments[0]}, axis={axis})", ()
    else:
        text = f"jnp.concatenate([{', '.join('{}' for _ in values)}], axis={axis})"
        holes = tuple(values)
    return b.new(text, holes, shape_of(node), order, hint="joined")


@rule("stack")
def _stack(b: Values, node: Any, tensors: Sequence[Any], dim: int = 0) -> Value:
    values = [b.settled(b.value(one)) for one in tensors]
    order = values[0].order
    values = [b.bring(one, order) for one in values]
    place, after = axes.place_of_new(order, dim % (len(order) + 1))
    text = f"jnp.stack([{', '.join('{}' for _ in values)}], axis={place})"
    return b.new(text, values, shape_of(node), after, hint="stacked")


def pieces(b: Values, node: Any, value: Value, dim: Any, text: str, holes: Sequence[Any]) -> Value:
    """Several tensors that one is split into."""
    whole = b.new(text, (value, *holes), (), (), hint="parts")
    shapes = [tuple(number_of(size) for size in one.shape) for one in node.meta["val"]]
    whole.items = [
        b.new(f"{{3}}[{place}]", (whole,), shape, value.order, hint=f"part{place}")
        for place, shape in enumerate(shapes)
    ]
    return whole


@rule("chunk", "split", "split_with_sizes")
def _split(b: Values, node: Any, x: Any, size: Any, dim: int = 0) -> Value:
    value = b.settled(b.value(x))
    lengths = [number_of(one.shape[dim]) for one in node.meta["val"]]
    axis = along(b, value, dim)
    if all(same_size(one, lengths[0]) for one in lengths):
        return pieces(b, node, value, dim, f"jnp.split({{}}, {len(lengths)}, axis={axis})", ())
    text = f"jnp.split({{}}, {{}}, axis={axis})"
    ends: Sequence[Any] = list(accumulate(lengths[:-1], added))
    if not any(map(follows, ends)):
        ends = tuple(ends)  # it may be a default, which no list is
    return pieces(b, node, value, dim, text, (Constant(ends, "ends"),))


@rule("unbind")
def _unbind(b: Values, node: Any, x: Any, dim: int = 0) -> Value:
    value = b.settled(b.value(x))
    whole = b.new("{}", (value,), (), (), hint="parts")
    whole.items = [
        selected(b, value, dim % len(value.shape), i) for i in range(len(node.meta["val"]))
    ]
    return whole


@rule("select")
def _select(b: Values, node: Any, x: Any, dim: int, index: int) -> Value:
    value = b.settled(b.value(x))
    return selected(b, value, dim % len(value.shape), b.number(index))


def selected(b: Values, value: Value, dim: int, index: Any) -> Value:
    text = indexed(value.order.index(dim), len(value.shape), "{}")
    shape = value.shape[:dim] + value.shape[dim + 1 :]
    order = axes.without(value.order, [dim])
    return b.new(f"{{3}}[{text}]", (value, Constant(index, "index")), shape, order, hint=value.hint)


def indexed(place: int, rank: int, index: str) -> str:
    behind = rank - 1 - place
    if behind < place:
        return ", ".join(["...", index, *[":"] * behind])
    return ", ".join([*[":"] * place, index])


@rule("slice")
def _slice(
    b: Values, node: Any, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    value = b.settled(b.value(x))
    index = sliced(b, value, dim, start, end, step)
    if index is None:
        return value
    text, holes = index
    return b.new(f"{{3}}[{text}]", (value, *holes), shape_of(node), value.order, hint=value.hint)


def sliced(
    b: Values, value: Value, dim: int, start: Any, end: Any, step: int
) -> tuple[str, list[Any]] | None:
    """The index of a slice along one axis, with its holes; None if it is the whole tensor."""
    start, end = 0 if start is None else b.number(start), b.number(end)
    size = value.shape[dim % len(value.shape)]
    whole_end = end is None or (end >= size if not follows(end) else same_size(end, size))
    from_first = start == 0 and not follows(start)
    if from_first and whole_end and step == 1:
        return None
    holes: list[Any] = [] if from_first else [Constant(start, "start")]
    text = ("" if from_first else "{}") + ":" + ("" if whole_end else "{}")
    text += f":{step}" if step != 1 else ""
    holes += [] if whole_end else [Constant(end, "end")]
    return indexed(value.order.index(dim % len(value.shape)), len(value.shape), text), holes


@rule("narrow")
def _narrow(b: Values, node: Any, x: Any, dim: int, start: Any, length: Any) -> Value:
    value = b.value(x)
    first = b.number(start)
    if not follows(first) and first < 0:
        first = added(value.shape[dim % len(value.shape)], first)
    return _slice(b, node, x, dim, first, added(first, b.number(length)))


@rule("index_select")
def _index_select(b: Values, node: Any, x: Any, dim: int, index: Any) -> Value:
    value, places = b.settled(b.value(x)), b.value(index)
    text = f"jnp.take({{}}, {{}}, axis={along(b, value, dim)})"
    return b.new(text, (value, places), shape_of(node), value.order, hint=value.hint)


@rule("index")
def _index(b: Values, node: Any, x: Any, indices: Sequence[Any]) -> Value:
    given = [place for place, one in enumerate(indices) if one is not None]
    chosen = [b.value(indices[place]) for place in given]
    if (
        len(given) != 1
        or len(chosen[0].shape) != 1
        or indices[given[0]].meta["val"].dtype == torch.bool
    ):
        raise b.refusal("an index is supported that is one list of places along one axis")
    return _index_select(b, node, x, given[0], chosen[0])


@rule("flip", "roll")
def _flip(b: Values, node: Any, x: Any, *numbers: Any) -> Value:
    value = b.settled(b.value(x))
    name = "flip" if "flip" in str(node.target) else "roll"
    dims = tuple(along(b, value, dim) for dim in numbers[-1])
    text = f"jnp.{name}({{}}, {'' if name == 'flip' else '{}, '}axis={dims!r})"
    holes = () if name == "flip" else (Constant(tuple(numbers[0]), "shifts"),)
    return b.new(text, (value, *holes), value.shape, value.order, hint=name)
