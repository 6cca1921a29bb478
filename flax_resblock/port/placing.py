"""Builds the values of one module, and moves their axes where an operator needs them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from flax_resblock.errors import InputError
from flax_resblock.port import axes
from flax_resblock.port.axes import Order, Shape
from flax_resblock.port.parts import ParameterPart
from flax_resblock.port.tracing import FromBatch, where
from flax_resblock.port.values import ATOM, BATCH, SAME, Code, Constant, Value, source


class Values:
    """The values of one module, in the order in which they are computed.

    Args:
      network: Its name, for messages.
      place: Of the module in the network, for messages.
      any_size: Write a height and width as those of a value that has them, instead of as numbers.
    """

    def __init__(self, network: str, place: str, any_size: bool = False) -> None:
        self.network, self.place, self.any_size = network, place, any_size
        self.values: list[Value] = []
        self.env: dict[Any, Any] = {}
        self.node: Any = None
        self.parameters: dict[Value, ParameterPart] = {}
        self.listed: list[Value] = []

    def refusal(self, why: str) -> InputError:
        """An error with the place in the user's code."""
        line = where(self.node) if self.node is not None else ""
        at = f", at {line}" if line else ""
        return InputError(f"{self.network} cannot be ported: in {self.place}{at}, {why}.")

    def number(self, argument: Any) -> Any:
        """An argument of an operator: a number, or a value."""
        return self.env.get(argument, argument) if isinstance(argument, torch.fx.Node) else argument

    def value(self, argument: Any) -> Value:
        """The value of a node."""
        found = argument if isinstance(argument, Value) else self.number(argument)
        if isinstance(found, FromBatch):
            raise self.refusal("it computes with a number that depends on the size of the batch")
        if not isinstance(found, Value):
            raise self.refusal(f"it computes with {found!r} where a tensor is expected")
        return found

    def new(
        self,
        text: str,
        holes: Sequence[Any],
        shape: Shape,
        order: Order,
        *,
        binding: int = ATOM,
        hint: str = "x",
    ) -> Value:
        """A value that this code computes."""
        holes = [self._constant(hole) for hole in holes]
        code = Code(text, tuple(source(hole) for hole in holes), binding)
        line = where(self.node) if self.node is not None else ""
        made = Value(code, tuple(shape), tuple(order), hint, line)
        self.values.append(made)
        return made

    def _constant(self, hole: Any) -> Any:
        """The hole, or code for the size of the batch in it."""
        if not isinstance(hole, Constant):
            return hole
        several = isinstance(hole.value, (tuple, list))
        inside = [self.number(one) for one in (hole.value if several else [hole.value])]
        if any(isinstance(one, Value) for one in inside):
            raise self.refusal("it computes with a tensor where a number is expected")
        if not any(isinstance(one, FromBatch) for one in inside):
            return Constant(type(hole.value)(inside) if several else inside[0], hole.hint)
        if inside == [BATCH]:
            return Code(f"{{{ATOM}}}.shape[0]", (self._with_batch(),))
        raise self.refusal("it computes with a number that depends on the size of the batch")

    @property
    def dtype(self) -> str:
        """Code for the dtype of the network: that of its input."""
        return f"{self.listed[0].name}.dtype"

    def bring(self, value: Value, order: Order) -> Value:
        """The value with its axes in this order."""
        value = self.settled(value)
        self._store(value, order)
        if value.order == order:
            return value
        if not axes.moves_data(value.shape, value.order, order):
            sizes = tuple(value.shape[axis] for axis in order)
            return self._shaped(value, sizes, value.shape, order)
        moved = axes.permutation(value.order, order)
        text = f"jnp.transpose({{}}, {moved})"
        return self.new(text, (value,), value.shape, order, hint=value.hint)

    def _store(self, value: Value, order: Order) -> None:
        """Lets the first use of a parameter decide how it is stored."""
        part = self.parameters.get(value)
        if part is not None and part.order is None:
            part.order = value.order = order

    def reshaped(self, value: Value, shape: Shape, *, as_it_is: bool = False) -> Value:
        """``tensor.reshape(shape)``; as it is, our array flattened with its channels last."""
        value = self.settled(value)
        if as_it_is:
            value = self.bring(value, axes.channels_last(len(value.shape)))
            return self._shaped(value, shape, shape, axes.torch_order(len(shape)))
        plan = axes.reshape(value.shape, value.order, shape)
        value = self.bring(value, plan.before)
        return self._shaped(value, plan.shape, shape, plan.order)

    def transposed(self, value: Value, permutation: Sequence[int]) -> Value:
        """``tensor.permute(permutation)``, which moves nothing."""
        value = self.settled(value)
        self._store(value, value.order)
        shape = tuple(value.shape[axis] for axis in permutation)
        return self.relabelled(value, shape, axes.transposed(value.order, permutation))

    def relabelled(self, value: Value, shape: Shape, order: Order) -> Value:
        """The same array, which PyTorch sees in another shape or with its axes in another order."""
        if (value.shape, value.order) == (shape, order):
            return value
        return self.new(SAME, (value,), shape, order, hint=value.hint)

    def _shaped(self, value: Value, sizes: Shape, shape: Shape, order: Order) -> Value:
        """Our array reshaped to ``sizes``: what has been reshaped already begins again."""
        value = source(value).reshaped or value
        if value.sizes == sizes:
            return self.relabelled(value, shape, order)
        index = axes.inserted(value.sizes, sizes)
        if index is not None:
            made = self.new(f"{{{ATOM}}}[{index}]", (value,), shape, order, hint=value.hint)
        else:
            text, holes = self.sizes(sizes, value)
            text = f"{{{ATOM}}}.reshape({text})"
            made = self.new(text, (value, *holes), shape, order, hint=value.hint)
        made.reshaped = value
        return made

    def settled(self, value: Value) -> Value:
        """The value, broadcast to its shape where PyTorch only pretended to."""
        if value.expanded is None or value.expanded == value.shape:
            return value
        shape = value.expanded
        order = axes.channels_last(len(shape))
        inner = self.for_broadcast(value, order)
        text, holes = self.sizes(tuple(shape[axis] for axis in order), None)
        text = f"jnp.broadcast_to({{}}, ({text}))"
        return self.new(text, (inner, *holes), shape, order, hint=value.hint)

    def for_broadcast(self, value: Value, order: Order) -> Value:
        """The value such that jax broadcasts it against one of this order, of as many axes or
        more.
        """
        missing = len(order) - len(value.shape)
        self._store(value, tuple(axis - missing for axis in order if axis >= missing))
        if value.order == order and value.expanded is None:
            return value
        plan = axes.aligned(value.shape, value.order, order)
        before = source(value).reshaped
        if before is not None and value.order == plan.before:
            sizes = _without_leading_ones(before.sizes)
            if sizes == _without_leading_ones(plan.shape):
                return self.relabelled(before, sizes, axes.torch_order(len(sizes)))
        if value.expanded is not None:
            value = self.relabelled_plain(value)
        value = self.bring(value, plan.before) if value.order != plan.before else value
        if _without_leading_ones(value.sizes) == _without_leading_ones(plan.shape):
            return value
        flat = axes.torch_order(len(plan.shape))
        return self._shaped(value, plan.shape, plan.shape, flat)

    def with_leading_ones(self, value: Value, rank: int) -> Value:
        """What :meth:`for_broadcast` made, with axes of length 1 in front."""
        sizes = (1,) * (rank - len(value.shape)) + value.shape
        return self._shaped(value, sizes, sizes, axes.torch_order(rank))

    def relabelled_plain(self, value: Value) -> Value:
        """Without what PyTorch pretends about its shape."""
        return self.new(SAME, (value,), value.shape, value.order, hint=value.hint)

    def sizes(self, sizes: Shape, like: Value | None) -> tuple[str, list[Any]]:
        """The sizes of an array as code.

        Args:
          sizes: Of the array.
          like: An array that is reshaped to them: what they have in common in front is taken from
            it, and one of the others is ``-1``. None: the sizes are written out.
        """
        have = () if like is None else like.sizes
        front = _in_common(have, sizes)
        texts: list[str] = []
        holes: list[Any] = []
        if front:
            texts.append(f"{{{ATOM}}}.shape[0]" if front == 1 else f"*{{{ATOM}}}.shape[:{front}]")
            holes.append(like)
        back = _in_common(have[front:][::-1], sizes[front:][::-1])
        between = sizes[front : len(sizes) - back]
        if not between or sum(size != 1 for size in between) > 1:
            back = 0
        rest = sizes[front : len(sizes) - back]
        batched = [place for place, size in enumerate(rest) if size % BATCH == 0]
        map_at, map_code = self._map_in(rest)
        free = None
        if like is not None and rest:
            others = [place for place in range(len(rest)) if place not in map_at]
            pixels = math.prod(have[1:3]) if self.any_size and len(have) == 4 else 1
            flat = [place for place in others if rest[place] == pixels > 1]
            long = [place for place in others if rest[place] != 1]
            free = next(iter((*batched, *flat, *long[-1:])), None)
        for place, size in enumerate(rest):
            if place in map_at:
                if place == map_at[0]:
                    texts.append("*{}")
                    holes.append(map_code)
            elif place == free:
                texts.append("-1")
            elif size % BATCH == 0:
                factor = f"{size // BATCH} * " if size > BATCH else ""
                texts.append(f"{factor}{{{ATOM}}}.shape[0]")
                holes.append(self._with_batch())
            else:
                texts.append("{}")
                holes.append(Constant(size, "size"))
        if back:
            texts.append(f"{{{ATOM}}}.shape[-1]" if back == 1 else f"*{{{ATOM}}}.shape[-{back}:]")
            holes.append(like)
        return ", ".join(texts) + ("," if len(texts) == 1 and like is None else ""), holes

    def map_sizes(self, sizes: Sequence[int], *first: Value) -> Code | None:
        """Code for the height and width of a value that has these, looked for in these values
        first; None if they are written as numbers.
        """
        for value in self._maps(*first) if max(sizes) > 1 else ():
            if value.sizes[1:3] == tuple(sizes):
                return Code(f"{{{ATOM}}}.shape[1:3]", (value,))
        return None

    def side(self, size: int) -> Code | None:
        """Code for this height or width of a value; None if it is written as a number."""
        for value in self._maps() if size > 1 else ():
            if size in value.sizes[1:3]:
                return Code(f"{{{ATOM}}}.shape[{value.sizes.index(size, 1)}]", (value,))
        return None

    def _maps(self, *first: Value) -> list[Value]:
        """The values that have a height and width, where these may be guessed."""
        values = (*first, *self.env.values()) if self.any_size else ()
        found = [one for one in values if isinstance(one, Value) and one.expanded is None]
        return [one for one in found if one.order == axes.channels_last(4)]

    def _map_in(self, sizes: Shape) -> tuple[range, Code | None]:
        """Which two of these sizes are a height and width, and code for them."""
        for place in range(len(sizes) - 1):
            code = self.map_sizes(sizes[place : place + 2])
            if code is not None:
                return range(place, place + 2), code
        return range(0), None

    def _with_batch(self) -> Value:
        for value in self.env.values():
            if isinstance(value, Value) and value.name is not None and value.sizes[:1] == (BATCH,):
                return value
        raise self.refusal("it needs the size of the batch, and no input begins with it")


def _in_common(first: Shape, second: Shape) -> int:
    """How many sizes both begin with."""
    pairs = zip(first, second, strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second))
    )


def _without_leading_ones(sizes: Shape) -> Shape:
    """The sizes that matter to broadcasting, which aligns arrays at their last axes."""
    first = next((place for place, size in enumerate(sizes) if size != 1), len(sizes))
    return sizes[first:]
