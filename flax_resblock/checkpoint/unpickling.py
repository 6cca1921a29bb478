"""The values of a pickle, as far as a checkpoint needs them, made without importing or calling
anything that it names. Needs no torch.

``torch.load(weights_only=True)`` refuses foreign code, but trusts the rest: it would build ten
million nested tuples and hash them until the interpreter crashes, and take the sizes of storages
for granted. Here the instructions that torch.save writes are followed, and no others. What it calls
is looked up in two tables, of what is made here (containers, numbers, arrays for tensors) and of
what only PyTorch can make (devices, sparse tensors); nothing else passes."""

from __future__ import annotations

import argparse
import pickletools
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pickle import decode_long
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from flax_resblock.checkpoint.limits import Limits
from flax_resblock.checkpoint.pickle_calls import CALLS, called
from flax_resblock.checkpoint.pickle_machine import (
    REFUSED,
    Machine,
    Memory,
    Name,
    RefusedError,
    Storage,
    Unknown,
    needs,
)
from flax_resblock.errors import CheckpointError, visible


@dataclass
class Unpickled:
    """What a pickle holds.

    Attributes:
      content: Its value, with an array for each tensor where the memory was given; without meaning
        where ``foreign`` says something.
      foreign: What is in it that only PyTorch can make, None for nothing.
      storages: Every storage that it refers to, by key.
      end: Where it ends in the data.
    """

    content: Any = None
    foreign: str | None = None
    storages: dict[str, Storage] = field(default_factory=dict)
    end: int = 0


def unpickle(
    data: bytes,
    limits: Limits,
    memory: Memory | None = None,
    *,
    start: int = 0,
    source: str = "the pickle",
    legacy: bool = False,
) -> Unpickled:
    """Follows the instructions of one pickle.

    Args:
      data: It begins at ``start``; more may follow.
      limits: Of nesting, tensors and bytes.
      memory: Where the elements of tensors are; None: a tensor counts as something that only
        PyTorch can make.
      start: Where in ``data``.
      source: For messages.
      legacy: Of the format in which a storage may be a view of another.
    Raises:
      CheckpointError: Damaged, code, deeper than allowed, sizes beyond the limits, or a tensor
        beyond its storage.
    """
    machine = Machine(data, start, limits, source, memory, storage_items=6 if legacy else 5)
    try:
        content = _run(machine)
    except RefusedError as error:
        raise CheckpointError(f"{source} {error}") from error
    except CheckpointError:
        raise
    except (
        Exception
    ) as error:  # IndexError, struct.error, UnicodeDecodeError, KeyError ... at damage
        reason = visible(str(error).splitlines()[0] if str(error) else type(error).__name__)[:160]
        raise CheckpointError(
            f"{source} is no PyTorch checkpoint, or a damaged one: its pickle cannot be read "
            f"({reason}). Copy or download it again."
        ) from error
    return Unpickled(content, machine.foreign, machine.storages, machine.at)


def _run(machine: Machine) -> Any:
    steps, data = _STEPS, machine.data
    while True:
        code = data[machine.at]
        step = steps.get(code)
        if step is None:
            raise RefusedError(_no_instruction(code))
        machine.at += 1
        if step is _STOP:
            return machine.pop()[0]
        step(machine)


def _no_instruction(code: int) -> str:
    name = next(
        (opcode.name for opcode in pickletools.opcodes if ord(opcode.code) == code), f"0x{code:02x}"
    )
    return (
        f"asks for the instruction {name}, which torch.save does not write unless it is told to. "
        f"{REFUSED}"
    )


_DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "Double": np.dtype("f8"),
        "Float": np.dtype("f4"),
        "Half": np.dtype("f2"),
        "BFloat16": np.dtype(ml_dtypes.bfloat16),
    }
    | {
        "Long": np.dtype("i8"),
        "Int": np.dtype("i4"),
        "Short": np.dtype("i2"),
        "Char": np.dtype("i1"),
        "Byte": np.dtype("u1"),
        "Bool": np.dtype("?"),
    }
    | {"ComplexDouble": np.dtype("c16"), "ComplexFloat": np.dtype("c8")}
)
"""Numpy's type of the elements of a storage, by the first part of its own type's name."""
_ITEMSIZES: Mapping[str, int] = MappingProxyType(
    {"Untyped": 1, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1}
)
"""Bytes per element of those that numpy has no type for."""


# The instructions that torch.load(weights_only=True) follows, by their code.


def _global(machine: Machine) -> None:
    name = f"{machine.line()}.{machine.line()}"
    if name not in CALLS and not name.startswith("torch."):
        raise RefusedError(needs(name))
    machine.push(Name(name))


def _call(machine: Machine, *, created: bool = False) -> None:
    arguments, depth = machine.pop()
    name, below = machine.pop()
    machine.push(
        called(machine, name, arguments, created=created), machine.nested(1 + max(depth, below))
    )


def _build(machine: Machine) -> None:
    """What an object's own state becomes. That of a dictionary is the version of each layer's state
    dict, which nothing here needs.
    """
    state, depth = machine.pop()
    built = machine.filled(depth)
    if isinstance(built, argparse.Namespace) and isinstance(state, dict):
        machine.copied(state)
        if not all(isinstance(name, str) for name in state):
            raise ValueError("it names an attribute by something else than text")
        vars(built).update(state)
    elif (
        isinstance(built, np.dtype)
        and isinstance(state, tuple)
        and len(state) > 1
        and state[1] in ("<", "=", "|")
    ):
        return
    elif type(built) is OrderedDict and isinstance(state, dict):
        if len(state) > 1 or any(name != "_metadata" for name in state):
            raise RefusedError(
                "has a dictionary with attributes of its own, which would change what it does. "
                "It is damaged, or made to do harm."
            )
    else:
        machine.stack[-1] = machine.unknown(
            f"the state of {'something' if isinstance(built, Unknown) else type(built).__name__}"
        )


