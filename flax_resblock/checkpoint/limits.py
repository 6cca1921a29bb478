"""Limits on what a checkpoint may declare, checked before anything is allocated for it."""

from __future__ import annotations

import argparse
import stat
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.errors import CheckpointError, InputError, visible


@dataclass(frozen=True)
class Limits:
    """The most that a checkpoint may have.

    Reading one takes at most twice ``max_bytes`` of memory, whatever the file declares.

    Attributes:
      max_bytes: Bytes of its files together, and of its tensors together.
      max_tensors: Number of tensors, and of files and records.
      max_header_bytes: Bytes that describe the tensors: a safetensors header, the pickles of a
        PyTorch file, the metadata of an Orbax folder.
      max_nesting: Depth of dictionaries, lists and tuples.
    Raises:
      InputError: A limit that is not positive.
    """

    max_bytes: int = 8 << 30
    max_tensors: int = 100_000
    max_header_bytes: int = 32 << 20
    max_nesting: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise InputError(f"`Limits({name}={value})` must be positive.")

    @property
    def header(self) -> int:
        """Bytes that a header may have.

        One byte of a pickle or of JSON can become 72 bytes of Python objects, and all of them
        together stay below ``max_bytes``.
        """
        return min(self.max_header_bytes, max(1 << 20, self.max_bytes // 72))

    def check(self, source: object, name: str, found: int, what: str) -> None:
        """Raises CheckpointError for a number above a limit.

        Args:
          source: What declares the number, for the message.
          name: The limit, such as ``"max_bytes"``.
          what: What is counted, such as ``"bytes of tensors"``.
        """
        limit = self.header if name == "max_header_bytes" else getattr(self, name)
        if found > limit:
            raise CheckpointError(
                f"{source} declares {found:,} {what}; the limit is {limit:,}. It is damaged, made "
                "to exhaust this machine, or larger than any network here. If you trust it, raise "
                f"the limit: "
                f"`Limits({'max_bytes' if limit < getattr(self, name) else name}="
                f"{_enough(self, name, found)})`."
            )


def _enough(limits: Limits, name: str, found: int) -> int:
    """A value of the limit with which ``found`` would pass."""
    by_bytes = name == "max_header_bytes" and limits.header < limits.max_header_bytes
    return found * 72 if by_bytes else found


LIMITS = Limits()
"""Ample for every network here; the largest, with Adam's moments and in float64, takes 4 GB."""

UNLIMITED = Limits(*[sys.maxsize] * 4)
"""Limits for files that this library has just written or has read before."""

_LONGEST_NAME = 512


def check_files(paths: Iterable[Path], limits: Limits, source: object) -> None:
    """Raises CheckpointError for pipes (which would be waited for), devices (which have no end),
    what cannot be reached, and files that are too many or too large together."""
    total = count = 0
    for count, path in enumerate(paths, start=1):
        try:
            found = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is no regular file. Copy its content into a file first.")
        total += found.st_size
        limits.check(source, "max_tensors", count, "files")
    limits.check(source, "max_bytes", total, "bytes in files")


def check_names(names: Iterable[str], source: object) -> None:
    """Raises CheckpointError for names of tensors that would act on a terminal or a page, and for
    names longer than 512 characters."""
    for name in names:
        if len(name) > _LONGEST_NAME or visible(name) != name:
            raise CheckpointError(
                f"{source} has a tensor called "
                f"{visible(name[:80])!s}{'...' if len(name) > 80 else ''}: the name has control "
                f"characters, or more than {_LONGEST_NAME} of any kind, which no network's names "
                "have. The file is damaged or made to mislead."
            )


VALUES_PER_TENSOR = 100
"""Values allowed for each tensor that is allowed; a list of losses has one per step."""


def check_values(limits: Limits, source: object, values: int, tensors: int = 0) -> None:
    """Raises CheckpointError for more tensors than allowed, or more values than those may have."""
    what = f"tensors, or more than {VALUES_PER_TENSOR} values for each,"
    limits.check(source, "max_tensors", max(tensors, values // VALUES_PER_TENSOR), what)


def array_bytes(value: Any) -> int | None:
    """The bytes of an array or number of numpy's; None for anything else."""
    return int(value.nbytes) if isinstance(value, np.ndarray | np.generic) else None


def _children(value: Any, source: str) -> Iterable[Any] | None:
    if isinstance(value, Mapping):
        if isinstance(value, OrderedDict) and vars(value).keys() - {"_metadata"}:
            raise CheckpointError(
                f"{source} has a dictionary with attributes of its own, which would change "
                f"what it does. It is damaged, or made to do harm."
            )
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    return vars(value).values() if isinstance(value, argparse.Namespace) else None


def check_content(
    content: Any, limits: Limits, size: Callable[[Any], int | None], source: str
) -> None:
    """Raises CheckpointError for content that is deeper, longer or larger than allowed, before
    anything recursive sees it: containers that hold themselves or share children without end, huge
    tensors.

    ``size`` gives the bytes of a tensor once it is dense, None for anything else.
    """
    pending: list[Iterator[Any]] = [iter((content,))]
    values = tensors = total = 0
    while pending:
        for value in pending[-1]:
            values += 1
            bytes_ = size(value)
            if bytes_ is not None:
                tensors, total = tensors + 1, total + bytes_
                limits.check(source, "max_bytes", total, "bytes of tensors")
            elif (children := _children(value, source)) is not None:
                limits.check(source, "max_nesting", len(pending), "levels of nesting or more")
                pending.append(iter(children))
                break
        else:
            pending.pop()
        check_values(limits, source, values, tensors)
