"""Builds the values of one module, and moves their axes where an operator needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flax_resblock.errors import InputError
from flax_resblock.port import axes
from flax_resblock.port.axes import Order, Shape
from flax_resblock.port.parts import ParameterPart
from flax_resblock.port.sizes import code_of, follows, in_common, number_of
from flax_resblock.port.tracing import where
from flax_resblock.port.values import ATOM, BATCH, SAME, Code, Constant, Value, source


class Values:
    """The values of one module, in the order in which they are computed.

    Args:
      network: Its name, for messages.
      place: Of the module in the network, for messages.
    """

    def __init__(self, network: str, place: str) -> None:
        self.network, self.place = network, place
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
        return (
            self.env.get(argument, argument)
            if isinstance(argument, torch.fx.Node)
            else number_of(argument)
        )

    def value(self, argument: Any) -> Value:
        """The value of a node."""
        found = argument if isinstance(argument, Value) else self.number(argument)
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
        if not isinstance(hole.value, tuple | list):
            number = self.number(hole.value)
            if isinstance(number, Value):
                raise self.refusal("it computes with a tensor where a number is expected")
            return self.spell(number) if follows(number) else Constant(number, hole.hint)
        inside = [self._constant(Constant(one, hole.hint)) for one in hole.value]
        kind = type(hole.value)
        if all(isinstance(one, Constant) for one in inside):
            return Constant(kind(one.value for one in inside), hole.hint)
        return self.row([self.number(one) for one in hole.value], kind)

    def row(self, numbers: Sequence[Any], kind: type = tuple, *first: Value) -> Code:
        """A tuple or list of numbers, of which some follow from sizes."""
        ends = "[]" if kind is list else "()"
        flat = not any(isinstance(one, tuple | list) for one in numbers)
        holes = (
            self.spelled(numbers, *first)
            if flat
            else [self._constant(Constant(one, "size")) for one in numbers]
        )
        if len(holes) == 1 and kind is tuple and isinstance(holes[0], Code):
            return Code(holes[0].text.removeprefix("*"), holes[0].holes)
        return Code(f"{ends[0]}{', '.join('{}' for _ in holes)}{ends[1]}", tuple(holes))

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
        front = in_common(have, sizes)
        texts: list[str] = []
        holes: list[Any] = []
        if front:
            texts.append(f"{{{ATOM}}}.shape[0]" if front == 1 else f"*{{{ATOM}}}.shape[:{front}]")
            holes.append(like)
        back = in_common(have[front:][::-1], sizes[front:][::-1])
        between = sizes[front : len(sizes) - back]
        if not between or sum(size != 1 for size in between) > 1:
            back = 0
        rest = sizes[front : len(sizes) - back]
        free = None if like is None else self._free(rest)
        groups = [rest] if free is None else [rest[:free], rest[free + 1 :]]
        codes = [self.spelled(group) for group in groups]
        between = [] if free is None else ["-1"]
        texts += [*["{}"] * len(codes[0]), *between, *["{}"] * sum(map(len, codes[1:]))]
        holes += [hole for group in codes for hole in group]
        if back:
            texts.append(f"{{{ATOM}}}.shape[-1]" if back == 1 else f"*{{{ATOM}}}.shape[-{back}:]")
            holes.append(like)
        return ", ".join(texts) + ("," if len(texts) == 1 and like is None else ""), holes

    def _free(self, sizes: Sequence[Any]) -> int | None:
        """Which of the sizes of a reshape is written as ``-1``: that which is hardest to write."""
        by_batch = [place for place, size in enumerate(sizes) if size % BATCH == 0]
        free = [place for place, size in enumerate(sizes) if follows(size)]
        one = len(free) == 1
        computed = [at for at in free if one or not self._leaf(sizes[at].expression, ())]
        long = [place for place, size in enumerate(sizes) if size != 1 and not follows(size)]
        return next(iter((*by_batch, *computed, *long[-1:])), None)

    def spelled(self, numbers: Sequence[Any], *first: Value) -> list[Any]:
        """Numbers as holes of code, those that follow from sizes as code, looked for in these
        values first. Neighbouring sizes of one value are one hole, ``*x.shape[1:3]``.
        """
        found: list[Any] = []
        row: tuple[Any, int, int] = (None, 0, 0)
        for number in numbers:
            leaf = self._leaf(getattr(number, "expression", None), first)
            if leaf is not None and leaf == (row[0], row[2]):
                row = (row[0], row[1], row[2] + 1)
                found[-1] = Code(f"*{{{ATOM}}}.shape[{row[1]}:{row[2]}]", (source(row[0]),))
                continue
            row = (leaf[0], leaf[1], leaf[1] + 1) if leaf else (None, 0, 0)
            found.append(
                self.spell(number, *first) if follows(number) else Constant(number, "size")
            )
        return found

    def spell(self, number: Any, *first: Value) -> Code:
        """Code for a number that follows from sizes.

        Raises:
          InputError: The sizes of what the module has do not tell it.
        """

        def find(expression: Any) -> Code | None:
            leaf = self._leaf(expression, first)
            return leaf and Code(f"{{{ATOM}}}.shape[{leaf[1]}]", (source(leaf[0]),))

        code = code_of(number.expression, find)
        if code is None:
            raise self.refusal(
                f"it computes with a number that depends on the size of the batch or of the images "
                f"({number.expression}) in a way that is not supported. Pass a tensor of that size"
            )
        return code

    def _leaf(self, expression: Any, first: Sequence[Value]) -> tuple[Value, int] | None:
        """A value of this module with an axis of this size, and which axis of its array that is."""
        if expression is None:
            return None
        for value in (*first, *self.env.values()):
            if isinstance(value, Value) and value.expanded is None:
                for place, size in enumerate(value.sizes):
                    if getattr(size, "expression", None) == expression:
                        return value, place
        return None


def _without_leading_ones(sizes: Shape) -> Shape:
    """The sizes that matter to broadcasting, which aligns arrays at their last axes."""
    first = next((place for place, size in enumerate(sizes) if size != 1), len(sizes))
    return sizes[first:]
