"""What a PyTorch pickle may call: our own functions in place of those that it names.

Each makes a container, a number or a view of the file, or a stand-in for what only PyTorch can
make. None imports or calls anything that the file names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_resblock.checkpoint.inert_pickle import RefusedError
from flax_resblock.checkpoint.limits import Limits
from flax_resblock.checkpoint.torch_stand_ins import (
    HARM,
    Copies,
    DTypeStandIn,
    LogStandIn,
    OnlyTorch,
    Storage,
)
from flax_resblock.errors import visible

REFUSED = (
    "Loading never executes code, so it was refused. If you trust the file, open it in "
    "PyTorch yourself and save model.state_dict()."
)


def needs(name: str) -> str:
    """Why a pickle that names this is refused."""
    return f"needs {visible(name)[:160]} to be imported and run to open it. {REFUSED}"


StorageReader = Callable[[Storage], np.ndarray]
"""Gives the elements of a storage, ``(count,)``, read-only."""


_MOST_AXES, _LONGEST_ITEM = 64, 16


@dataclass
class Context:
    """What the calls of one pickle share; ``elements`` of a storage are None to make no tensors."""

    limits: Limits
    source: str
    elements: StorageReader | None
    copies: Copies
    tensors: int = 0

    def count_tensor(self) -> None:
        """Counts a tensor against the limit."""
        self.tensors += 1
        self.limits.check(self.source, "max_tensors", self.tensors, "tensors or more")

    def sized(self, size: Any) -> tuple[int, ...]:
        """A shape that announces no more elements than the limit has bytes."""
        whole = isinstance(size, tuple) and len(size) <= _MOST_AXES and _are_sizes(size)
        if not whole or math.prod(size) > self.limits.max_bytes:
            raise UnfitError
        return size


class UnfitError(Exception):
    """Arguments of a call that no checkpoint needs."""


def _are_sizes(numbers: tuple[Any, ...]) -> bool:
    return all(isinstance(n, int) and n >= 0 for n in numbers)


class Callee:
    """A name that the pickle may call."""

    __slots__ = ("context", "name")

    def __init__(self, name: str, context: Context) -> None:
        self.name, self.context = name, context

    def __call__(self, *arguments: Any) -> Any:
        call = MADE.get(self.name)
        if call is None and self.name not in BY_TORCH:
            raise RefusedError(needs(self.name))
        if "_rebuild_" in self.name:
            self.context.count_tensor()
        try:
            return OnlyTorch(self.name) if call is None else call(self.context, *arguments)
        except (UnfitError, TypeError) as error:  # TypeError: too few arguments, or too many
            raise RefusedError(
                f"calls {self.name} with arguments that no checkpoint needs, or a tensor larger "
                f"than the limit. {HARM}"
            ) from error


_SCALAR_DTYPES = frozenset(
    f"{order}{code}"
    for order in ("", "<", "=", "|")
    for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
)


# What a checkpoint may call. Each takes the unpickler and the arguments of the call.


def _plain_tensor(context: Context, storage: Any, offset: Any, size: Any, stride: Any) -> Any:
    size = context.sized(size)
    if isinstance(storage, OnlyTorch) or context.elements is None:
        return OnlyTorch("a view of a storage")
    if not isinstance(storage, Storage) or not isinstance(stride, tuple):
        raise UnfitError
    if len(stride) != len(size) or not _are_sizes((offset, *stride)):
        raise UnfitError
    if storage.dtype is None:
        return OnlyTorch("a quantised or untyped tensor")
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    empty = 0 in size
    if not empty and offset + last >= storage.count:
        raise RefusedError(
            f"has a tensor of shape {visible(str(size))[:80]} that reaches beyond its storage "
            f"of {storage.count:,} elements. It is damaged."
        )
    elements = np.empty(0, storage.dtype) if empty else context.elements(storage)[offset:]
    elements.flags.writeable = False
    try:
        if empty:
            return elements.reshape(size)
        if last + 1 == math.prod(size) and _row_major(size, stride):
            return elements[: last + 1].reshape(size)
        return np.lib.stride_tricks.as_strided(
            elements, size, [step * storage.dtype.itemsize for step in stride], writeable=False
        )
    # numpy knows fewer axes than PyTorch, and shorter ones where a tensor is empty
    except ValueError as error:
        raise UnfitError from error


def _row_major(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(size), reversed(stride), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _flagged_tensor(
    context: Context,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> Any:
    """``metadata`` says whether the bits stand for a conjugate or negative value."""
    made = _plain_tensor(context, storage, offset, size, stride)
    if not isinstance(requires_grad, bool):
        raise UnfitError
    return OnlyTorch("a tensor whose bits stand for something else") if metadata else made


def _parameter(_: Context, data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Any:
    if not isinstance(data, np.ndarray | OnlyTorch) or not isinstance(requires_grad, bool):
        raise UnfitError
    return data


def _by_torch(position: int, what: str) -> Callable[..., Any]:
    """A tensor that PyTorch makes, once its shape is known to be within the limits."""

    def call(context: Context, *arguments: Any) -> Any:
        context.sized(arguments[position] if len(arguments) > position else None)
        return OnlyTorch(what)

    return call


def _of_class(
    _: Context, function: Any = None, kind: Any = None, arguments: Any = None, *rest: Any
) -> Any:
    """A tensor of a class of its own; what makes the tensor is called first."""
    if not isinstance(function, Callee) or not isinstance(arguments, tuple):
        raise UnfitError
    function(*arguments)
    return OnlyTorch("a tensor of a class of its own")


def _size(context: Context, size: Any = ()) -> Any:
    context.copies.count(size)
    if not isinstance(size, tuple | list) or not all(isinstance(n, int) for n in size):
        raise UnfitError
    return tuple(size)


def _counter(context: Context, counts: Any = ()) -> Any:
    context.copies.count(counts)
    if isinstance(counts, dict) and all(isinstance(count, int) for count in counts.values()):
        return Counter(counts)
    return OnlyTorch("collections.Counter")


def _set(context: Context, items: Any = ()) -> Any:
    context.copies.count(items)
    if not isinstance(items, list | tuple):
        return OnlyTorch("a set")
    scalars = (str, int, float, bytes, type(None))
    for item in items:
        parts = item if isinstance(item, tuple) and len(item) <= _LONGEST_ITEM else (item,)
        if all(isinstance(part, scalars) for part in parts):
            continue
        if isinstance(item, tuple | list | dict | set):
            raise RefusedError(f"has a {type(item).__name__} in a set. {HARM}")
        return OnlyTorch("a set of something else than text and numbers")
    return set(items)


def _encoded(context: Context, text: Any, codec: Any) -> Any:
    """How Python 3 writes bytes for Python 2; other codecs can double what they are given."""
    if not isinstance(text, str) or codec != "latin1":
        raise UnfitError
    context.copies.count(text, 1)
    return text.encode("latin1")


def _dtype(_: Context, code: Any = None, *rest: Any) -> Any:
    code = code.decode("latin1") if isinstance(code, bytes) else code  # of Python 2
    if code not in _SCALAR_DTYPES:
        raise UnfitError
    return DTypeStandIn(np.dtype(code))


def _scalar(_: Context, dtype: Any = None, data: Any = None) -> Any:
    if not isinstance(dtype, DTypeStandIn) or dtype.dtype is None or not isinstance(data, bytes):
        return OnlyTorch("a number of numpy's")
    if len(data) != dtype.dtype.itemsize:
        raise UnfitError
    return np.frombuffer(data, dtype.dtype)[0]


def _stage(_: Context, number: Any = None) -> Any:
    """A member of DeepSpeed's enumeration of its stages."""
    if type(number) is not int:
        raise UnfitError
    return number


