"""CIFAR's pickles read without running them: plain containers and arrays of unsigned bytes."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_resblock.checkpoint import LIMITS
from flax_resblock.checkpoint.inert_pickle import (
    PLAIN_OPCODES,
    PickleRules,
    RefusedError,
    check_pickle,
)
from flax_resblock.errors import InputError, visible

_BYTE_CODES = {"u1", "|u1", b"u1", b"|u1"}
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_BY_STACK = ""
"""The name of a callable that the stack names, and :meth:`_Unpickler.find_class` checks."""
_RULES = PickleRules(
    opcodes=PLAIN_OPCODES
    | {"FRAME", "MEMOIZE", "STACK_GLOBAL", "BINSTRING", "SHORT_BINBYTES", "BINBYTES"}
    | {"SHORT_BINUNICODE"},
    stateful={_BY_STACK, "numpy.dtype", *(f"{module}._reconstruct" for module in _MULTIARRAY)},
    hashable={_BY_STACK, "_codecs.encode"},
    most_opcodes=3_000_000,  # the largest CIFAR file has a tenth; each can make 64 bytes
    refusal="Plain data do not need that; nothing was run.",
)


class _StandIn:
    """What a reconstructor makes: it keeps its arguments and its state, and does nothing more."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, *args: Any) -> None:
        self.kind, self.args, self.state = kind, args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Callee:
    """A name that may appear in the file. The file can call it, and cannot change it."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)


_ALLOWED = {
    **{
        f"{module}._reconstruct": _Callee(lambda *args: _StandIn("array", *args))
        for module in _MULTIARRAY
    },
    "numpy.ndarray": _Callee(lambda *args: _StandIn("none", *args)),
    "numpy.dtype": _Callee(lambda *args: _StandIn("dtype", *args)),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._left = len(data)

    def _encode(self, text: Any, encoding: Any) -> bytes:
        """How Python 3 writes bytes for Python 2; all together are no more than the file."""
        if not isinstance(text, str) or encoding != "latin1" or len(text) > self._left:
            raise RefusedError("calls _codecs.encode with other arguments than Python does")
        self._left -= len(text)
        return text.encode("latin-1")

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name == "_codecs.encode":
            return _Callee(self._encode)
        if name not in _ALLOWED:
            raise RefusedError(f"asks for {name}. {_RULES.refusal}")
        return _ALLOWED[name]


def _value(value: Any) -> Any:
    """A top-level value, with an array in place of its stand-in."""
    if not isinstance(value, _StandIn):
        return value
    match value:
        case _StandIn(
            kind="array",
            state=(
                _,
                tuple() as shape,
                _StandIn(kind="dtype", args=(code, *_)),
                fortran,
                bytes() as raw,
            ),
        ):
            whole = all(isinstance(n, int) and n >= 0 for n in shape)
            of_bytes = isinstance(code, str | bytes) and code in _BYTE_CODES
            if whole and of_bytes and math.prod(shape) == len(raw):
                return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
    raise RefusedError(
        "holds an array that is not one of unsigned bytes, or whose shape does not fit its bytes"
    )


def read_cifar_pickle(data: bytes, name: str) -> dict[bytes, Any]:
    """The dictionary in a pickle of Python 2 or 3, without executing anything in it.

    Returns:
      Keys as bytes; values that are dict, list, tuple, bytes, str, int, float, bool or None, or an
      array of uint8.
    Raises:
      InputError: A damaged pickle, one that holds no dictionary, or one that asks for anything but
        the reconstructors of numpy arrays.
    """
    try:
        checked = check_pickle(data, _RULES, LIMITS, name)
        if checked.foreign:
            raise RefusedError(f"has {checked.foreign}")
        content = _Unpickler(data).load()
        if not isinstance(content, dict):
            raise RefusedError(f"holds a {type(content).__name__}, no dictionary")
        return {
            key.encode() if isinstance(key, str) else key: _value(value)
            for key, value in content.items()
        }
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = visible(str(error) or type(error).__name__)[:160]
        reason = f"it {reason}" if isinstance(error, RefusedError) else reason
        raise InputError(
            f"{name} cannot be read as plain data: {reason}. Fetch it again, or take the "
            f"binary version."
        ) from error
