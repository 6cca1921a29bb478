"""The formats of checkpoints: what a file is, and what reads and writes it."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from flax_resblock.checkpoint.folders import (
    distributed_in,
    is_ported,
    msgpack_in,
    orbax_in,
    weights_in,
)
from flax_resblock.checkpoint.limits import Limits, check_files
from flax_resblock.checkpoint.record import Record
from flax_resblock.errors import CheckpointError, InputError
from flax_resblock.hub import is_name

FORMATS: Mapping[str, tuple[str, ...]] = {
    "pytorch": (".pt", ".pth", ".th", ".bin", ".ckpt"),
    "safetensors": (".safetensors",),
    "msgpack": (".msgpack",),
    "npz": (".npz",),
    "h5": (".h5", ".hdf5"),
    "orbax": ("",),
}
"""Output formats by file name suffix; a name without suffix is a folder."""


def output_format(path: Path) -> str:
    """The format that a file name asks for; raises InputError for other suffixes and hubs."""
    if is_name(path):
        raise InputError(
            f"{path} names a repository, and an output is a file or a folder. In Python, "
            f"flax_resblock.save(model, {str(path)!r}) pushes a model."
        )
    for name, suffixes in FORMATS.items():
        if path.suffix.lower() in suffixes:
            return name
    known = ", ".join(suffix for suffixes in FORMATS.values() for suffix in suffixes if suffix)
    raise InputError(
        f"{path}: the suffix {path.suffix!r} names no format. Use {known}, or a name without "
        f"suffix for an Orbax folder."
    )


def resolve(path: Path, limits: Limits) -> tuple[str, Path]:
    """Format and actual file, by content and not by name."""
    if (distributed := distributed_in(path)) is not None:
        return "distributed", distributed
    if path.is_dir():
        orbax = orbax_in(path)
        if orbax is not None:
            return "orbax", orbax
        weights = weights_in(path)
        if weights is not None:  # which a link may stand for: caches of downloads consist of them
            return resolve(weights, limits)
        if (newest := msgpack_in(path)) is not None:
            return resolve(newest, limits)
        if is_ported(path):
            raise CheckpointError(
                f"{path} is the folder of a network that `flax-resblock port` wrote. In Python, "
                f"import the class in it and call flax_resblock.load_ported({str(path)!r}, "
                f"Net); `flax-resblock convert {path} back.pth` returns the state dict of PyTorch; "
                f"`flax-resblock predict {path} IMAGE --model {path}/FILE.py:Net` predicts, and "
                f"`export` takes the same."
            )
        raise CheckpointError(
            f"{path} is a folder without a checkpoint: no Orbax metadata, no "
            f"model.safetensors. Give the checkpoint itself."
        )
    try:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist. Check the path.")
        check_files([path], limits, path)
        with path.open("rb") as handle:
            head = handle.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not head:
        raise CheckpointError(f"{path} is empty. The download or copy failed; get it again.")
    if path.name.endswith(".bin.index.json"):
        return "pytorch", path
    if _MAPPING.match(head) and any(head[4:8]):  # as a header, it would have gigabytes
        return "msgpack", path
    if path.name.endswith((".safetensors.index.json", ".safetensors")) or head[8:9] == b"{":
        return "safetensors", path
    if head.startswith(_HDF5):
        return "h5", path
    if head.startswith(_PICKLES):
        return "pickle", path
    if head.startswith(b"PK") and _is_npz(path):
        return "npz", path
    if head.startswith((b"PK", b"\x80")):
        return "pytorch", path
    raise CheckpointError(
        f"{path} is neither a PyTorch checkpoint (zip or pickle) nor safetensors, nor msgpack, "
        f"npz or HDF5 as JAX programs write them: it begins with {head!r}. Check that it is the "
        f"right file."
    )


def _is_npz(path: Path) -> bool:
    """Whether a zip archive holds arrays of numpy, and not a PyTorch checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist()[:1])
    except Exception:  # of zipfile, at damage of any kind
        return path.suffix == ".npz"


_PICKLES = tuple(bytes((0x80, protocol)) for protocol in (3, 4, 5))
"""How pickles of Python 3 begin; PyTorch writes protocol 2."""
_MAPPING = re.compile(rb"([\x81-\x8f]|\xde..|\xdf....)[\xa0-\xbf\xd9\xda]", re.DOTALL)
"""How msgpack begins with a mapping whose first key is text."""
_HDF5 = b"\x89HDF\r\n\x1a\n"
_CODE: Mapping[str, tuple[str, str, str]] = {
    "pytorch": ("torch_file", "read_torch", "write_torch"),
    "safetensors": ("safetensors_file", "read_safetensors", "write_safetensors"),
    "orbax": ("orbax_folder", "read_orbax", "write_orbax"),
    "msgpack": ("jax_files", "read_msgpack", "write_msgpack"),
    "npz": ("jax_files", "read_weights", "write_weights"),
    "h5": ("jax_files", "read_h5", "write_h5"),
    "pickle": ("array_pickle", "read_pickle", ""),
    "distributed": ("distributed_folder", "read_distributed", ""),
}
"""Module, reader and writer of each; imported when they are needed."""


def _code(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f"flax_resblock.checkpoint.{module}"), name)


def read_as(format_name: str, file: Path, entry: str | None, limits: Limits) -> Record:
    """Reads a file of a format; see :func:`flax_resblock.checkpoint.read`."""
    module, reader, _ = _CODE[format_name]
    entries = {"entry": entry} if format_name in ("pytorch", "safetensors", "distributed") else {}
    return _code(module, reader)(file, limits=limits, **entries)


def writer_of(format_name: str, files: Mapping[str, str] | None) -> Callable[..., None]:
    """What writes ``(path, tensors, metadata)`` in a format; with ``files``, a folder of a hub."""
    if files is not None:
        return partial(_code("safetensors_file", "write_hub_folder"), files=files)
    module, _, writer = _CODE[format_name]
    return _code(module, writer)
