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

from flax_resblock.port.graphs import leaves

MOST_CALLS = 30_000
"""Of PyTorch in one forward pass, after which it is taken to be one that never ends."""

_OF_PACKAGES = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)


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
      draws: Also look whether random numbers are drawn that are not PyTorch's.
    Attributes:
      found: The calls.
      drawn: Where the state of Python's or NumPy's random numbers had changed first.
    """

    def __init__(self, *, draws: bool = False) -> None:
        super().__init__()
        self.found: list[Call] = []
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
            self.found.append(Call(name, _place(), numbers, tuple(given), shape))
            if self._random and not self.drawn and _random_state() != self._random:
                self.drawn = self.found[-1].place or "an unknown line"
        return made


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


def _numbers(several: Sequence[Any]) -> Iterator[Any]:
    """The numbers among arguments."""
    for one in leaves(several):
        if isinstance(one, slice):
            yield from _numbers([one.start, one.stop, one.step])
        elif isinstance(one, _NUMBERS) and not isinstance(one, bool):
            yield one


def _place() -> str:
    """``FILE:LINE`` of the user's code that is running."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_OF_PACKAGES):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""
