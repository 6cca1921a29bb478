"""The content of a checkpoint in any format, and the digests that find damage in it.

A ``.pth`` has no place for digests; they lie in the file ``NAME.pth.sha256.json`` beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.parallel import on_every_core
from flax_resblock.errors import CheckpointError, InputError, reason

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
      names: Of the tensors in the file, where prefixes were removed.
    """

    source: str
    format: str
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def as_named(self) -> dict[str, np.ndarray]:
        """The tensors by their names in the file."""
        return {self.names.get(name, name): value for name, value in self.tensors.items()}


def digest(array: np.ndarray) -> str:
    """SHA-256 of dtype, shape and bits of an array, in hexadecimal."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    sha = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode())
    sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def digests(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """:func:`digest` of every array."""
    found = on_every_core(digest, list(tensors.values()), lambda array: array.nbytes)
    return dict(zip(tensors, found, strict=True))


def arrays_in(value: Any, name: str = "") -> dict[str, np.ndarray]:
    """Every array in nested mappings and lists, by the path that leads to it."""
    if isinstance(value, np.ndarray):
        return {name: value}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    inner = (arrays_in(item, f"{name}/{key}") for key, item in items)
    return {path: array for arrays in inner for path, array in arrays.items()}


def metadata_digest(metadata: Mapping[str, str]) -> str:
    """SHA-256 of all entries but :data:`METADATA_DIGEST`."""
    others = {key: value for key, value in metadata.items() if key != METADATA_DIGEST}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


SIDECAR_SUFFIX = ".sha256.json"
_SIDECAR_KIND = "flax-resblock digests"
_LARGEST_SIDECAR = 64 << 20


@dataclass(frozen=True)
class Sidecar:
    """What lies beside a ``.pth``: its digests at the time it was written, and its metadata.

    Attributes:
      identity: PyTorch's own mark of that file. A file that another program wrote later under the
        same name has another mark; a damaged file keeps it.
      extras: SHA-256 of every tensor beside the state dict, by the path that leads to it.
      rest: SHA-256 of the other values beside the state dict: learning rates, counters.
      metadata: What the file itself has no place for: the configuration, eps and momentum.
    """

    identity: str
    tensors: dict[str, str]
    extras: dict[str, str] = field(default_factory=dict)
    rest: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    metadata_sha256: str = ""


def sidecar_of(path: Path) -> Path:
    """The path of a file's digests."""
    return path.with_name(path.name + SIDECAR_SUFFIX)


def digests_of_extras(extras: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Digests of the arrays in ``extras``, and of everything else there."""
    rest = repr(_without_arrays(extras)).encode("utf-8", "backslashreplace")
    return digests(arrays_in(extras)), hashlib.sha256(rest).hexdigest()


def _without_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(_without_arrays, value)]
    return None if hasattr(value, "tobytes") and getattr(value, "ndim", 0) else value


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Writes the digests of the file at ``path``."""
    sidecar_of(path).write_text(
        json.dumps({"kind": _SIDECAR_KIND, **asdict(sidecar)}, indent=1) + "\n", encoding="utf-8"
    )


def read_sidecar(path: Path) -> Sidecar | None:
    """The digests of a file, None where there are none; raises CheckpointError for damaged ones."""
    place = sidecar_of(path)
    if not place.is_file():
        return None
    try:
        if place.stat().st_size > _LARGEST_SIDECAR:
            raise ValueError("it is too large")
        content = json.loads(place.read_text(encoding="utf-8"))
        if content.pop("kind") != _SIDECAR_KIND:
            raise ValueError("it is of another kind")
        found = Sidecar(**content)
        flat = [*found.tensors.items(), *found.extras.items(), *found.metadata.items()]
        flat.append((found.identity, found.rest))
        if not all(isinstance(name, str) and isinstance(sha, str) for name, sha in flat):
            raise ValueError("its digests are no text")
        if found.metadata and metadata_digest(found.metadata) != found.metadata_sha256:
            raise ValueError("its metadata differs from the SHA-256 recorded with it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{place} should hold the SHA-256 of the tensors in {path.name}, and cannot be "
            f"read ({reason(error)[:120]}). It is damaged: remove it to read "
            f"{path.name} without that check, or copy both again."
        ) from error
    return found


def refuse_foreign_sidecar(path: Path) -> None:
    """Raises InputError where the digests of ``path`` would replace a file of another kind."""
    place = sidecar_of(path)
    if not os.path.lexists(place):
        return
    try:
        content = json.loads(place.read_bytes())
        ours = isinstance(content, dict) and content.get("kind") == _SIDECAR_KIND
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise InputError(
            f"{place} exists and is something else; the SHA-256 of the tensors in {path.name} "
            f"go there. Move it, or choose another name."
        )
