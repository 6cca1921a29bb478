"""What the code of a module makes depend on the size of the batch, on that of the images, or on
what it did before: a trace shows one path through it, and a comparison at one size another.

The module is run without computing anything, on tensors that have a shape alone, and its calls of
PyTorch are listed: their names, their ranks, and the numbers among their arguments."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from flax_resblock.errors import InputError
from flax_resblock.port.graphs import leaves
from flax_resblock.port.inputs import Shapes
from flax_resblock.port.modules import tensors_held

MOST_CALLS = 6_000
"""Of PyTorch in one forward pass, after which it is taken to be one that never ends."""

BATCHES = (1, 3, 4, 9, 32, 64, 128, 1000)

SIZES = (
    *((16, 20), (28, 28), (32, 32), (33, 47), (48, 40), (96, 128), (127, 66), (224, 224)),
    *((256, 256), (299, 299), (384, 226), (512, 512), (1024, 1333)),
)
"""Of images; on both sides of every size that a condition is likely to name, with many remainders.
"""

FACTORS = (0.25, 0.4, 0.5, 0.77, 1.5, 2, 4.01, 16)
"""Of the sizes of other inputs."""

_OF_PACKAGES = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "expand", "view_as", "reshape_as"}
"""Calls among whose numbers are the sizes of what they return."""


class EndlessError(Exception):
    """A forward pass makes more calls than any network does."""


@dataclass(frozen=True)
class Call:
    """A call of PyTorch that returns a tensor.

    Attributes:
      name: Of the function.
      place: ``FILE:LINE`` of the user's code; empty if there is none.
      numbers: Among its arguments.
      given, made: Shapes of its first argument and of what it returns.
    """

    name: str
    place: str
    numbers: tuple[float, ...]
    given: tuple[int, ...]
    made: tuple[int, ...]

    @property
    def step(self) -> tuple[str, str, int]:
        """What is the same wherever the code takes the same path."""
        return self.name, self.place, len(self.made)


class Calls(TorchFunctionMode):
    """Lists the calls of PyTorch within it.

    Attributes:
      found: The calls.
      drawn: Where the state of Python's or NumPy's random numbers had changed first.

    Raises:
      EndlessError: There are too many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []
        self.drawn = ""
        self._count, self._random = 0, _random_state()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._count += 1
        if self._count > MOST_CALLS:
            raise EndlessError(_place())
        tensors = [one for one in leaves(made) if isinstance(one, torch.Tensor)]
        if tensors:
            several = [*args, *(kwargs or {}).values()]
            given = next((one.shape for one in several if isinstance(one, torch.Tensor)), ())
            numbers, shape = tuple(_numbers(several)), tuple(tensors[0].shape)
            name = getattr(func, "__name__", str(func))
            self.found.append(Call(name, _place(), numbers, tuple(given), shape))
            if not self.drawn and _random_state() != self._random:
                self.drawn = self.found[-1].place or "an unknown line"
        return made


def refuse_unsteady(module: torch.nn.Module, images: Sequence[torch.Tensor]) -> None:
    """Refuses a module that does something else in its next call.

    Args:
      module: In evaluation mode; left as it was.
      images: Its inputs.
    Raises:
      InputError: It counts its calls, draws random numbers that are not PyTorch's, changes its
        parameters, or never ends.
    """
    name = type(module).__name__
    for mode in ("evaluation", "training"):
        copied = copy.deepcopy(module).train(mode == "training")
        tensors = tensors_held(copied) if mode == "evaluation" else dict(copied.named_parameters())
        before = {key: value.detach().clone() for key, value in tensors.items()}
        memories = []
        for _ in range(2):
            try:
                with Calls() as calls:
                    copied(*images)
            except EndlessError as error:
                raise InputError(never_ends(name, error)) from error
            except Exception:  # whatever the user's code raises; the trace says what
                break
            if calls.drawn:
                raise InputError(
                    f"{name} cannot be ported: in {mode} mode it draws from Python's or NumPy's "
                    f"random numbers, in front of {calls.drawn}. A port would do for ever what it "
                    f"drew once. To drop values or branches at random, use torch.nn.Dropout or "
                    f"torchvision.ops.StochasticDepth."
                )
            memories.append(dict(_memory(copied)))
        now = tensors_held(copied)
        for key, value in before.items():
            if not torch.equal(value, now[key]) and not value.isnan().any():
                raise InputError(
                    f"{name} cannot be ported: a call in {mode} mode changes {key}. If the first "
                    f"batch initialises it, call the module with such a batch before you port it; "
                    f"otherwise compute what changes outside of forward."
                )
        if len(memories) == 2:
            first, second = memories
            changed = [key for key in second if first.get(key) != second[key]]
            if changed:
                key = changed[0]
                raise InputError(
                    f"{name} cannot be ported: every call in {mode} mode changes {key} (from "
                    f"{str(first.get(key))[:50]} to {str(second[key])[:50]}), so that what it "
                    f"computes may depend on how often it was called. A port has no such memory: "
                    f"remove it, or set it outside of forward."
                )


def never_ends(name: str, error: EndlessError) -> str:
    """A paragraph on a forward pass that makes too many calls."""
    return (
        f"{name} cannot be ported: its forward pass does not end, or takes more than "
        f"{MOST_CALLS:,} calls of PyTorch; it was at {error}. If a loop waits for a size, give one "
        f"at which it ends with image_size=(HEIGHT, WIDTH)."
    )


