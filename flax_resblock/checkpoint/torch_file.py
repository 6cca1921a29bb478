"""PyTorch's own files (zip and legacy pickle). With :mod:`flax_resblock.parity` the only place that imports torch.

Files are always opened with ``weights_only=True``: nothing in them is executed, whatever they hold.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from flax_resblock.checkpoint.model_folder import shards
from flax_resblock.checkpoint.record import Record
from flax_resblock.checkpoint.unwrap import unwrap
from flax_resblock.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    import torch

_AS_BITS = {"bfloat16": ("int16", ml_dtypes.bfloat16)}
"""Dtypes that torch and numpy exchange as bits: torch's name, the integer type, numpy's type."""


def import_torch() -> Any:
    """The torch module.

    Raises:
      MissingDependencyError: It is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            "This needs PyTorch, which is not installed: pip install 'flax-resblock[torch]'. "
            "Without it, .safetensors and Orbax checkpoints can be read and written."
        ) from error
    return torch


def to_numpy(tensor: torch.Tensor, name: str = "tensor") -> np.ndarray:
    """The tensor's bits as a numpy array, sharing memory on the CPU.

    Raises:
      CheckpointError: A sparse, quantised or meta tensor, or a dtype without a numpy counterpart.
    """
    torch = import_torch()
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantised" if tensor.is_quantized else "empty (meta)" if tensor.is_meta else "sparse"
        raise CheckpointError(f"{name} is a {kind} tensor. Save the model with dense weights.")
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype in _AS_BITS:
        bits, numpy_dtype = _AS_BITS[dtype]
        return tensor.view(getattr(torch, bits)).numpy().view(numpy_dtype)
    try:
        return tensor.numpy()
    except TypeError as error:
        raise CheckpointError(f"{name} has dtype {dtype}, which this library does not convert.") from error


def _mapped(leaf: Callable[[Any], Any], value: Any) -> Any:
    """The same containers with ``leaf`` of everything in them that is none."""
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
    is_tensor = import_torch().is_tensor
    return _mapped(lambda leaf: to_numpy(leaf) if is_tensor(leaf) else leaf, value)


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


def _harmless(torch: Any) -> list[Any]:
    """Types without behaviour that training scripts store beside the weights."""
    types: list[Any] = [argparse.Namespace, np.dtype, torch.torch_version.TorchVersion]
    types += [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    types += [(type(np.float64(0)).__reduce__(np.float64(0))[0], f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")]
    return types


def load(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU, memory-mapped where the file is a zip archive.

    Raises:
      CheckpointError: Not such a file, damaged, or one that would execute code.
    """
    torch = import_torch()
    is_zip = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_harmless(torch)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError as error:
        blocked = re.search(r"\bGLOBAL:? (\S+)", str(error))
        if blocked:
            raise CheckpointError(
                f"{path} needs {blocked[1]} to be imported and run to open it. Loading never executes code, so it was refused. "
                "If you trust the file, open it in PyTorch yourself and save model.state_dict()."
            ) from error
        raise CheckpointError(
            f"{path} is no PyTorch checkpoint, or a damaged one: its pickle cannot be read without executing code, which loading never does. "
            "Copy or download it again."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises whatever its parsers meet: RuntimeError, EOFError, KeyError, struct.error ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = "a damaged or truncated PyTorch zip archive" if path.read_bytes()[:2] == b"PK" else "no PyTorch checkpoint, or a damaged one"
        raise CheckpointError(f"{path} is {what} ({reason[:160]}). Copy or download it again.") from error


def read(path: Path, *, entry: str | None = None) -> Record:
    """Reads a ``.pt``, ``.pth``, ``.th`` or ``.bin`` file, or all that a ``.bin.index.json`` names; errors as for :func:`load`."""
    content = {key: value for shard in shards(path) for key, value in load(shard).items()} if path.suffix == ".json" else load(path)
    state, extras, notes = unwrap(content, is_tensor=import_torch().is_tensor, source=str(path), entry=entry)
    return Record(str(path), "pytorch", state_to_numpy(state), {}, tuple(notes), extras)


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], extras: Mapping[str, Any] | None = None) -> None:
    """Writes a state dict that ``model.load_state_dict(torch.load(path, weights_only=True))`` accepts. ``metadata`` has no place in it.

    With ``extras``, the entries of a training checkpoint, the state dict is the entry ``"model"`` beside them.
    """
    torch = import_torch()
    state = OrderedDict((key, from_numpy(value)) for key, value in tensors.items())
    torch.save(state if extras is None else {"model": state, **with_tensors(extras)}, path)