def _method(_: Context, owner: Any, name: Any) -> Any:
    """A method of MMEngine's log, which pickles the functions that it offers."""
    if not isinstance(owner, type) or not issubclass(owner, LogStandIn):
        raise RefusedError(needs("builtins.getattr"))
    return OnlyTorch("a method of MMEngine's log")


MADE: Mapping[str, Callable[..., Any]] = {
    "builtins.getattr": _method,
    "__builtin__.getattr": _method,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _stage,
    "torch._utils._rebuild_tensor": _plain_tensor,
    "torch._utils._rebuild_tensor_v2": _flagged_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor_v3": _by_torch(2, "a tensor of a dtype that numpy has not"),
    "torch._utils._rebuild_qtensor": _by_torch(2, "a quantised tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _by_torch(1, "an empty (meta) tensor"),
    "torch._tensor._rebuild_from_type_v2": _of_class,
    "torch.Size": _size,
    "collections.Counter": _counter,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "_codecs.encode": _encoded,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
"""What is made here, by name; see also :func:`~flax_resblock.checkpoint.torch_stand_ins.types`."""
BY_TORCH = frozenset(
    {"torch._utils._rebuild_sparse_tensor", "torch.serialization._get_layout", "torch.device"}
    | {"builtins.complex", "__builtin__.complex", "numpy.ndarray"}
    | {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
)
"""What only PyTorch can make."""
