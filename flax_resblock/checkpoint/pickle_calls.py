"""What the functions give that a checkpoint's pickle calls. None of them is imported or called:
those here are written anew, and nothing else passes.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from flax_resblock.checkpoint.pickle_machine import (
    UNKNOWN,
    Machine,
    Name,
    RefusedError,
    Storage,
    UnfitError,
    needs,
)
from flax_resblock.errors import visible

Call = Callable[..., Any]

_DTYPES = frozenset(
    f"{order}{code}"
    for order in ("", "<", "=", "|")
    for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
)


# Each takes the machine and the arguments of the call.


def _by_torch(name: str) -> Call:
    return lambda machine, *_: machine.unknown(name)


def _flagged_tensor(
    machine: Machine,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> Any:
    """``metadata``: whether bits stand for a conjugate or negative value."""
    made = _tensor(machine, storage, offset, size, stride)
    if not isinstance(requires_grad, bool):
        raise UnfitError
    return machine.unknown("a tensor whose bits stand for something else") if metadata else made


def _tensor(machine: Machine, storage: Any, offset: Any, size: Any, stride: Any) -> Any:
    size = machine.sized(size)
    if storage is UNKNOWN or machine.memory is None:
        return machine.unknown("a view of a storage")
    if (
        not isinstance(storage, Storage)
        or not isinstance(stride, tuple)
        or len(stride) != len(size)
    ):
        raise UnfitError
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *stride)):
        raise UnfitError
    if storage.dtype is None:
        return machine.unknown("a quantised or untyped tensor")
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    empty = 0 in size
    if not empty and offset + last >= storage.count:
        raise RefusedError(
            f"has a tensor of shape {visible(str(size))[:80]} that reaches beyond its storage "
            f"of {storage.count:,} elements. It is damaged."
        )
    elements = np.empty(0, storage.dtype) if empty else machine.memory(storage)[offset:]
    try:
        if empty:
            return elements.reshape(size)
        if last + 1 == math.prod(size) and _row_major(size, stride):
            return elements[: last + 1].reshape(size)
        return np.lib.stride_tricks.as_strided(
            elements, size, [step * storage.dtype.itemsize for step in stride], writeable=False
        )
    except (
        ValueError
    ) as error:  # numpy knows fewer axes, and none as long as an empty tensor may have
        raise UnfitError from error


def _row_major(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(size), reversed(stride), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _parameter(_: Machine, data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Any:
    if (data is not UNKNOWN and not isinstance(data, np.ndarray)) or not isinstance(
        requires_grad, bool
    ):
        raise UnfitError
    return data


def _checked_size(position: int, name: str) -> Call:
    def call(machine: Machine, *arguments: Any) -> Any:
        machine.sized(arguments[position] if len(arguments) > position else None)
        return machine.unknown(name)

    return call


def _of_type(
    machine: Machine, function: Any = None, _: Any = None, arguments: Any = None, *__: Any
) -> Any:
    """A tensor of a class of its own: what makes the tensor is called first."""
    called(machine, function, arguments)
    return machine.unknown("a tensor of a class of its own")


def _size(machine: Machine, size: Any = ()) -> Any:
    machine.copied(size)
    return tuple(size) if isinstance(size, tuple | list) else machine.unknown("torch.Size")


def _ordered(_: Machine) -> Any:
    return OrderedDict()


def _counter(machine: Machine, counts: Any = ()) -> Any:
    machine.copied(counts)
    if isinstance(counts, dict) and all(isinstance(count, int) for count in counts.values()):
        return Counter(counts)
    return machine.unknown("collections.Counter")


def _set(machine: Machine, items: Any = ()) -> Any:
    machine.copied(items)
    return (
        {machine.hashed(item) for item in items}
        if isinstance(items, list | tuple)
        else machine.unknown("a set")
    )


def _namespace(_: Machine) -> Any:
    return argparse.Namespace()


def _version(machine: Machine, text: Any) -> Any:
    return text if isinstance(text, str) else machine.unknown("torch.torch_version.TorchVersion")


def _encoded(machine: Machine, text: Any, codec: Any) -> Any:
    """How Python 3 writes bytes for Python 2; other codecs can double their input, again and
    again.
    """
    if not isinstance(text, str) or codec != "latin1":
        raise UnfitError
    machine.copied(text, 1)
    return text.encode("latin1")


def _dtype(_: Machine, code: Any = None, *__: Any) -> Any:
    if code not in _DTYPES:
        raise UnfitError
    return np.dtype(code)


def _scalar(machine: Machine, dtype: Any = None, data: Any = None) -> Any:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes):
        return machine.unknown("a number of numpy's")
    if len(data) != dtype.itemsize:
        raise UnfitError
    return np.frombuffer(data, dtype)[0]


_MADE: Mapping[str, Call] = MappingProxyType(
    {
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _flagged_tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._utils._rebuild_tensor_v3": _checked_size(
            2, "a tensor of a dtype that numpy does not have"
        ),
        "torch._utils._rebuild_qtensor": _checked_size(2, "a quantised tensor"),
        "torch._utils._rebuild_meta_tensor_no_storage": _checked_size(1, "an empty (meta) tensor"),
        "torch._tensor._rebuild_from_type_v2": _of_type,
        "torch.Size": _size,
        "torch.torch_version.TorchVersion": _version,
        "collections.OrderedDict": _ordered,
        "collections.Counter": _counter,
        "builtins.set": _set,
        "__builtin__.set": _set,
        "argparse.Namespace": _namespace,
        "_codecs.encode": _encoded,
        "numpy.dtype": _dtype,
        "numpy.core.multiarray.scalar": _scalar,
        "numpy._core.multiarray.scalar": _scalar,
    }
)
"""What a call makes."""
_CREATED: Mapping[str, Call] = MappingProxyType(
    {
        "collections.OrderedDict": _ordered,
        "argparse.Namespace": _namespace,
        "torch.torch_version.TorchVersion": _version,
    }
)
"""What is made where a class is not called but only its ``__new__``."""
_BY_TORCH = frozenset(
    {
        "torch._utils._rebuild_sparse_tensor",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.device",
        "builtins.complex",
        "__builtin__.complex",
    }
)
CALLS = _MADE.keys() | _BY_TORCH
"""What a checkpoint may call."""


def called(machine: Machine, name: Any, arguments: Any, *, created: bool = False) -> Any:
    """What a call gives.

    Args:
      machine: That follows the pickle.
      name: What is called, a :class:`Name`.
      arguments: A tuple.
      created: Only ``__new__`` of a class is called.
    Raises:
      RefusedError: It is not among what a checkpoint may call, or not with these arguments.
      CheckpointError: More tensors than allowed.
    """
    calls = _CREATED if created else _MADE
    if not isinstance(name, Name):
        if name is UNKNOWN:
            return name
        raise RefusedError(
            "calls something that is no function. It is damaged, or made to do harm; loading "
            "never executes code, so it was refused."
        )
    if name.text not in CALLS:
        raise RefusedError(needs(name.text))
    if "_rebuild_" in name.text:
        machine.tensors += 1
        machine.limits.check(machine.source, "max_tensors", machine.tensors, "tensors or more")
    try:
        if not isinstance(arguments, tuple):
            raise UnfitError
        return calls.get(name.text, _by_torch(name.text))(machine, *arguments)
    except (UnfitError, TypeError) as error:  # TypeError: too few or too many
        raise RefusedError(
            f"calls {name.text} with arguments that no checkpoint needs, or a tensor larger "
            f"than the limit. It is damaged, or made to do harm."
        ) from error
