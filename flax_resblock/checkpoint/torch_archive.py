"""Reads files of torch.save without torch: zip archives, and the format before PyTorch 1.6.

Arrays are views of the mapped file.
"""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.limits import UNLIMITED, Limits, check_content
from flax_resblock.checkpoint.torch_calls import StorageReader
from flax_resblock.checkpoint.torch_pickle import TorchPickle, read_torch_pickle, stand_in
from flax_resblock.checkpoint.torch_stand_ins import Storage
from flax_resblock.checkpoint.zip_directory import ZIP_MAGIC, RecordPlace, read_record, records
from flax_resblock.errors import CheckpointError, visible

_PICKLE, _BYTE_ORDER, _ALIGNMENT = "data.pkl", "byteorder", ".storage_alignment"
_SERIALIZATION_ID = ".data/serialization_id"
"""Records of the zip archive: pickle, byte order, alignment of storages, PyTorch's own mark."""
_VERSION, _NEWEST = (".data/version", "version"), 10
"""Of the format: the records that have it, and the newest that PyTorch reads."""
_LONGEST_TEXT = 256
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first of the five pickles of an old file; elements of the storages follow them."""
_LEGACY_PICKLES, _LEGACY_CONTENT = 5, 3
_LEGACY_VERSION = 1001
_COUNT = struct.Struct("<q")
"""Before the elements of a storage of an old file: how many."""


def read_archive(path: Path, limits: Limits) -> TorchPickle:
    """The file's content; raises CheckpointError for any other file, a damaged one, one beyond the
    limits, or one that would execute code."""
    found = (_read_zip if is_zip(path) else _read_legacy)(path, limits)
    foreign = found.foreign

    def size(value: Any) -> int | None:
        nonlocal foreign
        foreign = foreign or stand_in(value)
        return value.nbytes if isinstance(value, np.ndarray) else None

    if found.foreign is None:
        check_content(found.content, limits, size, str(path))
    return replace(found, foreign=foreign)


def identity(path: Path) -> str:
    """PyTorch's own mark of an archive's content, damaged or not; empty for a file without one."""
    return _text_of(path, records(path, UNLIMITED), (_SERIALIZATION_ID,)) if is_zip(path) else ""


def is_zip(path: Path) -> bool:
    """Whether a file is a zip archive, and not of the format before PyTorch 1.6."""
    with path.open("rb") as handle:
        return handle.read(2) == ZIP_MAGIC[:2]


def _elements(path: Path, start: Callable[[Storage], int]) -> StorageReader:
    """Finds a storage's elements in the mapped file, from ``start``; unaligned ones are copied."""
    with path.open("rb") as handle:
        view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    @functools.cache
    def memory(storage: Storage) -> np.ndarray:
        elements = np.frombuffer(view, storage.dtype, storage.count, start(storage))
        return elements if elements.flags.aligned else elements.copy()

    return memory


def _read_zip(path: Path, limits: Limits) -> TorchPickle:
    places = records(path, limits)
    if _PICKLE not in places:
        raise CheckpointError(
            f"{path} is a damaged or truncated PyTorch zip archive (it has no {_PICKLE}), or "
            f"another kind of zip archive."
        )
    limits.check(path, "max_header_bytes", places[_PICKLE].size, "bytes of pickle")

    def start(storage: Storage) -> int:
        place = places.get(f"data/{storage.key}", RecordPlace(0, 0, 0))
        if place.size < storage.size:
            name = visible(storage.key)[:60]
            raise CheckpointError(
                f"{path} declares {storage.size:,} bytes for storage {name!r}, and has "
                f"{place.size:,}. It is damaged: copy or download it again."
            )
        return place.start

    data = read_record(path, places[_PICKLE])
    found = read_torch_pickle(data, limits, _elements(path, start), source=str(path))
    for storage in found.storages.values():
        start(storage)
    if _text_of(path, places, (_BYTE_ORDER,), "little") != "little":
        found.foreign = found.foreign or "numbers of another machine's byte order"
    if not _text_of(path, places, (_ALIGNMENT,), "64").strip().isdecimal():
        found.foreign = found.foreign or "an alignment that is no number"
    _text_of(path, places, (_SERIALIZATION_ID,))
    version = _text_of(path, places, _VERSION).strip()
    if not version.isdecimal() or not 0 < int(version) <= _NEWEST:
        found.foreign = found.foreign or f"version {version[:20] or 'none'} of the format"
    return found


def _text_of(
    path: Path, places: Mapping[str, RecordPlace], names: tuple[str, ...], default: str = ""
) -> str:
    """The text in the first of these records that is there."""
    place = next((places[name] for name in names if name in places), None)
    if place is None:
        return default
    if place.size > _LONGEST_TEXT:
        raise CheckpointError(
            f"{path} has {place.size:,} bytes in its record {names[0]!r}. It is damaged: copy "
            f"or download it again."
        )
    try:
        return read_record(path, place).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} has no text in its record {names[0]!r}. It is damaged: copy or download "
            f"it again."
        ) from error


def _read_legacy(path: Path, limits: Limits) -> TorchPickle:
    """Reads the content's pickle twice: only the last pickle tells where the elements are."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        data = handle.read(limits.header)
    parts: list[TorchPickle] = []
    for number in range(_LEGACY_PICKLES):
        if number and not data.startswith(_LEGACY):
            raise CheckpointError(
                f"{path} is no PyTorch checkpoint, or a damaged one: a pickle, but not one of "
                f"torch.save. Copy or download it again."
            )
        end = parts[-1].end if parts else 0
        if len(data) < size and end >= len(data):
            limits.check(path, "max_header_bytes", size, "bytes of pickles or more")
        parts.append(read_torch_pickle(data, limits, start=end, source=str(path), legacy=True))
    end, declared = parts[-1].end, parts[_LEGACY_CONTENT].storages
    total = sum(storage.size for storage in declared.values()) + _COUNT.size * len(declared)
    if total > size - end:
        raise CheckpointError(
            f"{path} declares {total:,} bytes of tensors, and has {size - end:,} for them. It "
            f"is truncated: copy or download it again."
        )
    _, version, machine, _, keys = (part.content for part in parts)
    if version != _LEGACY_VERSION:
        raise CheckpointError(
            f"{path} is of another version of PyTorch's old format than {_LEGACY_VERSION}, "
            f"which alone was written. It is damaged."
        )
    named = isinstance(keys, list) and all(isinstance(key, str | int) for key in keys)
    if not named or sorted(map(str, keys)) != sorted(declared):
        raise CheckpointError(
            f"{path} is damaged: its list of storages is not that of its tensors. Copy or "
            f"download it again."
        )
    starts: dict[str, int] = {}
    with path.open("rb") as handle:
        for key in map(str, keys):
            handle.seek(end)
            if _COUNT.unpack(handle.read(_COUNT.size)) != (declared[key].count,):
                raise CheckpointError(
                    f"{path} is damaged: the storage {visible(key)[:60]!r} is not as long as "
                    f"it should be. Copy or download it again."
                )
            starts[key] = end + _COUNT.size
            end = starts[key] + declared[key].size

    elements, start = _elements(path, lambda one: starts[one.key]), parts[_LEGACY_CONTENT - 1].end
    found = read_torch_pickle(data, limits, elements, start=start, source=str(path), legacy=True)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        found.foreign = found.foreign or "numbers of another machine's byte order"
    return found
