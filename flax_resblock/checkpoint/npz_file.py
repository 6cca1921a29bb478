"""Archives of weights as ``numpy.savez`` writes them, with names that are paths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.bounded import read_npz
from flax_resblock.checkpoint.jax_tree import (
    METADATA,
    has_statistics,
    paths_of,
    record_of_tree,
    tree_of,
)
from flax_resblock.checkpoint.limits import Limits
from flax_resblock.checkpoint.record import Record
from flax_resblock.errors import CheckpointError, InputError


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
