"""safetensors files, single or sharded. Needs no torch."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from flax_resblock.checkpoint.folders import shards, without_duplicates
from flax_resblock.checkpoint.limits import LIMITS, Limits, check_files
from flax_resblock.checkpoint.record import Record
from flax_resblock.checkpoint.unwrap import unwrap
from flax_resblock.errors import CheckpointError, damaged, visible

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def _header(path: Path, limits: Limits) -> dict[str, Any]:
    """The header. Two entries of one name are refused: which counts depends on the reader."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path} is not a safetensors file, or a damaged one: {size:,} bytes, and a "
                f"header of {length:,}. Copy or download it again."
            )
        limits.check(path, "max_header_bytes", length, "bytes of header")
        return json.loads(handle.read(length), object_pairs_hook=without_duplicates)


def _read_one(path: Path, limits: Limits) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    words = f"{path} is not a safetensors file, or a damaged one"
    with damaged(words, "Copy or download it again."):
        header = _header(path, limits)
        # this validates the rest: offsets, overlaps, sizes, types
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    limits.check(path, "max_tensors", len(header), "tensors")
    with path.open("rb") as handle:
        view = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
    header_end = 8 + int.from_bytes(view[:8], "little")
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(info["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{path}: {visible(name)[:200]} has dtype {visible(info['dtype'])}, which this "
                f"library does not convert."
            )
        start, end = (header_end + offset for offset in info["data_offsets"])
        try:
            tensors[name] = np.frombuffer(view[start:end], dtype).reshape(info["shape"])
        # numpy knows fewer axes, and none as long as an empty tensor may have
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {visible(name)[:200]} has the shape {str(info['shape'])[:120]}, "
                f"which is no array's ({error})."
            ) from error
    return tensors, metadata


def read_safetensors(path: Path, *, entry: str | None = None, limits: Limits = LIMITS) -> Record:
    """Reads a ``.safetensors`` file, or all shards that a ``.safetensors.index.json`` names;
    memory-mapped. Raises CheckpointError for a damaged file, one beyond the limits, a missing
    shard, or a tensor in two shards."""
    files = shards(path, limits) if path.suffix == ".json" else [path]
    check_files(files, limits, path)
    tensors: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    for file in files:
        more, more_metadata = _read_one(file, limits)
        twice = tensors.keys() & more.keys()
        if twice:
            raise CheckpointError(f"{path}: {visible(sorted(twice)[0])[:200]} is in two shards.")
        tensors |= more
        limits.check(path, "max_tensors", len(tensors), "tensors")
        metadata |= more_metadata
    state, extras, notes, names = unwrap(
        tensors, is_tensor=lambda one: isinstance(one, np.ndarray), source=str(path), entry=entry
    )
    if len(files) > 1:
        notes.insert(0, f"joined {len(files)} shards")
    return Record(str(path), "safetensors", state, metadata, tuple(notes), extras, names)


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes one ``.safetensors`` file."""
    arrays = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    safetensors.numpy.save_file(arrays, path, metadata=dict(metadata))


def write_hub_folder(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    files: Mapping[str, str],
) -> None:
    """Writes a folder as hubs have them: ``model.safetensors``, and text files beside it."""
    path.mkdir()
    write_safetensors(path / "model.safetensors", tensors, metadata)
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")
