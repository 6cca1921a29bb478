"""safetensors files, single or sharded. Needs no torch."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from flax_resblock.checkpoint.model_folder import shards
from flax_resblock.checkpoint.record import Record
from flax_resblock.checkpoint.unwrap import unwrap
from flax_resblock.errors import CheckpointError

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def _read_one(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:  # validates the header: offsets, overlaps, sizes
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or a damaged one ({error}). Copy or download it again.") from error
    with path.open("rb") as handle:
        view = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
    header_end = 8 + int.from_bytes(view[:8], "little")
    tensors = {}
    for name, info in json.loads(bytes(view[8:header_end])).items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(info["dtype"])
        if dtype is None:
            raise CheckpointError(f"{path}: {name} has dtype {info['dtype']}, which this library does not convert.")
        start, end = info["data_offsets"]
        tensors[name] = np.frombuffer(view[header_end + start : header_end + end], dtype).reshape(info["shape"])
    return tensors, metadata


def read(path: Path, *, entry: str | None = None) -> Record:
    """Reads a ``.safetensors`` file, or all shards that a ``.safetensors.index.json`` names; memory-mapped.

    Raises:
      CheckpointError: Damaged, a shard missing, or a tensor in two shards.
    """
    files = shards(path) if path.suffix == ".json" else [path]
    tensors: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    for file in files:
        more, more_metadata = _read_one(file)
        twice = tensors.keys() & more.keys()
        if twice:
            raise CheckpointError(f"{path}: {sorted(twice)[0]} is in two shards.")
        tensors |= more
        metadata |= more_metadata
    state, extras, notes = unwrap(tensors, is_tensor=lambda value: isinstance(value, np.ndarray), source=str(path), entry=entry)
    if len(files) > 1:
        notes.insert(0, f"joined {len(files)} shards")
    return Record(str(path), "safetensors", state, metadata, tuple(notes), extras)


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes one ``.safetensors`` file."""
    safetensors.numpy.save_file({key: np.asarray(value, order="C") for key, value in tensors.items()}, path, metadata=dict(metadata))


def write_folder(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Writes a folder as hubs have them: ``model.safetensors``, and text files by name beside it."""
    path.mkdir()
    write(path / "model.safetensors", tensors, metadata)
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")
