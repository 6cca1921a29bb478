"""Compares an Orbax folder with the limits before Orbax and TensorStore allocate what it declares.

A few hundred bytes of metadata can announce an array of any size, whose absent chunks are then
filled with zeros, and a few bytes of compressed data can expand to any size. TensorStore lists
what is in the database; no array is read.
"""

# Why zstd frames are walked here by hand: Orbax's own metadata say how large an array is, and not
# how far the frames expand in which the nodes of its database are stored, so that a hostile folder
# can announce a small array and hold a bomb. TensorStore stops at the end of a chunk, but documents
# no such bound for the nodes, and the standard library has no zstd before Python 3.14.

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.limits import Limits, check_files
from flax_resblock.errors import CheckpointError, damaged, visible

_MANIFEST = "manifest.ocdbt"
_ARRAY_FILES = (".zarray", "zarr.json")
_CODECS = frozenset({"bytes", "crc32c", "sharding_indexed", "transpose", "zstd"})
_OTHER_ITEMSIZES = {"bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int4": 1, "uint4": 1}

_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK = 1 << 17
"""Bytes that one block of a zstd frame expands to at most."""
_ZSTD_KINDS = ("stored", "repeated", "compressed")


class DamagedFolderError(CheckpointError):
    """A folder whose database cannot be read."""


def check_folder(folder: Path, limits: Limits) -> None:
    """Raises CheckpointError for a folder that has links leading out of it or anything but files
    and folders, that expands to more than the limits allow, or whose metadata are damaged."""
    files = list(_files(folder, limits))
    check_files(files, limits, folder)
    described = sum(
        file.stat().st_size for file in files if file.suffix == ".json" or file.name.isupper()
    )
    limits.check(folder, "max_header_bytes", described, "bytes of metadata")
    expanded = sum(map(_expanded, files))
    limits.check(folder, "max_bytes", expanded, "bytes once its compressed data are expanded")
    words = f"{folder} is not an Orbax checkpoint, or a damaged one"
    with damaged(words, "Copy it again.", DamagedFolderError):
        arrays = [entry for found in _arrays(folder, files) for entry in found]
    limits.check(folder, "max_tensors", len(arrays), "tensors")
    limits.check(folder, "max_bytes", sum(size for _, size in arrays), "bytes of tensors")


def unreadable(folder: Path, names: Iterable[str]) -> list[str]:
    """Which of these tensors cannot be read from a damaged folder.

    The database has one checksum for a group of small tensors, which are lost together.
    """
    lost = set(names)
    for file in sorted(folder.rglob(_MANIFEST)):
        try:
            store = _database(file.parent)
            values = {
                name: (store.read(f"{name}/zarr.json"), store.read(f"{name}/.zarray"))
                for name in lost
            }
        except Exception:  # this one is the damaged one
            continue
        for name, found in values.items():
            try:
                if any(value.result().state == "value" for value in found):
                    lost.discard(name)
            except Exception:  # any kind of damage; the name stays among the lost
                continue
        # the first is that of the whole, the others are parts that the writing processes left
        break
    return sorted(lost)


def _database(folder: Path) -> Any:
    """TensorStore's view of the database in a folder."""
    import tensorstore

    base = f"file://{folder.resolve().as_posix()}/"
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


def _files(folder: Path, limits: Limits) -> Iterator[Path]:
    inside = folder.resolve()
    for parent, folders, names in os.walk(folder):
        if len(Path(parent).relative_to(folder).parts) > limits.max_nesting:
            limits.check(folder, "max_nesting", limits.max_nesting + 1, "levels of folders or more")
        for name in (*folders, *names):
            path = Path(parent) / name
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise CheckpointError(
                    f"{path} is a symbolic link that leads out of the checkpoint. Replace it "
                    f"by what it stands for, if you trust it."
                )
        yield from (Path(parent) / name for name in names)


def _expanded(file: Path) -> int:
    """An upper bound on the bytes that a file's frames expand to, without expanding any."""
    if not file.stat().st_size:
        return 0
    total = 0
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = data.find(_ZSTD)
        while place >= 0:
            end, size = _frame(data, place)
            total += size
            place = data.find(_ZSTD, end)
    return total


def _frame(data: mmap.mmap, start: int) -> tuple[int, int]:
    """Where a zstd frame ends, and the most it can expand to (RFC 8878, section 3.1.1)."""
    descriptor = data[start + 4] if start + 4 < len(data) else 0
    single = descriptor >> 5 & 1
    dictionary, content = (0, 1, 2, 4)[descriptor & 3], (single, 2, 4, 8)[descriptor >> 6]
    place = start + 5 + (not single) + dictionary + content
    total, last = 0, False
    while not last and place + 3 <= len(data):
        block = int.from_bytes(data[place : place + 3], "little")
        last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == len(_ZSTD_KINDS) or size > _ZSTD_BLOCK:
            break
        total += _ZSTD_BLOCK if _ZSTD_KINDS[kind] == "compressed" else size
        place += 3 + (1 if _ZSTD_KINDS[kind] == "repeated" else size)
    return max(min(place, len(data)), start + 4), total


def _arrays(folder: Path, files: list[Path]) -> Iterator[Iterator[tuple[str, int]]]:
    for file in files:
        if file.name == _MANIFEST:
            store = _database(file.parent)
            keys = [key.decode("utf-8") for key in store.list().result()]
            wanted = [key for key in keys if key.rpartition("/")[2] in _ARRAY_FILES]
            reads = [(key, store.read(key)) for key in wanted]
            yield (_array(key, value.result().value) for key, value in reads)
        elif file.name in _ARRAY_FILES:
            yield iter([_array(str(file.relative_to(folder)), file.read_bytes())])


def _array(key: str, content: bytes) -> tuple[str, int]:
    """Name of an array and its bytes: of its shape, or of one chunk where that is larger."""
    facts: Any = json.loads(content)
    name = visible(key.rpartition("/")[0])[:200]
    if not isinstance(facts, dict):
        raise ValueError(f"{name} is no array")
    if facts.get("node_type") == "group":
        return name, 0
    grid = facts.get("chunk_grid") or {"configuration": {"chunk_shape": facts.get("chunks", [])}}
    shape, chunk = facts["shape"], grid["configuration"]["chunk_shape"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, *chunk)):
        raise ValueError(f"{name} has the shape {str(shape)[:120]}")
    foreign = sorted(_codec_names(facts) - _CODECS)
    if foreign or facts.get("filters"):
        raise CheckpointError(
            f"{name} is stored with the codec {visible((foreign or ['filter'])[0])[:60]}, "
            f"which Orbax does not write. Save the checkpoint anew."
        )
    dtype = str(facts.get("data_type", facts.get("dtype")))
    itemsize = _OTHER_ITEMSIZES.get(dtype) or np.dtype(dtype).itemsize
    return name, max(math.prod(shape), math.prod(chunk)) * itemsize


def _codec_names(facts: dict[str, Any]) -> set[str]:
    pending: list[Any] = [facts.get("codecs"), [facts.get("compressor")]]
    names: set[str] = set()
    while pending:
        value = pending.pop()
        for codec in value if isinstance(value, list) else []:
            if isinstance(codec, dict):
                names.add(str(codec.get("name", codec.get("id"))))
                settings = codec.get("configuration") or {}
                pending += [settings.get("codecs"), settings.get("index_codecs")]
    return names
