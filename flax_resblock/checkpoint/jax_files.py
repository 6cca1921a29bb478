"""Files of arrays as JAX programs write them; runs nothing in them.

``flax.serialization`` writes msgpack with arrays as extension types; ``numpy.savez`` and HDF5, as
flaxmodels publishes it (needs h5py), have names that are paths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from flax_resblock.checkpoint.bounded import read_npz
from flax_resblock.checkpoint.folders import without_duplicates
from flax_resblock.checkpoint.jax_tree import (
    METADATA,
    has_statistics,
    nested,
    paths_of,
    record_of_tree,
    tree_of,
)
from flax_resblock.checkpoint.limits import VALUES_PER_TENSOR, Limits, check_values
from flax_resblock.checkpoint.record import Record
from flax_resblock.errors import (
    CheckpointError,
    InputError,
    MissingDependencyError,
    damaged,
    visible,
)

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
    """Reads a file of ``flax.serialization.to_bytes``; raises CheckpointError for any other."""
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


def read_weights(path: Path, limits: Limits) -> Record:
    """Reads an archive of weights, ``"params/conv_init/kernel"`` or ``"conv_root/kernel"``; raises
    CheckpointError for any other file, a damaged one, or one beyond the limits."""
    try:
        arrays = read_npz(path, limits.max_bytes, limits.max_tensors)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    about = arrays.pop(METADATA, None)
    text = None if about is None else str(about)
    return record_of_tree(tree_of(arrays, str(path)), str(path), "npz", limits, text)


def write_weights(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes the collections ``params`` and ``batch_stats``, or the parameters alone without a
    collection where there are no statistics, as big_vision does; and this library's metadata as an
    array of text."""
    content: dict[str, Any] = dict(paths_of(tensors, metadata, collections=has_statistics(tensors)))
    content[METADATA] = json.dumps(dict(metadata))
    with path.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **content)


def _h5py() -> Any:
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError("An HDF5 file needs h5py: pip install h5py.") from error
    return h5py


def read_h5(path: Path, limits: Limits) -> Record:
    """Reads every dataset; names are the paths to them.

    Raises:
      CheckpointError: Damaged, beyond the limits, or with links and data that lie elsewhere.
      MissingDependencyError: h5py is not installed.
    """
    h5py = _h5py()
    words = f"{path} is no HDF5 file, or a damaged one"
    with damaged(words, "Copy it again."), h5py.File(path, "r") as file:
        arrays = dict(_datasets(h5py, file, "", limits, str(path)))
        about = file[METADATA].asstr()[()] if METADATA in file else None
    return record_of_tree(tree_of(arrays, str(path)), str(path), "h5", limits, about)


def _datasets(
    h5py: Any, file: Any, prefix: str, limits: Limits, source: str
) -> Iterator[tuple[str, np.ndarray]]:
    pending: list[tuple[str, Any, int]] = [(prefix, file, 1)]
    seen, total, tensors = set(), 0, 0
    while pending:
        place, group, depth = pending.pop()
        limits.check(source, "max_nesting", depth, "levels of groups")
        for name in group:
            if not place and name == METADATA:
                continue
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise CheckpointError(
                    f"{source} has the link {visible(name)[:120]!r}, and links are not followed."
                )
            item, where = group[name], f"{place}{name}"
            if isinstance(item, h5py.Group):
                mark = h5py.h5o.get_info(item.id).addr
                if mark in seen:
                    raise CheckpointError(f"{source} has the group {visible(where)[:120]!r} twice.")
                seen.add(mark)
                pending.append((f"{where}/", item, depth + 1))
                continue
            if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiu":
                raise CheckpointError(f"{source}: {visible(where)[:120]!r} is no array of numbers.")
            if item.is_virtual or item.external:
                raise CheckpointError(
                    f"{source}: the values of {visible(where)[:120]!r} lie in another file."
                )
            tensors, total = tensors + 1, total + int(item.size) * item.dtype.itemsize
            limits.check(source, "max_tensors", tensors, "tensors")
            limits.check(source, "max_bytes", total, "bytes of tensors")
            array = np.asarray(item[()])
            yield where, array.astype(array.dtype.newbyteorder("="), copy=False)


def write_h5(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes one dataset for each tensor, and this library's metadata as an attribute."""
    with _h5py().File(path, "w") as file:
        for name, value in paths_of(tensors, metadata, collections=False).items():
            file.create_dataset(name, data=value)
        file[METADATA] = json.dumps(dict(metadata))  # too long for an attribute
