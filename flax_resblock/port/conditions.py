"""What the code of a module makes depend on the size of the batch or on that of the images: a trace
shows one path through it, and a comparison at one other size no more than one.

The module is run without computing anything, on tensors that have a shape alone, and its calls of
PyTorch are listed: their names, their ranks, and the numbers among their arguments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from flax_resblock.errors import InputError
from flax_resblock.port.calls import Call, Calls
from flax_resblock.port.inputs import Shapes
from flax_resblock.port.operator_names import RESHAPES
from flax_resblock.port.windows import Windows

BATCHES = (1, 3, 4, 9, 32, 64, 128, 1000)

SIZES = (
    *((16, 20), (28, 28), (32, 32), (33, 47), (48, 40), (96, 128), (127, 66), (224, 224)),
    *((256, 256), (299, 299), (384, 226), (512, 512), (1024, 1333)),
    *((8, 11), (3, 2)),
)
"""Of images; on both sides of every size that a condition is likely to name, with many remainders.
"""

FACTORS = (0.25, 0.4, 0.5, 0.77, 1.5, 2, 4.01, 16)
"""Of the sizes of other inputs."""


class Conditions:
    """Runs a module on shapes alone.

    Args:
      module: In the mode to run it in; copied, and left as it was.
      shapes: Of its inputs without the batch.
    Attributes:
      computed: Why :meth:`bound_to_size` would have bound the module to its size, had the numbers
        in its code not been what a trace with images of any size has in their place.
      raising: Whether it does something else at sizes at which what is written raises.
    """

    def __init__(self, module: torch.nn.Module, shapes: Shapes) -> None:
        self.name, self.shapes = type(module).__name__, shapes
        self.mode = "training" if module.training else "evaluation"
        self._copied = copy.deepcopy(module).to("meta")
        self._run = cache(self._listed)
        self.fake, self.computed, self.raising = False, "", False
        self.calls = self._run(2, shapes)
        if self.calls is None:  # it holds or makes tensors with numbers
            self._copied, self.fake, self._run = copy.deepcopy(module), True, cache(self._listed)
            self.calls = self._run(2, shapes)

    def _listed(self, batch: int, shapes: Shapes) -> list[Call] | None:
        """The calls; None where the module raises."""
        try:
            if self.fake:
                copied = copy.deepcopy(self._copied)
                with FakeTensorMode(allow_non_fake_inputs=True):
                    inputs = [torch.empty(batch, *shape) for shape in shapes]
                    with _ShapesOfNorms(), Calls(copied) as calls:
                        calls.returned(copied(*inputs))
            else:
                inputs = [torch.empty(batch, *shape, device="meta") for shape in shapes]
                with _ShapesOfNorms(), Calls(self._copied) as calls:
                    calls.returned(self._copied(*inputs))
        except Exception:  # whatever the user's code raises
            return None
        return calls.found

    @cached_property
    def _followed(self) -> tuple[list[Any], list[tuple[Any, ...]]]:
        """The sizes of the inputs as symbols, and the numbers of every call as expressions in
        them; nothing where that cannot be told."""
        environment = ShapeEnv(duck_shape=False)
        copied = copy.deepcopy(self._copied)
        copied = copied if self.fake else copied.to_empty(device="cpu")
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=environment)
        inputs = [mode.from_tensor(torch.empty(2, *shape)) for shape in self.shapes]
        try:
            with mode, enable_python_dispatcher(), Windows():
                sizes = [_expression(size) for one in inputs for size in one.shape]
                with Calls(copied) as calls:
                    calls.returned(copied(*inputs))
        except Exception:  # of code that needs numbers
            return [], []
        if _otherwise(self.calls or [], calls.found):
            return [], []
        return sizes, [tuple(map(_expression, one.numbers)) for one in calls.found]

    def _expected(self, shapes: Shapes) -> list[tuple[Any, ...]]:
        """The numbers of every call with inputs of these shapes, if the code takes the same path;
        empty where that cannot be told."""
        sizes, numbers = self._followed
        values = [size for shape in shapes for size in (2, *shape)]
        known = {s: v for s, v in zip(sizes, values, strict=False) if not isinstance(s, int)}
        return [tuple(n.subs(known) if hasattr(n, "subs") else n for n in one) for one in numbers]

    def refuse_by_batch(self) -> str:
        """Refuses a module whose code does something else with batches of another size.

        Returns:
          What it does otherwise with one image alone, if that is no more than losing an axis.
        """
        third = self._run(3, self.shapes)
        if self.calls is None or third is None:
            return ""
        note = ""
        for batch in BATCHES:
            calls = self._run(batch, self.shapes)
            if calls is None:
                continue
            same = [one.step[:2] for one in calls] == [one.step[:2] for one in self.calls]
            other = _otherwise(self.calls, calls)
            if batch == 1 and other is not None and same:
                note = (
                    f"with one image your module drops an axis more ({other.name} at "
                    f"{other.place}: {list(other.made)}); the port keeps the axis of the batch"
                )
                continue
            for one, two, three in zip(calls, self.calls, third, strict=False):
                if other is None and not _is_linear(batch, one, two, three):
                    other = one
            if other is not None:
                shown = "1 image" if batch == 1 else f"{batch} images"
                raise InputError(
                    f"{self.name} cannot be ported: in {self.mode} mode its code "
                    f"does something else with a batch of {shown} than with 2, {other.at}. A port "
                    f"does the same for every batch: decide by attributes, or by the sizes of the "
                    f"images."
                )
        return note

    def _at_other(self, compared: Sequence[Shapes]) -> tuple[list[Call] | None, Shapes]:
        """The calls at the first of these shapes at which the module does the same, and these; None
        if there is none."""
        for shapes in compared:
            other = self._run(2, shapes)
            if other and self.calls and not _otherwise(self.calls, other):
                return other, shapes
        return None, ()

    def following(self, compared: Sequence[Shapes]) -> tuple[Shapes, set[float], set[str]]:
        """The first of these shapes at which the module does the same; which numbers and sizes in
        its calls are other ones there, and the names of calls whose numbers are not; nothing if
        there are none."""
        other, shapes = self._at_other(compared)
        pairs = list(zip(self.calls or (), other or (), strict=False))
        found = {
            a
            for one, two in pairs
            for a, b in zip((*one.numbers, *one.made), (*two.numbers, *two.made), strict=False)
            if a != b
        }
        moving = {one.name for one, two in pairs if one.numbers != two.numbers}
        return shapes, found, {one.name for one, _ in pairs} - moving

    def bound_to_size(
        self, compared: Sequence[Shapes], raises: Callable[[Shapes], bool] | None = None
    ) -> str:
        """Why the code of the module is another one at other sizes of its inputs, but neither at
        its own nor at those that are compared anyway; empty if it is not.

        Args:
          compared: Shapes at which its results are compared; the first that it takes counts.
          raises: Whether what is written raises with inputs of these shapes, so that it is not
            wrong where the module does something else.
        """
        other, at_other = self._at_other(compared)
        if self.calls is None or other is None:
            return ""
        for shapes in _other_shapes(self.shapes):
            calls = self._run(2, shapes)
            if calls is None:
                continue
            of_all = (self.calls, other, calls), (self.shapes, at_other, shapes)
            path = _otherwise(self.calls, calls)
            found = path or _unexplained(*of_all)
            if found is None:
                continue
            if path and raises is not None and raises(shapes):
                self.raising = True
                continue
            shown = " and ".join("x".join(map(str, one[1:])) for one in shapes if one[1:])
            why = f"at {shown} its code does something else {found.at}"
            expected = [] if path else self._expected(shapes)
            if not expected or _unexplained(*of_all, expected):
                return why
            self.computed = self.computed or why
        return ""


def _expression(number: Any) -> Any:
    """A number, or what it is in terms of sizes."""
    return number.node.expr if hasattr(number, "node") else number


class _ShapesOfNorms(TorchFunctionMode):
    """Within it batch norm is no more than the shape of its result, which PyTorch finds by way of
    ten operators: five times as much work as all else that a network does without numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = _batch_norm if func is torch.nn.functional.batch_norm else func
        return run(*args, **(kwargs or {}))


