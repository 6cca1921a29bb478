"""What a pickle would do, found out from its instructions without doing any of it. Needs no torch.

``torch.load(weights_only=True)`` refuses foreign code, but trusts the rest: it would build ten million nested tuples and hash them until the interpreter
crashes, call ``bytearray`` with any size, and take the sizes of storages for granted. Here the instructions are followed with stand-ins for values, and what
no checkpoint needs is refused before PyTorch sees the file.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from flax_resblock.checkpoint.limits import Limits
from flax_resblock.errors import CheckpointError, visible


@dataclass(slots=True)
class _Value:
    """What is known of something on the stack: how deep it nests, and what it is if that matters.

    ``known`` is an int, a str, bytes, a :class:`_Name`, or, for a short tuple, the tuple of its items; None is anything else.
    """

    depth: int = 0
    known: Any = None


@dataclass(frozen=True, slots=True)
class _Name:
    """A global, by its full name."""

    text: str


_MARK = _Value()
_ITEMSIZES: Mapping[str, int] = MappingProxyType(
    {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1, "Untyped": 1}
    | {"ComplexDouble": 16, "ComplexFloat": 8, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1}
)
"""Bytes per element of a storage, by the first part of its type's name."""
_SHORT_TUPLE = 16
_DTYPES = frozenset(f"{order}{code}" for order in ("", "<", "=", "|", ">") for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"))


class _RefusedError(Exception):
    """Why a pickle is refused."""


def _anything(_: tuple[Any, ...], __: Limits) -> bool:
    return True


def _empty(arguments: tuple[Any, ...], _: Limits) -> bool:
    return not arguments


def _sized(position: int) -> Callable[[tuple[Any, ...], Limits], bool]:
    """The size at this position is a tuple of numbers that announces no more elements than the limit has bytes."""

    def check(arguments: tuple[Any, ...], limits: Limits) -> bool:
        size = arguments[position].known if len(arguments) > position else None
        size = tuple(item.known for item in size) if isinstance(size, tuple) else None
        return size is not None and all(isinstance(n, int) and n >= 0 for n in size) and math.prod(size) <= limits.max_bytes

    return check


def _latin1(arguments: tuple[Any, ...], _: Limits) -> bool:
    """How Python 3 writes bytes for Python 2; other codecs can double their input, again and again."""
    return len(arguments) == 2 and isinstance(arguments[0].known, str) and arguments[1].known == "latin1"


def _plain_dtype(arguments: tuple[Any, ...], _: Limits) -> bool:
    return bool(arguments) and arguments[0].known in _DTYPES


_CALLS: Mapping[str, Callable[[tuple[Any, ...], Limits], bool]] = MappingProxyType(
    {
        "torch._utils._rebuild_tensor": _sized(2),
        "torch._utils._rebuild_tensor_v2": _sized(2),
        "torch._utils._rebuild_tensor_v3": _sized(2),
        "torch._utils._rebuild_qtensor": _sized(2),
        "torch._utils._rebuild_meta_tensor_no_storage": _sized(1),
        "torch._utils._rebuild_sparse_tensor": _anything,
        "torch._utils._rebuild_parameter": _anything,
        "torch._utils._rebuild_parameter_with_state": _anything,
        "torch._tensor._rebuild_from_type_v2": _anything,
        "torch.nn.parameter.Parameter": _anything,
        "torch.serialization._get_layout": _anything,
        "torch.Size": _anything,
        "torch.device": _anything,
        "torch.torch_version.TorchVersion": _anything,
        "collections.OrderedDict": _empty,
        "collections.Counter": _anything,
        "builtins.set": _anything,
        "builtins.complex": _anything,
        "argparse.Namespace": _empty,
        "_codecs.encode": _latin1,
        "numpy.dtype": _plain_dtype,
        "numpy.core.multiarray.scalar": _anything,
        "numpy._core.multiarray.scalar": _anything,
    }
)
"""What a checkpoint may call, and a check of the arguments. ``_rebuild_from_type_v2`` calls its first argument, which is looked up here too."""
_RENAMED: Mapping[str, str] = MappingProxyType({"__builtin__.set": "builtins.set", "__builtin__.complex": "builtins.complex"})


@dataclass
class Scan:
    """What a pickle holds.

    Attributes:
      storages: Bytes of every storage that it refers to, by key.
      end: Where it ends in the data.
    """

    storages: dict[str, int] = field(default_factory=dict)
    end: int = 0


def scan(data: bytes, limits: Limits, *, start: int = 0, source: str = "the pickle") -> Scan:
    """Follows the instructions of one pickle.

    Args:
      data: It begins at ``start``; more may follow.
      limits: Of nesting, tensors and bytes.
      start: Where in ``data``.
      source: For messages.
    Raises:
      CheckpointError: Damaged, code, deeper than allowed, or sizes beyond the limits.
    """
    stream = io.BytesIO(data)
    stream.seek(start)
    machine = _Machine(limits, source)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode, argument)
    except _RefusedError as error:
        raise CheckpointError(f"{source} {error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # pickletools raises ValueError, struct.error, IndexError, UnicodeDecodeError ... at damage
        reason = visible(str(error).splitlines()[0] if str(error) else type(error).__name__)[:160]
        raise CheckpointError(
            f"{source} is no PyTorch checkpoint, or a damaged one: its pickle cannot be read ({reason}). Copy or download it again."
        ) from error
    return Scan(machine.storages, stream.tell())


class _Machine:
    """A stack of stand-ins."""

    def __init__(self, limits: Limits, source: str) -> None:
        self.limits, self.source = limits, source
        self.stack: list[_Value] = []
        self.memo: dict[int, _Value] = {}
        self.storages: dict[str, int] = {}
        self.tensors = 0

    def step(self, opcode: Any, argument: Any) -> None:
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name in ("INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID"):
            raise _RefusedError(f"asks for the instruction {name}, which no checkpoint needs. Loading never executes code, so it was refused.")
        else:
            self._generic(opcode, name, argument)

    def _generic(self, opcode: Any, name: str, argument: Any) -> None:
        """Takes off the stack what the instruction consumes, and puts there what it makes of it."""
        before, after = opcode.stack_before, opcode.stack_after
        count = len(before)
        if pickletools.markobject in before:
            mark = next((i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _MARK), None)
            if mark is None:
                raise ValueError(f"{name} without a mark")
            count = before.index(pickletools.markobject) + len(self.stack) - mark
        if count > len(self.stack):
            raise ValueError(f"{name} with too little on the stack")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        if pickletools.markobject in after:
            self.stack.append(_MARK)
        elif after:
            self.stack.append(self._made(name, argument, [value for value in taken if value is not _MARK]))

    def _made(self, name: str, argument: Any, taken: list[_Value]) -> _Value:
        if name == "GLOBAL":
            return _Value(known=_named(*str(argument).split(" ", 1)))
        if name == "STACK_GLOBAL":
            return _Value(known=_named(*(value.known for value in taken)))
        if not taken:
            return _Value(known=argument if isinstance(argument, int | str | bytes) else () if name == "EMPTY_TUPLE" else None)
        if name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            self._call(taken[0].known, taken[1].known)
        elif name == "BINPERSID":
            return self._storage(taken[0].known)
        depth = max([taken[0].depth, *(value.depth + 1 for value in taken[1:])]) if name in _ADDING else 1 + max(value.depth for value in taken)
        if depth > self.limits.max_nesting:
            self.limits.check(self.source, "max_nesting", depth, "levels of nesting")
        is_tuple = name.startswith("TUPLE") and len(taken) <= _SHORT_TUPLE
        return _Value(depth, tuple(taken) if is_tuple else taken[0].known if name == "BUILD" else None)

    def _call(self, called: Any, arguments: Any) -> None:
        if not isinstance(called, _Name):
            raise _RefusedError("calls something that is no function. It is damaged, or made to do harm; loading never executes code, so it was refused.")
        if called.text not in _CALLS:
            raise _RefusedError(
                f"needs {visible(called.text)[:160]} to be imported and run to open it. Loading never executes code, so it was refused. "
                "If you trust the file, open it in PyTorch yourself and save model.state_dict()."
            )
        fits = isinstance(arguments, tuple) and _CALLS[called.text](arguments, self.limits)
        if not fits:
            raise _RefusedError(
                f"calls {called.text} with arguments that no checkpoint needs, or a tensor larger than the limit. It is damaged, or made to do harm."
            )
        if called.text == "torch._tensor._rebuild_from_type_v2":
            self._call(arguments[0].known if arguments else None, arguments[2].known if len(arguments) > 2 else None)
        if "_rebuild_" in called.text:
            self.tensors += 1
            if self.tensors > self.limits.max_tensors:
                self.limits.check(self.source, "max_tensors", self.tensors, "tensors or more")

    def _storage(self, identity: Any) -> _Value:
        """``('storage', type, key, location, number of elements)``, and in legacy files a view."""
        items = tuple(item.known for item in identity) if isinstance(identity, tuple) else ()
        if len(items) < 5 or items[0] not in ("storage", b"storage") or not isinstance(items[1], _Name):
            raise _RefusedError("refers to something that is no storage. It is damaged, or made to do harm.")
        kind = items[1].text.rpartition(".")[2].removesuffix("Storage")
        key, count = items[2], items[4]
        if kind not in _ITEMSIZES or not isinstance(key, str | int) or not isinstance(count, int) or count < 0:
            raise _RefusedError(
                f"has a storage {visible(str(key))[:60]!r} of {visible(str(count))[:60]} elements of type {visible(items[1].text)[:60]!r}. It is damaged."
            )
        key, size = str(key), count * _ITEMSIZES[kind]
        if self.storages.setdefault(key, size) != size:
            raise _RefusedError(f"refers to the storage {visible(key)[:60]!r} with two sizes. It is damaged, or made to do harm.")
        return _Value()


_ADDING = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"})
"""Instructions that put things into the container below them, which nests one deeper than they do."""


def _named(module: Any, name: Any) -> _Name:
    full = f"{module}.{name}"
    return _Name(_RENAMED.get(full, full))
