"""The values of a PyTorch pickle, made without importing or calling anything that it names.

``torch.load(weights_only=True)`` refuses foreign code, but takes the sizes of storages for granted
and follows nesting without end. Here :mod:`~flax_resblock.checkpoint.inert_pickle` checks the
instructions first. A :class:`pickle.Unpickler` then finds our own functions behind the names that
a checkpoint may call: those that make containers, numbers and views of the file, and stand-ins for
what only PyTorch can make (devices, sparse tensors). Needs no torch.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from flax_resblock.checkpoint.inert_pickle import (
    PLAIN_OPCODES,
    PickleRules,
    RefusedError,
    check_pickle,
    one_error,
)
from flax_resblock.checkpoint.limits import Limits
from flax_resblock.checkpoint.torch_calls import (
    BY_TORCH,
    MADE,
    REFUSED,
    Callee,
    Context,
    StorageReader,
    needs,
)
from flax_resblock.checkpoint.torch_stand_ins import (
    FIELDS,
    HARM,
    LIST,
    LOG,
    Copies,
    DTypeStandIn,
    OnlyTorch,
    Storage,
    types,
)
from flax_resblock.errors import visible


@dataclass
class TorchPickle:
    """What a pickle holds: its value, with an array for each tensor and stand-ins for what numpy
    and Python have no values for; why that is meaningless, so that PyTorch has to read the file
    (None for nothing); every storage that it refers to, by key; and the offset of the first byte
    behind it."""

    content: Any = None
    foreign: str | None = None
    storages: dict[str, Storage] = field(default_factory=dict)
    end: int = 0


def read_torch_pickle(
    data: bytes,
    limits: Limits,
    elements: StorageReader | None = None,
    *,
    start: int = 0,
    source: str = "the pickle",
    legacy: bool = False,
) -> TorchPickle:
    """Reads the pickle that begins at ``start``.

    Args:
      elements: Finds the elements of a storage; None to make no tensors.
      legacy: Whether it is of the format before PyTorch 1.6, in which a storage may be a view of
        another.
    Raises:
      CheckpointError: Damaged, code, deeper than allowed, sizes beyond the limits, or a tensor
        beyond its storage.
    """
    with one_error(source, "PyTorch checkpoint"):
        checked = check_pickle(data, _RULES, limits, source, start)
        elements = None if checked.foreign else elements
        context = Context(limits, source, elements, Copies(limits, source))
        reader = _Unpickler(data[start : checked.end], context, 6 if legacy else 5)
        content = reader.load()
    return TorchPickle(content, checked.foreign, reader.storages, checked.end)


def stand_in(value: Any) -> str | None:
    """Describes a value that only stands for what PyTorch would make; None for any other."""
    if isinstance(value, OnlyTorch):
        return value.what
    if isinstance(value, Callee):
        return value.name
    if isinstance(value, Storage):
        return "a storage"
    return "a type" if isinstance(value, type | DTypeStandIn) else None


class _Unpickler(pickle.Unpickler):
    """Finds our own functions behind names, and notes the storages that the pickle refers to."""

    def __init__(self, data: bytes, context: Context, storage_items: int) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.context, self.storage_items = context, storage_items
        self.types = types(context.copies)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name in self.types:
            return self.types[name]
        if name not in MADE and name not in BY_TORCH and not name.startswith("torch."):
            raise RefusedError(needs(name))
        return Callee(name, self.context)

    def persistent_load(self, pid: Any) -> Any:
        """``('storage', type, key, location, number of elements)``; in old files with a view."""
        items: tuple[Any, ...] = pid if isinstance(pid, tuple) else ()
        if len(items) != self.storage_items or items[0] not in ("storage", b"storage"):
            raise RefusedError(f"refers to something that is no storage. {HARM}")
        _, named, key, _, count, *view = items
        if not isinstance(named, Callee):
            raise RefusedError(f"refers to something that is no storage. {HARM}")
        if not isinstance(key, str | int) or not isinstance(count, int):
            raise RefusedError(f"refers to a storage without a name or size. {HARM}")
        kind = named.name.rpartition(".")[2].removesuffix("Storage")
        dtype = _DTYPES.get(kind)
        itemsize = _ITEMSIZES.get(kind) if dtype is None else dtype.itemsize
        if itemsize is None or count < 0:
            raise RefusedError(
                f"has a storage {visible(str(key))[:60]!r} of {count} elements of type "
                f"{visible(named.name)[:60]!r}. It is damaged."
            )
        found = Storage(str(key), dtype, count, count * itemsize)
        if self.storages.setdefault(found.key, found) != found:
            raise RefusedError(
                f"refers to the storage {visible(found.key)[:60]!r} with two sizes or types. {HARM}"
            )
        return OnlyTorch("a view of a storage") if view not in ([], [None]) else found


_DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(code)
    for names, codes in (
        (("Double", "Float", "Half", "BFloat16"), ("f8", "f4", "f2", ml_dtypes.bfloat16)),
        (("Long", "Int", "Short", "Char", "Byte", "Bool"), ("i8", "i4", "i2", "i1", "u1", "?")),
        (("ComplexDouble", "ComplexFloat"), ("c16", "c8")),
    )
    for name, code in zip(names, codes, strict=True)
}
"""Type of the elements of a storage, by the first part of the name of its own type."""
_ITEMSIZES: Mapping[str, int] = {
    **dict.fromkeys(("Untyped", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1),
    "QInt32": 4,
}
"""Bytes of the elements that numpy has no type for."""
_RULES = PickleRules(
    opcodes=PLAIN_OPCODES | {"NEWOBJ", "BINPERSID"},
    stateful=BY_TORCH
    | {"argparse.Namespace", "collections.OrderedDict", "numpy.dtype"}
    | {"torch.nn.parameter.Parameter", LOG, LIST}
    | FIELDS,
    foreign_state=("torch._utils._rebuild_", "torch._tensor._rebuild_"),
    fillable=frozenset({"collections.OrderedDict", "collections.Counter"}),
    hashable=frozenset({"_codecs.encode", "torch.Size", "torch.torch_version.TorchVersion"}),
    refusal=f"torch.save does not write that unless it is told to. {REFUSED}",
    refusals={
        "torch.nn.modules.": f"It is a whole model, as torch.save(model) writes it, and not its "
        f"weights alone. {REFUSED} To go on with its run, save the state of its optimizer beside "
        f"that; docs/training-runs.md has the lines for Ultralytics."
    },
)
