"""CIFAR's pickles read without running them: plain containers and arrays of unsigned bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from flax_resblock.checkpoint import LIMITS
from flax_resblock.checkpoint.array_pickle import (
    ARRAY_OPCODES,
    NUMPY_CALLS,
    RECONSTRUCT,
    ArrayUnpickler,
    PickledArray,
)
from flax_resblock.checkpoint.inert_pickle import PickleRules, RefusedError, check_pickle
from flax_resblock.checkpoint.torch_calls import Context, UnfitError
from flax_resblock.checkpoint.torch_stand_ins import Copies
from flax_resblock.errors import InputError, visible

_RULES = PickleRules(
    opcodes=ARRAY_OPCODES | {"BINSTRING"},
    stateful={"numpy.dtype", *RECONSTRUCT},
    hashable={"_codecs.encode"},
    most_opcodes=3_000_000,  # the largest CIFAR file has a tenth; each can make 64 bytes
    refusal="Plain data do not need that; nothing was run.",
)
_NO_BYTES = (
    "holds an array that is not one of unsigned bytes, or whose shape does not fit its bytes"
)


def _encoded(context: Context, text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes for Python 2; all together are no more than the file."""
    left = context.limits.max_header_bytes - context.copies.bytes
    if not isinstance(text, str) or encoding != "latin1" or len(text) > left:
        raise RefusedError("calls _codecs.encode with other arguments than Python does")
    context.copies.bytes += len(text)
    return text.encode("latin-1")


def _refused(name: str) -> str:
    return f"asks for {name}. {_RULES.refusal}"


def _value(value: Any) -> Any:
    """A top-level value, with an array in place of its stand-in."""
    if not isinstance(value, PickledArray):
        return value
    if value.array is None or value.array.dtype != np.uint8:
        raise RefusedError(_NO_BYTES)
    return value.array


def read_cifar_pickle(data: bytes, name: str) -> dict[bytes, Any]:
    """The dictionary in a pickle of Python 2 or 3, without executing anything in it.

    Returns:
      Keys as bytes; values that are dict, list, tuple, bytes, str, int, float, bool or None, or an
      array of uint8.
    Raises:
      InputError: A damaged pickle, one that holds no dictionary, or one that asks for anything but
        the reconstructors of numpy arrays.
    """
    limits = replace(LIMITS, max_header_bytes=max(len(data), 1))
    context = Context(limits, name, None, Copies(limits, name))
    calls = {**NUMPY_CALLS, "_codecs.encode": _encoded}
    try:
        checked = check_pickle(data, _RULES, LIMITS, name)
        if checked.foreign:
            raise RefusedError(f"has {checked.foreign}")
        content = ArrayUnpickler(data, context, calls, _refused, encoding="bytes").load()
        if not isinstance(content, dict):
            raise RefusedError(f"holds a {type(content).__name__}, no dictionary")
        return {
            key.encode() if isinstance(key, str) else key: _value(value)
            for key, value in content.items()
        }
    except Exception as error:  # a damaged pickle raises nearly anything
        words = _NO_BYTES if isinstance(error, UnfitError) else str(error) or type(error).__name__
        reason = visible(words)[:160]
        reason = f"it {reason}" if isinstance(error, RefusedError | UnfitError) else reason
        raise InputError(
            f"{name} cannot be read as plain data: {reason}. Fetch it again, or take the "
            f"binary version."
        ) from error
