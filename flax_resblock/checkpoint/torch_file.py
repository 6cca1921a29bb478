"""PyTorch's own files: zip archives, and the older format of pickles.

Files are read without torch (:mod:`flax_resblock.checkpoint.torch_archive`). Those that hold
something only PyTorch can make, such as a sparse tensor or a device, are then opened by PyTorch,
with ``weights_only=True``. Nothing in a file is executed; see docs/security.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from flax_resblock.checkpoint import record, torch_archive
from flax_resblock.checkpoint.folders import ZERO_MODEL, shards
from flax_resblock.checkpoint.limits import LIMITS, Limits, check_content, check_files
from flax_resblock.checkpoint.record import DIGESTS, METADATA_DIGEST, Record, Sidecar, digests
from flax_resblock.checkpoint.torch_calls import needs
from flax_resblock.checkpoint.unwrap import unwrap
from flax_resblock.checkpoint.zero_writing import shard_names, taken_apart
from flax_resblock.errors import CheckpointError, MissingDependencyError, damaged, some, visible

if TYPE_CHECKING:
    import torch

_AS_BITS = {"bfloat16": ("int16", ml_dtypes.bfloat16)}
"""Dtypes that torch and numpy exchange as bits: torch's name, the integer type, numpy's type."""


def import_torch(what: str = "This") -> Any:
    """The torch module; raises MissingDependencyError where it is absent, as ``what`` needs it."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs PyTorch, which is not installed: pip install 'flax-resblock[torch]'. "
            "Without it, PyTorch files of tensors, numbers and text can be read, .safetensors "
            "and Orbax checkpoints read and written."
        ) from error
    return torch


def to_numpy(tensor: torch.Tensor | np.ndarray, name: str = "tensor") -> np.ndarray:
    """The tensor's bits as a numpy array, sharing memory on the CPU; what is one already stays.
    Raises CheckpointError for a sparse, quantised or meta tensor, or a dtype that numpy lacks."""
    if isinstance(tensor, np.ndarray):
        return tensor
    torch = import_torch()
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        dense = "empty (meta)" if tensor.is_meta else "sparse"
        kind = "quantised" if tensor.is_quantized else dense
        raise CheckpointError(f"{name} is a {kind} tensor. Save the model with dense weights.")
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype in _AS_BITS:
        bits, numpy_dtype = _AS_BITS[dtype]
        return tensor.view(getattr(torch, bits)).numpy().view(numpy_dtype)
    try:
        return tensor.numpy()
    except TypeError as error:
        raise CheckpointError(
            f"{name} has dtype {dtype}, which this library does not convert."
        ) from error


