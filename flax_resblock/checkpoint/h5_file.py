"""HDF5 files of weights: groups of datasets, as flaxmodels publishes them. Needs h5py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.jax_tree import METADATA, paths_of, record_of_tree, tree_of
from flax_resblock.checkpoint.limits import Limits
from flax_resblock.checkpoint.record import Record
from flax_resblock.errors import CheckpointError, MissingDependencyError, damaged, visible


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
