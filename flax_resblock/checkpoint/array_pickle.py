"""Pickles of nested dictionaries of arrays, as Haiku's users save them; runs nothing in them.

The arrays are numpy's or jax's. :mod:`~flax_resblock.checkpoint.inert_pickle` checks the
instructions first; then our own functions stand behind the names that such a pickle may call."""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.inert_pickle import (
    PLAIN_OPCODES,
    PickleRules,
    RefusedError,
    check_pickle,
    one_error,
)
from flax_resblock.checkpoint.jax_tree import record_of_tree
from flax_resblock.checkpoint.limits import Limits, array_bytes, check_content
from flax_resblock.checkpoint.record import Record
from flax_resblock.checkpoint.torch_calls import MADE, Context, UnfitError
from flax_resblock.checkpoint.torch_stand_ins import Copies, DTypeStandIn
from flax_resblock.errors import CheckpointError, visible

_REFUSED = (
    "Loading never executes code, so it was refused. If you trust the file, open it yourself and "
    "save its arrays with numpy.savez, or with flax.serialization.to_bytes."
)
_OPCODES_PER_TENSOR = 100


class PickledArray:
    """In place of an array, until its values are known."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        """``(version, shape, dtype, Fortran order, bytes)``, as numpy has it."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnfitError("an array in it has no shape, type and values")
        _, shape, dtype, in_columns, values = state
        self.array = _filled(values, dtype, shape, "F" if in_columns else "C")


def _filled(values: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    kind = dtype.dtype if isinstance(dtype, DTypeStandIn) else None
    sizes = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if kind is None or not sizes or not isinstance(values, bytes | bytearray):
        raise UnfitError("an array in it is of another type than numbers of this machine's order")
    if math.prod(shape) * kind.itemsize != len(values) or order not in ("C", "F"):
        raise UnfitError(f"an array of shape {shape} in it has {len(values)} bytes")
    return np.frombuffer(values, kind).reshape(shape, order=order)


def _empty(_: Context, *arguments: Any) -> Any:
    return PickledArray()


def _from_buffer(_: Context, values: Any, dtype: Any, shape: Any, order: Any) -> Any:
    return _filled(values, dtype, shape, order)


def _of_jax(_: Context, function: Any, arguments: Any, state: Any, *about: Any) -> Any:
    """A jax array is a numpy array, and what else jax knows of it."""
    made = PickledArray()
    made.__setstate__(state)
    return made.array


def _mapping(context: Context, items: Any = ()) -> Any:
    if not isinstance(items, dict):
        raise ValueError("a mapping in it is made from something else than a dictionary")
    return items


RECONSTRUCT = tuple(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core"))
NUMPY_CALLS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys((*RECONSTRUCT, "numpy.ndarray"), _empty),
    "numpy.dtype": MADE["numpy.dtype"],
    "_codecs.encode": MADE["_codecs.encode"],
}
"""What makes an array of any version of numpy and Python."""
_CALLS: Mapping[str, Callable[..., Any]] = {
    **NUMPY_CALLS,
    **dict.fromkeys(
        (f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
        MADE["numpy.core.multiarray.scalar"],
    ),
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
    "jax._src.array._reconstruct_array": _of_jax,
    "jaxlib.xla_extension._reconstruct_array": _of_jax,
    "haiku._src.data_structures.FlatMapping": _mapping,
}
"""What a pickle of parameters may call, by name."""
ARRAY_OPCODES = PLAIN_OPCODES | {
    *("FRAME", "MEMOIZE", "STACK_GLOBAL", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES")
}


class ArrayUnpickler(pickle.Unpickler):
    """Finds our own functions behind names, in a pickle whose instructions were checked.

    ``calls`` are the functions by the names that they stand behind, ``refused`` ends the message
    about any other name, and ``encoding`` is that of Python 2's text, as for :func:`pickle.loads`.
    """

    def __init__(
        self,
        data: bytes,
        context: Context,
        calls: Mapping[str, Callable[..., Any]],
        refused: Callable[[str], str],
        encoding: str = "ASCII",
    ) -> None:
        super().__init__(io.BytesIO(data), encoding=encoding)
        self.context, self.calls, self.refused = context, calls, refused

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name == "collections.OrderedDict":
            return OrderedDict
        if name not in self.calls:
            raise RefusedError(self.refused(visible(name)[:160]))
        return partial(self.calls[name], self.context)


def read_pickle(path: Path, limits: Limits) -> Record:
    """Reads a pickle of parameters and state; raises CheckpointError for code, damage, other values
    than dictionaries of arrays, or more than the limits allow."""
    source = str(path)
    rules = PickleRules(
        opcodes=ARRAY_OPCODES | {"BINBYTES8", "BYTEARRAY8"},
        stateful={"numpy.dtype", *RECONSTRUCT},
        fillable=frozenset({"collections.OrderedDict"}),
        hashable=frozenset({"_codecs.encode"}),
        most_opcodes=limits.max_tensors * _OPCODES_PER_TENSOR,
        refusal=_REFUSED,
    )
    with one_error(source, "pickle of arrays"):
        data = path.read_bytes()
        checked = check_pickle(data, rules, limits, source)
        context = Context(limits, source, None, Copies(limits, source))
        content = ArrayUnpickler(data[: checked.end], context, _CALLS, _refused).load()
    check_content(content, limits, _size, source)
    return record_of_tree(_with_arrays(content, source), source, "pickle", limits)


def _refused(name: str) -> str:
    return f"needs {name} to be imported and run to open it. {_REFUSED}"


def _size(value: Any) -> int | None:
    return array_bytes(value.array if isinstance(value, PickledArray) else value)


def _with_arrays(value: Any, source: str) -> Any:
    """The same containers with every array in its place."""
    if isinstance(value, PickledArray):
        if value.array is None:
            raise CheckpointError(f"{source} has an array without values. It is damaged.")
        return value.array
    if isinstance(value, Mapping):
        return {key: _with_arrays(item, source) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_arrays(item, source) for item in value]
    return value