def _batch_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    *numbers: float,
    **named: float,
) -> torch.Tensor:
    """Raises what the function does for tensors that do not fit, and for one value a channel."""
    channels = x.shape[1]
    of_channels = [one for one in (running_mean, running_var, weight, bias) if one is not None]
    if any(one.shape != (channels,) for one in of_channels):
        raise RuntimeError(f"tensors of another length than the {channels} channels")
    if training and x.numel() <= channels:
        raise ValueError("one value a channel")
    return torch.empty_like(x)


def _otherwise(calls: Sequence[Call], others: Sequence[Call]) -> Call | None:
    """The first of other calls that is another one."""
    for one, other in zip(calls, others, strict=False):
        if one.step != other.step:
            return other
    longer = max(calls, others, key=len)
    return longer[min(len(calls), len(others))] if len(calls) != len(others) else None


def _is_linear(batch: int, one: Call, two: Call, three: Call) -> bool:
    """Whether the numbers of a call follow from the size of the batch as they do for 2 and 3."""
    if not len(one.numbers) == len(two.numbers) == len(three.numbers):
        return False
    numbers = zip(one.numbers, two.numbers, three.numbers, strict=True)
    return all(now == b or now == b + (batch - 2) * (c - b) for now, b, c in numbers)


def _unexplained(
    runs: tuple[Sequence[Call], Sequence[Call], Sequence[Call]],
    all_shapes: Any,
    expected: Sequence[tuple[Any, ...]] = (),
) -> Call | None:
    """The first of other calls with a number that was, where results are compared, the same or the
    size of something, and is neither here, nor what is expected.

    Args:
      runs: The calls at the module's own size, at that which is compared, and here.
      all_shapes: Of the inputs in each.
      expected: The numbers of every call here, as they follow from sizes; empty if unknown.
    """
    for place, several in enumerate(zip(*runs, strict=True)):
        known = expected[place] if expected else ()
        for number, (a, b, c) in enumerate(zip(*(one.numbers for one in several), strict=False)):
            if c == a == b or (number < len(known) and c == known[number]):
                continue
            of_all = zip(runs, all_shapes, strict=True)
            sizes = zip(*(_sizes(run, shapes, place) for run, shapes in of_all), strict=False)
            agree = [z == c for x, y, z in sizes if (x, y) == (a, b)] + [c == a] * (a == b)
            if agree and not any(agree):
                return several[-1]
    return None


def _sizes(calls: Sequence[Call], shapes: Shapes, place: int) -> list[int]:
    """The sizes of what is known where a call is made, and products of neighbouring ones."""
    one = calls[place]
    known = [(2, *shape) for shape in shapes] + [one.given, *(one.made,) * (one.name in RESHAPES)]
    known += [call.made for call in calls[max(place - 40, 0) : place]]
    return [
        math.prod(shape[start:end])
        for shape in known
        for start in range(len(shape))
        for end in range(start + 1, len(shape) + 1)
    ]


def _other_shapes(shapes: Shapes) -> Iterator[Shapes]:
    """Shapes of smaller and larger inputs."""
    if all(len(one) == 3 for one in shapes):
        yield from (tuple((one[0], *size) for one in shapes) for size in SIZES)
    else:
        for factor in FACTORS:
            yield tuple((one[0], *(max(round(factor * n), 1) for n in one[1:])) for one in shapes)