def _mapped(leaf: Callable[[Any], Any], value: Any) -> Any:
    """The same containers with ``leaf`` applied to everything else in them."""
    if isinstance(value, Counter):
        return value  # of numbers; torch's MultiStepLR wants the type
    if isinstance(value, Mapping):
        return {key: _mapped(leaf, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_mapped(leaf, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return leaf(value)


def plain(value: Any) -> Any:
    """The same containers and values with every tensor as a numpy array."""
    return _mapped(lambda leaf: to_numpy(leaf) if _is_tensor(leaf) else leaf, value)


def with_tensors(value: Any) -> Any:
    """The inverse of :func:`plain`: every numpy array as a tensor."""
    return _mapped(lambda leaf: from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, value)


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """A tensor with the array's bits, sharing memory where the array is contiguous."""
    torch = import_torch()
    array = np.asarray(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for dtype, (bits, numpy_dtype) in _AS_BITS.items():
            if array.dtype == numpy_dtype:
                return torch.from_numpy(array.view(bits)).view(getattr(torch, dtype))
        return torch.from_numpy(array)


def state_to_numpy(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor of a state dict as a numpy array."""
    return {key: to_numpy(value, key) for key, value in state.items()}


def _is_tensor(value: Any) -> bool:
    """Of PyTorch, which then is imported already, or an array that stands for one."""
    torch = sys.modules.get("torch")
    return isinstance(value, np.ndarray) or (torch is not None and torch.is_tensor(value))


def _harmless(torch: Any) -> list[Any]:
    """Types without behaviour that training scripts store beside the weights."""
    types: list[Any] = [argparse.Namespace, np.dtype, torch.torch_version.TorchVersion]
    types += [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    types += [
        (type(np.float64(0)).__reduce__(np.float64(0))[0], f"numpy.{module}.multiarray.scalar")
        for module in ("core", "_core")
    ]
    return types


def load_torch(path: Path, limits: Limits = LIMITS) -> Any:
    """The content of a file of ``torch.save``, with a memory-mapped numpy array for each tensor;
    where it holds something that only PyTorch can make, PyTorch reads it, with tensors on the CPU.

    Raises:
      CheckpointError: Not such a file, damaged, beyond the limits, or one that would execute code.
      MissingDependencyError: It needs PyTorch, which is not installed.
    """
    check_files([path], limits, path)
    found = torch_archive.read_archive(path, limits)
    return found.content if found.foreign is None else _load_by_torch(path, found.foreign, limits)


def _load_by_torch(path: Path, foreign: str, limits: Limits) -> Any:
    """The same with ``torch.load``, once the file is known to call only what checkpoints need."""
    torch = import_torch(f"{path} holds {visible(foreign)[:160]}, which")
    zipped, what = torch_archive.is_zip(path), "no PyTorch checkpoint, or a damaged one"
    what = "a damaged or truncated PyTorch zip archive" if zipped else what
    allowed = torch.serialization.safe_globals(_harmless(torch))
    damage = damaged(f"{path} is {what}", "Copy or download it again.", passing=MemoryError)
    with damage, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with allowed:
                content = torch.load(path, "cpu", weights_only=True, mmap=zipped)
        except UnpicklingError as error:
            blocked = re.search(r"\bGLOBAL:? (\S+)", str(error))
            if blocked:
                raise CheckpointError(f"{path} {needs(blocked[1])}") from error
            raise CheckpointError(
                f"{path} is no PyTorch checkpoint, or a damaged one: its pickle cannot be read "
                "without executing code, which loading never does. Copy or download it again."
            ) from error

    def size(value: Any) -> int | None:
        return value.numel() * value.element_size() if torch.is_tensor(value) else None

    check_content(content, limits, size, str(path))
    return content


def read_torch(path: Path, *, entry: str | None = None, limits: Limits = LIMITS) -> Record:
    """Reads a ``.pt``, ``.pth``, ``.th`` or ``.bin`` file, or all that a ``.bin.index.json`` names;
    errors as for :func:`load_torch`.

    What lies beside the state dict is held against its digests here.
    """
    content = _sharded(path, limits) if path.suffix == ".json" else load_torch(path, limits)
    state, extras, notes, names = unwrap(
        content, is_tensor=_is_tensor, source=str(path), entry=entry
    )
    tensors = state_to_numpy(state)
    written = {names[name]: value for name, value in tensors.items()}
    metadata = _recorded(path, written, extras, notes, entry)
    return Record(str(path), "pytorch", tensors, metadata, tuple(notes), extras, names)


def _sharded(index: Path, limits: Limits) -> dict[str, Any]:
    """The state dicts of all shards together."""
    files = shards(index, limits)
    check_files(files, limits, index)
    found: dict[str, Any] = {}
    for file in files:
        content = load_torch(file, limits)
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{file}, which {index.name} names, is no state dict but a "
                f"{type(content).__name__}. Copy the folder again."
            )
        repeated = found.keys() & content.keys()
        if repeated:
            raise CheckpointError(
                f"{index}: {some(sorted(map(str, repeated)))} in two shards; which one counts "
                f"would depend on the reader. Copy the folder again."
            )
        found |= content
    return found


def _recorded(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    extras: Mapping[str, Any],
    notes: list[str],
    entry: str | None,
) -> dict[str, str]:
    """Metadata with the SHA-256 of the tensors, where they lie beside the file and belong to it."""
    found = record.read_sidecar(path)
    if found is None or entry is not None:
        return {}
    place = record.sidecar_of(path)
    if found.identity != torch_archive.identity(path):
        if digests(tensors) != found.tensors:
            notes.append(
                f"not held against {place.name}, which describes another file: {path.name} was "
                f"written later, by something else. Remove it"
            )
        return {}
    if found.extras or found.rest:
        arrays, rest = record.digests_of_extras(plain(extras))
        changed = [name for name, sha in found.extras.items() if arrays.get(name) != sha]
        if changed or arrays.keys() - found.extras.keys() or rest != found.rest:
            what = some(changed) if changed else "what lies beside the weights"
            raise CheckpointError(
                f"{path} is damaged: {what} differs from the SHA-256 recorded when it was "
                f"written. Copy it again."
            )
    return {**found.metadata, DIGESTS: json.dumps(found.tensors)}


VERSIONS = "module_versions"
"""Metadata: a JSON object of the versions with which classes of the user's own mark their state
dicts, by the module's name; ``load_state_dict`` shows them to these classes."""


def write_torch(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    extras: Mapping[str, Any] | None = None,
) -> None:
    """Writes a state dict that ``model.load_state_dict(torch.load(path, weights_only=True))``
    accepts, and in a file beside it the metadata and the SHA-256 of everything.

    With ``extras``, the entries of a training checkpoint, the state dict is the entry ``"model"``
    beside them; in a file of DeepSpeed's, by its name, as DeepSpeed has them. The entry
    :data:`VERSIONS` of the metadata becomes a part of it."""
    torch = import_torch()
    state: Any = OrderedDict((key, from_numpy(value)) for key, value in tensors.items())
    if VERSIONS in metadata:
        versions = json.loads(metadata[VERSIONS])
        state._metadata = OrderedDict((path, {"version": n}) for path, n in versions.items())
    name = "model"
    if extras is not None and path.name == ZERO_MODEL:
        name, beside = "module", shard_names(path, extras)
        extras, parts = taken_apart(tensors, extras)
        for shard, content in zip(beside, parts, strict=True):
            torch.save(with_tensors(content), path.with_name(shard))
    torch.save(state if extras is None else {name: state, **with_tensors(extras)}, path)
    recorded = json.loads(metadata[DIGESTS]) if DIGESTS in metadata else digests(tensors)
    beside = ({}, "") if extras is None else record.digests_of_extras(extras)
    kept = {name: text for name, text in metadata.items() if name not in (DIGESTS, METADATA_DIGEST)}
    identity, digest = torch_archive.identity(path), record.metadata_digest(kept)
    record.write_sidecar(path, Sidecar(identity, recorded, *beside, kept, digest))