def _extend(machine: Machine, items: list[Any], depth: int) -> None:
    below = machine.filled(depth)
    if type(below) is not list:
        raise ValueError("it appends to what is no list")
    below.extend(items)


def _append(machine: Machine) -> None:
    item, depth = machine.pop()
    _extend(machine, [item], depth)


def _update(machine: Machine, items: list[Any], depth: int) -> None:
    below = machine.filled(depth)
    if type(below) not in (dict, OrderedDict, Counter):
        raise ValueError("it sets items of what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        below[machine.hashed(key)] = value


def _set_item(machine: Machine) -> None:
    value, depth = machine.pop()
    key, below = machine.pop()
    _update(machine, [key, value], max(depth, below))


def _tuple(machine: Machine) -> None:
    items, depth = machine.since_mark()
    machine.push(tuple(items), machine.nested(depth + 1))


def _short_tuple(count: int) -> Step:
    def step(machine: Machine) -> None:
        taken = [machine.pop() for _ in range(count)]
        machine.push(
            tuple(value for value, _ in reversed(taken)),
            machine.nested(1 + max(depth for _, depth in taken)),
        )

    return step


def _pushing(make: Callable[[Machine], Any]) -> Step:
    return lambda machine: machine.push(make(machine))


def _fixed(layout: str) -> Step:
    unpacker = struct.Struct(layout)

    def step(machine: Machine) -> None:
        machine.push(unpacker.unpack_from(machine.data, machine.at)[0])
        machine.at += unpacker.size

    return step


def _put(size: int) -> Step:
    def step(machine: Machine) -> None:
        number = int.from_bytes(machine.take(size), "little")
        machine.memo[number] = machine.top()

    return step


def _get(size: int) -> Step:
    return lambda machine: machine.push(*machine.memo[int.from_bytes(machine.take(size), "little")])


def _text(machine: Machine) -> None:
    machine.push(
        machine.take(int.from_bytes(machine.take(4), "little")).decode("utf-8", "surrogatepass")
    )


def _storage(machine: Machine) -> None:
    """``('storage', type, key, location, number of elements)``, and in old files a view of it."""
    identity, _ = machine.pop()
    items: tuple[Any, ...] = identity if isinstance(identity, tuple) else ()
    if (
        len(items) != machine.storage_items
        or items[0] not in ("storage", b"storage")
        or not isinstance(items[1], Name)
    ):
        raise RefusedError(
            "refers to something that is no storage. It is damaged, or made to do harm."
        )
    kind, key, count = items[1].text.rpartition(".")[2].removesuffix("Storage"), items[2], items[4]
    if not isinstance(key, str | int) or not isinstance(count, int):
        raise RefusedError(
            "refers to a storage without a name or size. It is damaged, or made to do harm."
        )
    if kind not in _DTYPES.keys() | _ITEMSIZES.keys() or count < 0:
        raise RefusedError(
            f"has a storage {visible(str(key))[:60]!r} of {count} elements of type "
            f"{visible(items[1].text)[:60]!r}. It is damaged."
        )
    dtype = _DTYPES.get(kind)
    found = Storage(
        str(key), dtype, count, count * (_ITEMSIZES[kind] if dtype is None else dtype.itemsize)
    )
    if machine.storages.setdefault(found.key, found) != found:
        raise RefusedError(
            f"refers to the storage {visible(found.key)[:60]!r} with two sizes or types. It is "
            f"damaged, or made to do harm."
        )
    machine.push(
        machine.unknown("a view of a storage") if items[5:] not in ((), (None,)) else found
    )


def _skip(machine: Machine) -> None:
    """The version of the instructions."""
    machine.take(1)


def _stop(_: Machine) -> None:
    """The end."""


Step = Callable[[Machine], None]
_STOP: Step = _stop
_STEPS: Mapping[int, Step] = MappingProxyType(
    {
        ord("c"): _global,
        ord("R"): _call,
        0x81: lambda machine: _call(machine, created=True),
        ord("b"): _build,
        ord("a"): _append,
        ord("e"): lambda machine: _extend(machine, *machine.since_mark()),
        ord("s"): _set_item,
        ord("u"): lambda machine: _update(machine, *machine.since_mark()),
        ord("("): lambda machine: machine.marks.append(len(machine.stack)),
        ord("t"): _tuple,
        0x85: _short_tuple(1),
        0x86: _short_tuple(2),
        0x87: _short_tuple(3),
        ord("N"): _pushing(lambda _: None),
        0x88: _pushing(lambda _: True),
        0x89: _pushing(lambda _: False),
        ord(")"): _pushing(lambda _: ()),
        ord("]"): _pushing(lambda _: []),
        ord("}"): _pushing(lambda _: {}),
        0x8F: _pushing(lambda machine: machine.unknown("a set")),
        ord("J"): _fixed("<i"),
        ord("K"): _fixed("<B"),
        ord("M"): _fixed("<H"),
        ord("G"): _fixed(">d"),
        0x8A: _pushing(lambda machine: decode_long(machine.take(machine.take(1)[0]))),
        ord("X"): _text,
        ord("U"): _pushing(lambda machine: machine.take(machine.take(1)[0]).decode("utf-8")),
        ord("Q"): _storage,
        ord("q"): _put(1),
        ord("r"): _put(4),
        ord("h"): _get(1),
        ord("j"): _get(4),
        0x80: _skip,
        ord("."): _STOP,
    }
)