class Conditions:
    """Runs a module on shapes alone.

    Args:
      module: In the mode to run it in; left as it was.
      shapes: Of its inputs without the batch.
    """

    def __init__(self, module: torch.nn.Module, shapes: Shapes) -> None:
        self.module, self.shapes = module, shapes
        self.mode = "training" if module.training else "evaluation"
        self._bare = copy.deepcopy(module).to("meta")
        self.fake = False
        self.calls = self._run(2, shapes)
        if self.calls is None:  # it holds or makes tensors with numbers
            self.fake = True
            self.calls = self._run(2, shapes)

    def _run(self, batch: int, shapes: Shapes) -> list[Call] | None:
        """The calls; None where the module raises."""
        try:
            if self.fake:
                copied = copy.deepcopy(self.module)
                with FakeTensorMode(allow_non_fake_inputs=True):
                    inputs = [torch.empty(batch, *shape) for shape in shapes]
                    with Calls() as calls:
                        copied(*inputs)
            else:
                inputs = [torch.empty(batch, *shape, device="meta") for shape in shapes]
                with Calls() as calls:
                    self._bare(*inputs)
        except Exception:  # whatever the user's code raises
            return None
        return calls.found

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
                    f"{type(self.module).__name__} cannot be ported: in {self.mode} mode its code "
                    f"does something else with a batch of {shown} than with 2, at {other.place} "
                    f"({other.name}). A port does the same for every batch: decide by attributes, "
                    f"or by the sizes of the images."
                )
        return note

    def bound_to_size(self, compared: Sequence[Shapes]) -> str:
        """Why the code of the module is another one at other sizes of its inputs, but neither at
        its own nor at those that are compared anyway; empty if it is not.

        Args:
          compared: Shapes at which its results are compared; the first that it takes counts.
        """
        runs = ((self._run(2, shapes), shapes) for shapes in compared)
        other, at_other = next((pair for pair in runs if pair[0]), (None, ()))
        if self.calls is None or other is None or _otherwise(self.calls, other):
            return ""
        for shapes in _other_shapes(self.shapes):
            calls = self._run(2, shapes)
            if calls is None:
                continue
            found = _otherwise(self.calls, calls) or _unexplained(
                self.calls, other, calls, (self.shapes, at_other, shapes)
            )
            if found is not None:
                shown = " and ".join("x".join(map(str, one[1:])) for one in shapes if one[1:])
                at = f" at {found.place}" if found.place else ""
                return f"at {shown} its code does something else{at} ({found.name})"
        return ""


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
    calls: Sequence[Call], compared: Sequence[Call], others: Sequence[Call], all_shapes: Any
) -> Call | None:
    """The first of other calls with a number that was, where results are compared, the same or the
    size of something, and is neither here.

    Args:
      calls, compared, others: At the module's own size, at that which is compared, and here.
      all_shapes: Of the inputs in each.
    """
    for place, several in enumerate(zip(calls, compared, others, strict=True)):
        for a, b, c in zip(*(one.numbers for one in several), strict=False):
            if c == a == b:
                continue
            of_all = zip((calls, compared, others), all_shapes, strict=True)
            sizes = zip(*(_sizes(run, shapes, place) for run, shapes in of_all), strict=False)
            agree = [z == c for x, y, z in sizes if (x, y) == (a, b)] + [c == a] * (a == b)
            if agree and not any(agree):
                return several[-1]
    return None


def _sizes(calls: Sequence[Call], shapes: Shapes, place: int) -> list[int]:
    """The sizes of what is known where a call is made, and products of neighbouring ones."""
    one = calls[place]
    known = [(2, *shape) for shape in shapes] + [one.given, *(one.made,) * (one.name in _RESHAPES)]
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


def _memory(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The numbers and random states that the code of a module can keep from one call to the next:
    in its attributes, those of its class, and global ones."""
    for path, part in module.named_modules():
        cls = type(part)
        places: list[tuple[str, Mapping[str, Any]]] = [(path, vars(part))]
        if not cls.__module__.startswith("torch."):
            of_file = getattr(getattr(cls, "forward", None), "__globals__", {})
            places += [(cls.__name__, vars(cls)), (cls.__module__, of_file)]
        for place, attributes in places:
            for name, value in list(attributes.items()):
                kept = None if name.startswith("__") else _plain(value)
                if kept is not None:
                    yield f"{place}.{name}".strip("."), kept


def _plain(value: Any) -> str | None:
    """A number, what holds nothing but numbers, or a random state, as text."""
    if isinstance(value, random.Random):
        return f"random state {hash(value.getstate())}"
    if isinstance(value, np.random.Generator):
        return f"random state {value.bit_generator.state['state']}"
    inside = list(leaves(value)) if isinstance(value, list | dict | tuple) else [value]
    plain = len(inside) < 1000 and all(isinstance(one, int | float | str) for one in inside)
    return repr(value) if plain else None


def _random_state() -> tuple[int, int]:
    """Of Python's and of NumPy's global random numbers."""
    name, numbers, place, *_ = np.random.get_state(legacy=True)
    return hash(random.getstate()), hash((name, np.asarray(numbers).tobytes(), place))


def _numbers(several: Sequence[Any]) -> Iterator[float]:
    """The numbers among arguments."""
    for one in leaves(several):
        if isinstance(one, slice):
            yield from _numbers([one.start, one.stop, one.step])
        elif isinstance(one, int | float) and not isinstance(one, bool):
            yield one


def _place() -> str:
    """``FILE:LINE`` of the user's code that is running."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_OF_PACKAGES):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""
