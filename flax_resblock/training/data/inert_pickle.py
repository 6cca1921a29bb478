"""Pickles read without running them: plain containers and arrays of unsigned bytes, and a refusal
of everything else.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_resblock.errors import InputError, visible

_BYTE_CODES = {"u1", "|u1", b"u1", b"|u1"}


class _Stand:
    """What a reconstructor makes: it keeps its arguments and its state, and does nothing with
    them.
    """

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, *args: Any) -> None:
        self.kind, self.args, self.state = kind, args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Global:
    """A name that may appear in the file. The file can call it, and cannot change it."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it would change a function")


_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED = {
    **{
        (module, "_reconstruct"): _Global(lambda *args: _Stand("array", *args))
        for module in _MODULES
    },
    ("numpy", "ndarray"): _Global(lambda *args: _Stand("none", *args)),
    ("numpy", "dtype"): _Global(lambda *args: _Stand("dtype", *args)),
}


_OPCODES = frozenset(
    {
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
    }
    | {
        "SHORT_BINSTRING",
        "BINSTRING",
        "SHORT_BINBYTES",
        "BINBYTES",
        "SHORT_BINUNICODE",
        "BINUNICODE",
    }
    | {
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
    }
    | {
        "BINPUT",
        "LONG_BINPUT",
        "MEMOIZE",
        "BINGET",
        "LONG_BINGET",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BUILD",
    }
)
"""Instructions of plain data from protocol 2 on; none that makes an instance by itself, asks a
registry, or loads something by a persistent id.
"""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._left = len(data)

    def _encode(self, text: Any, encoding: Any) -> bytes:
        """How Python 3 writes bytes for Python 2; one text can be encoded ten thousand times, a
        byte of the file only once.
        """
        if not isinstance(text, str) or encoding != "latin1" or len(text) > self._left:
            raise pickle.UnpicklingError(
                "it calls _codecs.encode with other arguments than Python does"
            )
        self._left -= len(text)
        return text.encode("latin-1")

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("_codecs", "encode"):
            return _Global(self._encode)
        found = _ALLOWED.get((module_name, global_name))
        if found is None:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}, which plain data do not need; "
                f"nothing was run"
            )
        return found


_MOST_OPCODES = 3_000_000
"""The largest CIFAR file has a tenth; each can make an object of 64 bytes."""
_MOST_TUPLES = 1000
"""Arrays need a handful; nested by the hundred thousand, they exhaust the interpreter's own stack
where one is the key of a dictionary.
"""


_KEEPING, _TAKING = ("BINPUT", "LONG_BINPUT", "MEMOIZE"), ("BINGET", "LONG_BINGET")
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPENDS", "SETITEMS", "BUILD"})
"""After which a tuple can be on top: those that make one, and those that may take nothing off
it.
"""


def _check_opcodes(data: bytes) -> None:
    """Refuses other instructions, too many of them, and places in the memo that the unpickler would
    reserve gigabytes for.

    What may be a tuple is kept in the memo and never taken out of it: tuples that share their items
    can be hashed without end."""
    tuples = 0
    before = ""
    maybe_tuple: dict[int, bool] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        tuples += opcode.name.startswith("TUPLE")
        if number > _MOST_OPCODES or tuples > _MOST_TUPLES:
            raise pickle.UnpicklingError("it has far more instructions than any file of this kind")
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(
                f"it asks for {opcode.name}, which plain data do not need; nothing was run"
            )
        if opcode.name == "LONG_BINPUT" and isinstance(argument, int) and argument > len(data):
            raise pickle.UnpicklingError(
                f"it holds {len(data):,} bytes and keeps value number {argument:,}"
            )
        if opcode.name in _KEEPING:
            maybe_tuple[len(maybe_tuple) if argument is None else int(argument)] = before in _TUPLES
            continue
        if opcode.name in _TAKING and maybe_tuple.get(int(argument or 0)):
            raise pickle.UnpicklingError("it uses a tuple twice, which plain data do not need")
        before = opcode.name


def _value(value: Any) -> Any:
    """A top-level value, with an array in place of its stand-in."""
    if not isinstance(value, _Stand):
        return value
    match value:
        case _Stand(
            kind="array",
            state=(
                _,
                tuple() as shape,
                _Stand(kind="dtype", args=(code, *_)),
                fortran,
                bytes() as raw,
            ),
        ):
            whole = all(isinstance(n, int) and n >= 0 for n in shape)
            if (
                whole
                and isinstance(code, str | bytes)
                and code in _BYTE_CODES
                and math.prod(shape) == len(raw)
            ):
                return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
    raise pickle.UnpicklingError(
        "it holds an array that is not one of unsigned bytes, or whose shape does not fit its bytes"
    )


def load_inert(data: bytes, name: str) -> dict[bytes, Any]:
    """The dictionary in a pickle of Python 2 or 3, without executing anything in it.

    Args:
      data: The pickle.
      name: The file, for messages.
    Returns:
      Keys as bytes; values that are dict, list, tuple, bytes, str, int, float, bool or None, or an
      array of uint8.
    Raises:
      InputError: A damaged pickle, one whose top is no dictionary, or one that asks for anything
        but the reconstructors of numpy arrays.
    """
    try:
        _check_opcodes(data)
        content = _Unpickler(data).load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, no dictionary")
        return {
            key.encode() if isinstance(key, str) else key: _value(value)
            for key, value in content.items()
        }
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = visible(str(error) or type(error).__name__)[:160]
        raise InputError(
            f"{name} cannot be read as plain data: {reason}. Fetch it again, or take the "
            f"binary version."
        ) from error
