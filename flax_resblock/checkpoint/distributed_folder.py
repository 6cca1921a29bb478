"""Folders of ``torch.distributed.checkpoint``: ``.metadata``, and shards ``__0_0.distcp``.

``.metadata`` is a pickle. It says where each piece of each tensor is, and each piece is a small
file of ``torch.save`` inside a shard. PyTorch reads both with an unpickler that runs code. Here the
pickle is read with stand-ins for the few classes that it may name, and the pieces like any other
file of ``torch.save``. Needs no torch.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from flax_resblock.checkpoint import torch_file
from flax_resblock.checkpoint.folders import DISTRIBUTED_PLAN
from flax_resblock.checkpoint.inert_pickle import (
    PLAIN_OPCODES,
    PickleRules,
    RefusedError,
    check_pickle,
    refused,
)
from flax_resblock.checkpoint.limits import Limits, array_bytes, check_content, check_files
from flax_resblock.checkpoint.record import Record, arrays_in
from flax_resblock.checkpoint.torch_calls import needs
from flax_resblock.checkpoint.unwrap import unwrap
from flax_resblock.errors import CheckpointError, damaged, visible

_METADATA = "torch.distributed.checkpoint.metadata."
_INDEX, _TENSOR = f"{_METADATA}MetadataIndex", f"{_METADATA}TensorStorageMetadata"
_CLASSES = (
    *(_INDEX, _TENSOR),
    *(f"{_METADATA}{name}" for name in ("Metadata", "TensorProperties", "StorageMeta")),
    *(f"{_METADATA}{name}" for name in ("BytesStorageMetadata", "ChunkStorageMetadata")),
    *(f"{_METADATA}_MEM_FORMAT_ENCODING", "torch.distributed.checkpoint.filesystem._StorageInfo"),
    *("torch.Size", "torch.serialization._get_layout"),
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath")),
    *(f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath")),
)
"""What a plan may name, beside dtypes."""
_DTYPES = tuple(
    f"torch.{name}"
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"),
    )
)
_RULES = PickleRules(
    opcodes=PLAIN_OPCODES
    | {"FRAME", "MEMOIZE", "STACK_GLOBAL", "SHORT_BINUNICODE", "BINBYTES", "NEWOBJ"},
    stateful=frozenset(_CLASSES),
    hashable=frozenset({_INDEX}),
    refusal="torch.distributed.checkpoint does not write that. It is damaged, or made to do harm; "
    "nothing was run.",
)


class _Made:
    """In place of an object of a plan: its arguments and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, None

    def __new__(cls, *arguments: Any) -> _Made:
        made = super().__new__(cls)
        made.__init__(*arguments)
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """An attribute; None where it has none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Unpickler(pickle.Unpickler):
    """Finds our own classes behind names."""

    kinds: Mapping[str, type] = {name: type(name, (_Made,), {}) for name in _CLASSES}

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name in _DTYPES:
            return name.removeprefix("torch.")
        if name not in self.kinds:
            raise RefusedError(needs(name))
        return self.kinds[name]


class _Piece(NamedTuple):
    """Where a part of an entry is: its offset in its tensor (None for an entry that is no tensor),
    the name of the shard, and start and length in bytes of a file of ``torch.save`` in it."""

    offset: tuple[int, ...] | None
    file: str
    start: int
    length: int


def _sizes(value: Any) -> tuple[int, ...]:
    """The numbers of a ``torch.Size``."""
    (numbers,) = value.arguments
    if not isinstance(numbers, tuple) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a size in it is not of whole numbers")
    return numbers


def _plan(path: Path, limits: Limits) -> _Made:
    """The content of ``.metadata``."""
    limits.check(path, "max_header_bytes", path.stat().st_size, "bytes of pickle")
    data = path.read_bytes()
    end = check_pickle(data, _RULES, limits, str(path)).end
    return _Unpickler(io.BytesIO(data[:end])).load()


def _pieces(plan: _Made, folder: Path, limits: Limits) -> dict[str, list[_Piece]]:
    """The pieces of every entry, each within the file that it names."""
    found: dict[str, list[_Piece]] = {name: [] for name in plan.get("state_dict_metadata")}
    limits.check(folder, "max_tensors", len(plan.get("storage_data")), "tensors and values")
    total = 0
    for index, place in plan.get("storage_data").items():
        offset, file = index.get("offset"), place.get("relative_path")
        start, length = place.get("offset"), place.get("length")
        if not isinstance(file, str) or Path(file).name != file or visible(file) != file:
            raise RefusedError(
                f"names the shard {visible(str(file))[:120]!r}, which is no plain name of a file "
                "in its folder."
            )
        if place.get("transform_descriptors"):
            raise RefusedError(
                "has shards that were compressed or encrypted by an extension of the program. Save "
                "it without."
            )
        if not all(type(n) is int and n >= 0 for n in (start, length)):
            raise ValueError("a place in it is no number")
        total += length
        piece = _Piece(None if offset is None else _sizes(offset), file, start, length)
        found[index.get("fqn")].append(piece)
    limits.check(folder, "max_bytes", total, "bytes of tensors and values")
    files = sorted({piece.file for pieces in found.values() for piece in pieces})
    for name in files:
        if not (folder / name).is_file():
            raise RefusedError(f"names the shard {name}, which is not there. Copy all shards.")
    check_files([folder / name for name in files], limits, folder)
    return found


def _values(
    plan: _Made, pieces: Mapping[str, list[_Piece]], folder: Path, limits: Limits
) -> Iterator[tuple[str, Any]]:
    """Name and value of every entry, tensors put together."""
    total = 0
    with TemporaryDirectory(prefix="flax-resblock-") as temporary:
        for name, about in plan.get("state_dict_metadata").items():
            values = []
            for piece in pieces[name]:
                mapped = _content(piece, name, folder, Path(temporary), limits)
                total += sum(array.nbytes for array in arrays_in(mapped).values())
                limits.check(folder, "max_bytes", total, "bytes of tensors")
                values.append(copy.deepcopy(mapped))  # the file that is mapped ends here
            if isinstance(about, _Unpickler.kinds[_TENSOR]):
                shape, dtype = _sizes(about.get("size")), str(about.get("properties").state[0])
                yield name, _together(name, shape, dtype, pieces[name], values)
            else:
                (value,) = values
                yield name, value


def _content(piece: _Piece, name: str, folder: Path, temporary: Path, limits: Limits) -> Any:
    """What a piece holds; arrays are views of a file in ``temporary`` that has no name any more."""
    file, where = temporary / "piece", f"{folder / piece.file}, at its entry {visible(name)[:120]},"
    with (folder / piece.file).open("rb") as shard:
        shard.seek(piece.start)
        file.write_bytes(shard.read(piece.length))
    try:
        return torch_file.plain(torch_file.load_torch(file, limits))
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(file), where)) from error
    finally:
        file.unlink()


def _together(
    name: str, shape: tuple[int, ...], dtype: str, pieces: list[_Piece], parts: list[np.ndarray]
) -> np.ndarray:
    """A tensor of its parts, which must cover it once."""
    sizes = sum(part.size for part in parts)
    if sizes != math.prod(shape) or {part.dtype.name for part in parts} != {dtype}:
        raise ValueError(f"the parts of {visible(name)[:120]} are not those of one tensor")
    if len(parts) == 1:
        return parts[0].reshape(shape)
    whole, covered = np.empty(shape, parts[0].dtype), np.zeros(shape, bool)
    for piece, part in zip(pieces, parts, strict=True):
        starts = piece.offset or ()
        region = tuple(slice(n, n + size) for n, size in zip(starts, part.shape, strict=True))
        if covered[region].shape != part.shape or covered[region].any():
            raise ValueError(f"the parts of {visible(name)[:120]} do not fit together")
        whole[region], covered[region] = part, True
    return whole


def _placed(content: dict[str, Any], path: tuple[Any, ...], value: Any, most: int) -> None:
    """Puts a value where it was in nested dictionaries and lists."""
    here: Any = content
    for key, inner in zip(path, (*path[1:], None), strict=True):
        if isinstance(here, list):
            if type(key) is not int or not 0 <= key < most:
                raise ValueError("a place in a list is no number")
            here.extend([None] * (key + 1 - len(here)))
            found = here[key]
        else:
            found = here.get(key)
        if inner is None:
            here[key] = value
        else:
            if found is None:
                found = here[key] = [] if isinstance(inner, int) else {}
            here = found


def read_distributed(folder: Path, *, entry: str | None = None, limits: Limits) -> Record:
    """Reads a folder; errors as for :func:`read_content`."""
    source = str(folder)
    content = read_content(folder, limits)
    state, extras, notes, names = unwrap(
        content, is_tensor=lambda one: isinstance(one, np.ndarray), source=source, entry=entry
    )
    return Record(source, "distributed", state, {}, tuple(notes), extras, names)


def read_content(folder: Path, limits: Limits) -> dict[str, Any]:
    """What was saved in a folder.

    Raises:
      CheckpointError: Damaged, beyond the limits, code, or shards that are not there.
      MissingDependencyError: It holds something that only PyTorch, which is absent, can make.
    """
    source, place = str(folder), folder / DISTRIBUTED_PLAN
    content: dict[str, Any] = {}
    words = f"{place} is no plan of torch.distributed.checkpoint, or a damaged one"
    with damaged(words, "Copy the folder again.", passing=MemoryError), refused(place):
        check_files([place], limits, place)
        plan = _plan(place, limits)
        pieces = _pieces(plan, folder, limits)
        paths = plan.get("planner_data") or {}
        for name, value in _values(plan, pieces, folder, limits):
            path = tuple(paths.get(name, (name,)))
            limits.check(place, "max_nesting", len(path), "levels of nesting")
            _placed(content, path, value, len(pieces))
    check_content(content, limits, array_bytes, source)
    return content
