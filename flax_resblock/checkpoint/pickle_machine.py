"""The machine that a pickle is a program for: a stack of values, how deep each nests, and what is
known of the storages behind its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_resblock.checkpoint.limits import Limits
from flax_resblock.errors import visible


@dataclass(frozen=True, slots=True)
class Name:
    """Something that a pickle names, by its full name; nobody looks for it."""

    text: str


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory that tensors are views of.

    Attributes:
      key: By which the file knows it.
      dtype: Of its elements; None where numpy has no such type.
      count: How many elements.
      size: How many bytes.
    """

    key: str
    dtype: np.dtype | None
    count: int
    size: int


Memory = Callable[[Storage], np.ndarray]
"""The elements of a storage, ``(count,)``."""


class RefusedError(Exception):
    """Why a pickle is refused."""


class UnfitError(Exception):
    """Arguments that no checkpoint needs."""


class Unknown:
    """Stands for a value that only PyTorch can make."""


UNKNOWN = Unknown()
_SCALARS = (str, int, float, bytes, type(None))
_LONGEST_KEY, _MOST_AXES = 16, 64


class Machine:
    """The stack of values, how deep each nests, and the place in the data."""

    def __init__(
        self,
        data: bytes,
        start: int,
        limits: Limits,
        source: str,
        memory: Memory | None,
        storage_items: int,
    ) -> None:
        self.data, self.at, self.limits, self.source, self.memory, self.storage_items = (
            data,
            start,
            limits,
            source,
            memory,
            storage_items,
        )
        self.stack: list[Any] = []
        self.depths: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[int, tuple[Any, int]] = {}
        self.storages: dict[str, Storage] = {}
        self.tensors = self.copies = 0
        self.foreign: str | None = None

    def take(self, count: int) -> bytes:
        """The next bytes of the data."""
        part = self.data[self.at : self.at + count]
        if len(part) < count:
            raise ValueError("it ends within an instruction")
        self.at += count
        return part

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    def push(self, value: Any, depth: int = 0) -> None:
        self.stack.append(value)
        self.depths.append(depth)

    def top(self) -> tuple[Any, int]:
        if self.marks and self.marks[-1] == len(self.stack):
            raise ValueError("it takes a value from below a mark")
        return self.stack[-1], self.depths[-1]

    def pop(self) -> tuple[Any, int]:
        found = self.top()
        del self.stack[-1], self.depths[-1]
        return found

    def since_mark(self) -> tuple[list[Any], int]:
        """What lies above the last mark, and how deep it nests."""
        mark = self.marks.pop()
        taken, depth = self.stack[mark:], max(self.depths[mark:], default=-1)
        del self.stack[mark:], self.depths[mark:]
        return taken, depth

    def nested(self, depth: int) -> int:
        """``depth``, unless it is deeper than allowed."""
        if depth > self.limits.max_nesting:
            self.limits.check(self.source, "max_nesting", depth, "levels of nesting")
        return depth

    def filled(self, depth: int) -> Any:
        """The container on top, which something nested so deep now lies in."""
        container, own = self.top()
        self.depths[-1] = self.nested(max(own, depth + 1))
        return container

    def unknown(self, what: str) -> Unknown:
        """In place of what only PyTorch can make."""
        self.foreign = self.foreign or what
        return UNKNOWN

    def hashed(self, key: Any) -> Any:
        """A key, or item of a set. Tuples of tuples could share their items until hashing them
        never ends; long ones be hashed again and again.
        """
        if isinstance(key, _SCALARS) or (
            isinstance(key, tuple)
            and len(key) <= _LONGEST_KEY
            and all(isinstance(item, _SCALARS) for item in key)
        ):
            return key
        if isinstance(key, tuple | list | dict | set):
            raise RefusedError(
                f"has a {type(key).__name__} as a key, which no checkpoint needs. It is "
                f"damaged, or made to do harm."
            )
        self.unknown("a key that is no text or number")
        return None

    def sized(self, size: Any) -> tuple[int, ...]:
        """A shape that announces no more elements than the limit has bytes."""
        if (
            not isinstance(size, tuple)
            or len(size) > _MOST_AXES
            or not all(isinstance(n, int) and n >= 0 for n in size)
        ):
            raise UnfitError
        if math.prod(size) > self.limits.max_bytes:
            raise UnfitError
        return size

    def copied(self, items: Any, bytes_each: int = 8) -> None:
        """Counts what a call is about to copy: one line of a pickle can ask for it ten thousand
        times.
        """
        self.copies += len(items) * bytes_each
        self.limits.check(self.source, "max_header_bytes", self.copies, "bytes of copies")


REFUSED = (
    "Loading never executes code, so it was refused. If you trust the file, open it in "
    "PyTorch yourself and save model.state_dict()."
)


def needs(name: str) -> str:
    """Why a pickle that wants this is refused."""
    return f"needs {visible(name)[:160]} to be imported and run to open it. {REFUSED}"
