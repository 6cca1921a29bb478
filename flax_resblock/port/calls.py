"""The calls of PyTorch that a forward pass makes."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from flax_resblock.port.frozen import PYTORCH
from flax_resblock.port.graphs import leaves
from flax_resblock.port.modules import tensors_held

MOST_CALLS = 30_000
"""Of PyTorch in one forward pass, after which it is taken to be one that never ends."""

_OF_PACKAGES = PYTORCH, f"{Path(__file__).parents[1]}{os.sep}"


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
      flow: What else its arguments are: of tensors the name, or the call that made them.
    """

    name: str
    place: str
    numbers: tuple[float, ...]
    given: tuple[int, ...]
    made: tuple[int, ...]
    flow: tuple[Any, ...] = ()

    @property
    def step(self) -> tuple[Any, ...]:
        """What is the same wherever the code takes the same path."""
        return self.name, self.place, len(self.made), self.flow

    @property
    def at(self) -> str:
        """Where it is, for messages."""
        return f"at {self.place} ({self.name})" if self.place else f"in {self.name}"


class Bounded(TorchFunctionMode):
    """Ends a forward pass within it that makes too many calls.

    Args:
      most: Calls; more than one forward pass has where more than that is within it.
    Raises:
      EndlessError: There are too many.
    """

    def __init__(self, most: int = MOST_CALLS) -> None:
        super().__init__()
        self._left = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise EndlessError(_place())
        return func(*args, **(kwargs or {}))


class Calls(Bounded):
    """Lists the calls of PyTorch within it.

    Args:
      module: Whose tensors have names in what flows from call to call; None: that is not listed,
        which keeps every tensor.
      draws: Also look whether random numbers are drawn that are not PyTorch's.
    Attributes:
      found: The calls.
      drawn: Where the state of Python's or NumPy's random numbers had changed first.
    """

    def __init__(self, module: torch.nn.Module | None = None, *, draws: bool = False) -> None:
        super().__init__()
        self.found: list[Call] = []
        named = tensors_held(module) if module is not None else {}
        self._sources: dict[int, tuple[Any, Any]] = {
            id(tensor): (name, tensor) for name, tensor in named.items()
        }
        self._follows = module is not None
        self.drawn = ""
        self._random = _random_state() if draws else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs)
        tensors = [one for one in leaves(made) if isinstance(one, torch.Tensor)]
        if tensors and not isinstance(func, torch._ops.OpOverload):  # those are PyTorch's own
            several = [*args, *(kwargs or {}).values()]
            given = next((one.shape for one in several if isinstance(one, torch.Tensor)), ())
            numbers, shape = tuple(_numbers(several)), tuple(tensors[0].shape)
            name = getattr(func, "__name__", str(func))
            flow = self._flow(several)
            if self._follows:
                place = len(self.found)
                self._sources |= {id(t): ((place, i), t) for i, t in enumerate(tensors)}
            self.found.append(Call(name, _place(), numbers, tuple(given), shape, flow))
            if self._random and not self.drawn and _random_state() != self._random:
                self.drawn = self.found[-1].place or "an unknown line"
        return made

    def returned(self, made: Any) -> None:
        """Lists what the forward pass returns as a last call."""
        self.found.append(Call("what it returns", "", (), (), (), self._flow([made])))

    def _flow(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        if not self._follows:
            return ()
        found = []
        for one in _leaves(arguments):
            if isinstance(one, torch.Tensor):  # one that no call made is numbered
                one = self._sources.setdefault(id(one), (len(self._sources), one))[0]
            elif isinstance(one, _NUMBERS) and not isinstance(one, bool):
                one = int  # they are compared by themselves
            found.append(one if isinstance(one, _KINDS) else type(one))
        return tuple(found)


def never_ends(name: str, error: EndlessError) -> str:
    """A paragraph on a forward pass that makes too many calls."""
    return (
        f"{name} cannot be ported: its forward pass does not end, or takes more than "
        f"{MOST_CALLS:,} calls of PyTorch; it was at {error}. If a loop waits for a size, give one "
        f"at which it ends with image_size=(HEIGHT, WIDTH)."
    )


def _random_state() -> tuple[int, int]:
    """Of Python's and of NumPy's global random numbers."""
    name, numbers, place, *_ = np.random.get_state(legacy=True)
    return hash(random.getstate()), hash((name, np.asarray(numbers).tobytes(), place))


_NUMBERS = int | float | torch.SymInt | torch.SymFloat


_KINDS = bool | str | int | tuple | torch.dtype | type | None
"""Arguments that decide what a call does, as they are in :attr:`Call.flow`."""


def _leaves(several: Sequence[Any]) -> Iterator[Any]:
    """The arguments in nested ones, slices included."""
    for one in leaves(several):
        yield from (one.start, one.stop, one.step) if isinstance(one, slice) else (one,)


def _numbers(several: Sequence[Any]) -> Iterator[Any]:
    """The numbers among arguments."""
    for one in _leaves(several):
        if isinstance(one, _NUMBERS) and not isinstance(one, bool):
            yield one


def _place() -> str:
    """``FILE:LINE`` of the user's code that is running."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_OF_PACKAGES):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""
