"""What a checkpoint file holds, whatever its format: flat arrays by name, and what else was in
it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flax_resblock.checkpoint.parallel import on_every_core

DIGESTS = "sha256"
"""Metadata entry: a JSON object of tensor name to SHA-256."""
METADATA_DIGEST = "sha256_of_metadata"
"""Metadata entry: SHA-256 of all other entries."""


@dataclass(frozen=True)
class Record:
    """A checkpoint that has been read.

    Attributes:
      source: Where it came from, for messages.
      format: ``"pytorch"``, ``"safetensors"`` or ``"orbax"``.
      tensors: Arrays by name, unwrapped and without prefixes; memory-mapped where the format
        allows.
      metadata: What this library (or another) wrote beside the tensors.
      notes: What was unwrapped, dropped or filled, one sentence each.
      extras: Entries of the file beside the state dict: ``epoch``, ``optimizer``, ``best_prec1``.
    """

    source: str
    format: str
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)


def digest(array: np.ndarray) -> str:
    """SHA-256 of dtype, shape and bits of an array, in hexadecimal."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    sha = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode())
    sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def digests(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """:func:`digest` of every array."""
    return dict(
        zip(
            tensors,
            on_every_core(digest, list(tensors.values()), lambda array: array.nbytes),
            strict=True,
        )
    )


def arrays_in(value: Any, name: str = "") -> dict[str, np.ndarray]:
    """Every array in nested mappings and lists, by the path that leads to it."""
    if isinstance(value, np.ndarray):
        return {name: value}
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    return {
        path: array
        for key, item in items
        for path, array in arrays_in(item, f"{name}/{key}").items()
    }


def metadata_digest(metadata: Mapping[str, str]) -> str:
    """SHA-256 of all entries but :data:`METADATA_DIGEST`."""
    content = json.dumps(
        {key: value for key, value in metadata.items() if key != METADATA_DIGEST}, sort_keys=True
    )
    return hashlib.sha256(content.encode()).hexdigest()
