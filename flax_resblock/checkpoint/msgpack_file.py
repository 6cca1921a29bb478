"""Files of ``flax.serialization``: msgpack with arrays as extension types. Runs nothing in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from flax_resblock.checkpoint.folders import without_duplicates
from flax_resblock.checkpoint.jax_tree import METADATA, nested, record_of_tree
from flax_resblock.checkpoint.limits import VALUES_PER_TENSOR, Limits, check_values
from flax_resblock.checkpoint.record import Record
from flax_resblock.errors import damaged

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
"""Flax's extension types."""
_CHUNKED = "__msgpack_chunked_array__"
"""Marks an array of more than a gigabyte, whose parts are entries."""
_DTYPES: Mapping[bytes, np.dtype] = {
    name.encode(): np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
        *("bool", "complex64", "complex128"),
    )
} | {b"V2": np.dtype(ml_dtypes.bfloat16)}
"""By the names that Flax writes; ``V2`` is how old versions wrote bfloat16."""
_LONGEST = (1 << 31) - 1


class _Hooks:
    """What makes values, and counts them before they become too many."""

    def __init__(self, limits: Limits, source: str) -> None:
        self.limits, self.source, self.values = limits, source, 0

    def count(self, more: int) -> None:
        self.values += more
        check_values(self.limits, self.source, self.values)

    def pairs(self, pairs: list[tuple[Any, Any]]) -> Any:
        self.count(len(pairs))
        for key, _ in pairs:
            if not isinstance(key, str):
                raise ValueError(f"it has the key {str(key)[:60]!r}, which is no text")
        found = without_duplicates(pairs)
        return _whole(found) if _CHUNKED in found else found

    def items(self, items: list[Any]) -> list[Any]:
        self.count(len(items))
        return items

    def extension(self, code: int, data: bytes) -> Any:
        self.count(1)
        if code == _COMPLEX:
            real, imaginary = msgpack.unpackb(data)
            return complex(real, imaginary)
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"it has a value of the unknown type {code}")
        array = _array(data)
        return array[()] if code == _SCALAR else array


def _array(data: bytes) -> np.ndarray:
    parts = msgpack.unpackb(data, raw=True)
    if not isinstance(parts, list) or len(parts) != 3:
        raise ValueError("an array in it has no shape, type and values")
    shape, name, values = parts
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("the shape of an array in it is no list of sizes")
    if not isinstance(name, bytes) or name not in _DTYPES or not isinstance(values, bytes):
        raise ValueError(f"it has an array of the unknown type {str(name)[:60]!r}")
    dtype = _DTYPES[name]
    if math.prod(shape) * dtype.itemsize != len(values):
        raise ValueError(f"an array of shape {shape} in it has {len(values)} bytes")
    return np.frombuffer(values, dtype).reshape(shape)


def _whole(chunked: Mapping[str, Any]) -> np.ndarray:
    """An array that Flax wrote in parts: ``shape`` and ``chunks`` are mappings by number."""
    mappings = chunked["shape"], chunked["chunks"]
    shape, parts = ([one[str(i)] for i in range(len(one))] for one in mappings)
    if not all(isinstance(part, np.ndarray) and part.ndim == 1 for part in parts):
        raise ValueError("the parts of an array in it are no arrays")
    return np.concatenate(parts).reshape([int(n) for n in shape])


def read_msgpack(path: Path, limits: Limits) -> Record:
    """Reads a file of ``flax.serialization.to_bytes``; raises CheckpointError for any other file, a
    damaged one, or one beyond the limits."""
    hooks = _Hooks(limits, str(path))
    most = min(limits.max_tensors * VALUES_PER_TENSOR, _LONGEST)
    with damaged(f"{path} is no file of flax.serialization, or a damaged one", "Copy it again."):
        content = msgpack.unpackb(
            path.read_bytes(),
            object_pairs_hook=hooks.pairs,
            list_hook=hooks.items,
            ext_hook=hooks.extension,
            max_array_len=most,
            max_map_len=most,
        )
    about = content.pop(METADATA, None) if isinstance(content, dict) else None
    return record_of_tree(content, str(path), "msgpack", limits, about)


def write_msgpack(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes what ``flax.serialization.from_bytes`` reads into Linen's variables, which pays no
    heed to the entry with this library's metadata."""
    from flax import serialization

    content = {**nested(tensors, metadata), METADATA: json.dumps(dict(metadata))}
    path.write_bytes(serialization.msgpack_serialize(content))
