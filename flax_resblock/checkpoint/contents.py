"""What came out of a file, walked once before anything recursive sees it: its depth, how many
values and tensors it has, and how large they are.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flax_resblock.checkpoint.limits import Limits
from flax_resblock.errors import CheckpointError

_VALUES_PER_TENSOR = 100
"""So many values per allowed tensor; lists of losses have one per step."""


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
    """Refuses what is deeper, longer or larger than allowed: containers that hold themselves, ones
    that share children until they are endless, huge tensors.

    Args:
      content: Whatever a file held.
      limits: What it may hold.
      size: Bytes of a tensor once it is dense, None for anything else.
      source: For messages.
    Raises:
      CheckpointError: More than the limits allow.
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
        limits.check(
            source,
            "max_tensors",
            max(tensors, values // _VALUES_PER_TENSOR),
            f"tensors, or more than {_VALUES_PER_TENSOR} values for each,",
        )
