"""Values that stand in a PyTorch pickle's content for those that it would have made.

A pickle may give some of them a state, and can change nothing else by that.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_resblock.checkpoint.inert_pickle import RefusedError
from flax_resblock.checkpoint.limits import Limits

LOG = "mmengine.logging.history_buffer.HistoryBuffer"
HARM = "It is damaged, or made to do harm."


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory that tensors are views of: its key in the file, the dtype of its elements (None
    where numpy has no such type), and their number in elements and in bytes."""

    key: str
    dtype: np.dtype | None
    count: int
    size: int


@dataclass(slots=True, eq=False)
class OnlyTorch:
    """Stands for a value that only PyTorch can make, which ``what`` describes."""

    what: str

    def __setstate__(self, state: Any) -> None:
        """Ignores the state, which is PyTorch's business too."""


class StateDict(OrderedDict):
    """An OrderedDict that takes no arguments, and whose attributes a pickle cannot set."""

    def __new__(cls) -> StateDict:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Ignores ``_metadata``, the versions of the layers' state dicts, and refuses the rest."""
        if not isinstance(state, dict) or state.keys() - {"_metadata"}:
            raise RefusedError(
                "has a dictionary with attributes of its own, which would change what it does. "
                f"{HARM}"
            )


StateDict.__name__ = "OrderedDict"  # for messages


class ParameterStandIn:
    """In place of ``torch.nn.parameter.Parameter`` where its ``__new__`` is called."""

    def __new__(cls, *_: Any) -> Any:
        return OnlyTorch("torch.nn.parameter.Parameter")


class VersionStandIn:
    """In place of ``torch.torch_version.TorchVersion``."""

    def __new__(cls, text: Any) -> Any:
        if not isinstance(text, str):
            raise TypeError(f"a version is text, and no {type(text).__name__}")
        return text


class LogStandIn:
    """In place of MMEngine's ``HistoryBuffer``, a log of losses in each of its checkpoints."""

    def __setstate__(self, state: Any) -> None:
        """Drops the log, with its arrays and methods."""


FIELDS = frozenset(
    f"deepspeed.{name}"
    for name in (
        "utils.tensor_fragment.fragment_address",
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
    )
)
LIST = "fastcore.foundation.L"
_NATIVE = ("<", "=", "|", b"<", b"=", b"|")
"""Byte orders of this machine, which a pickle of Python 2 has as bytes."""


class DTypeStandIn:
    """In place of ``numpy.dtype``, which a pickle could change."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype | None) -> None:
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        """Takes the byte order; another than this machine's is left to PyTorch."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in _NATIVE:
            self.dtype = None


@dataclass
class Copies:
    """Counts what calls copy: a few bytes of a pickle can ask for a large copy again and again."""

    limits: Limits
    source: str
    bytes: int = 0

    def count(self, items: Any, bytes_each: int = 8) -> None:
        """Adds a copy of ``items``."""
        self.bytes += len(items) * bytes_each
        self.limits.check(self.source, "max_header_bytes", self.bytes, "bytes of copies")


def types(copies: Copies) -> dict[str, type]:
    """The types that a pickle may call, or whose ``__new__`` it may, by name.

    Types are in reference cycles, and live until the next garbage collection. These therefore
    know the counter alone, and nothing that keeps the file mapped.
    """

    class Namespace(argparse.Namespace):
        def __setstate__(self, state: Any) -> None:
            copies.count(state)
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise ValueError("it names an attribute by something else than text")
            vars(self).update(state)

    class Items(list[Any]):
        """In place of fastai's ``L``, in which it keeps the options of its own optimizers."""

        def __new__(cls) -> Items:
            return super().__new__(cls)

        def __setstate__(self, state: Any) -> None:
            items = state.get("items") if isinstance(state, dict) else None
            if not isinstance(items, list) or len(state) > 1:
                raise RefusedError(f"has a list of fastai's without its items. {HARM}")
            copies.count(items)
            self[:] = items

    class Fields(dict[str, Any]):
        """In place of objects that DeepSpeed stores, which are nothing but their fields."""

        def __new__(cls) -> Fields:
            return super().__new__(cls)

        def __setstate__(self, state: Any) -> None:
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise RefusedError(f"has an object of DeepSpeed's without its fields. {HARM}")
            copies.count(state)
            self.update(state)

    return {
        "argparse.Namespace": Namespace,
        "collections.OrderedDict": StateDict,
        "torch.nn.parameter.Parameter": ParameterStandIn,
        "torch.torch_version.TorchVersion": VersionStandIn,
        LOG: LogStandIn,
        LIST: Items,
        **dict.fromkeys(FIELDS, Fields),
    }
