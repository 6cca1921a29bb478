"""The folder of a ported network: its source, weights, table and certificate.

Needs no torch, and runs no code of the folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from flax import nnx

from flax_resblock import checkpoint
from flax_resblock.checkpoint import LIMITS, Limits
from flax_resblock.checkpoint.folders import PORTED
from flax_resblock.checkpoint.safetensors_file import read_safetensors, write_safetensors
from flax_resblock.config import Path
from flax_resblock.errors import InputError
from flax_resblock.nn.variables import PORTED_FROM, flat_arrays
from flax_resblock.parity.certificate import KIND, NAME, SCHEMA, hashes, versions
from flax_resblock.port.network import PortedNetwork, Table, filled

TABLE, WEIGHTS = PORTED
TABLE_KIND = "flax-resblock ported network"
UNUSED = "unused."
"""Begins the names of tensors that the forward pass never uses; the rest is their PyTorch key."""

PACKAGES = ("jax", "flax", "numpy", "safetensors", "torch")


@dataclass(frozen=True)
class PortedWeights:
    """The weights in the folder of a ported network.

    Attributes:
      table: Between the state dict and the Flax model.
      values: By attribute path.
      unused: Tensors that the forward pass never uses, by their PyTorch keys.
      about: What ``port.json`` says besides: ``network``, ``file``, ``image_size``, ``channels``,
        ``slots``, ``inputs``.
    """

    table: Table
    values: Mapping[Path, np.ndarray]
    unused: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state dict of PyTorch."""
        return self.table.to_torch(self.values, self.unused)

    def description(self) -> PortedNetwork:
        """What a model of the folder's class knows about itself: neither weights nor source."""
        about = self.about
        slots = {name: tuple(path) for name, path in about.get("slots", {}).items()}
        name, size = str(about["network"]), tuple(about["image_size"])
        inputs = tuple(tuple(shape) for shape in about.get("inputs", ()))
        return PortedNetwork(
            "", name, self.table, {}, self.unused, name, size, about["channels"], slots, inputs
        )

    def create(self, network: Callable[..., nnx.Module]) -> nnx.Module:
        """A network of this class with these weights, in evaluation mode."""
        model = filled(network, self.values)
        setattr(model, PORTED_FROM, self.description())
        return model


def save_ported(
    ported: PortedNetwork,
    folder: FilePath,
    *,
    stem: str,
    source: Mapping[str, Any] | None = None,
    module: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Writes ``STEM.py``, ``weights.safetensors``, ``port.json`` and ``parity.json``.

    Args:
      ported: The network.
      folder: Complete or not there at all.
      stem: Of the name of the Python file.
      source: The checkpoint that the weights came from: ``path``, ``sha256``.
      module: The code that they belong to: ``spec``, ``sha256``.
      force: Replace the folder of another ported network.
    Raises:
      InputError: The folder exists.
      OutputError: It cannot be written.
    """
    names = {".".join(map(str, path)): value for path, value in ported.values.items()}
    names |= {f"{UNUSED}{key}": value for key, value in ported.unused.items()}
    tensors = {name: np.asarray(value) for name, value in names.items()}
    about = {
        "kind": TABLE_KIND,
        "schema": 1,
        "network": ported.name,
        "file": f"{stem}.py",
        "image_size": list(ported.image_size),
        "channels": ported.channels,
        "inputs": [list(shape) for shape in ported.inputs],
        "slots": {name: list(path) for name, path in ported.slots.items()},
        "tensors": ported.table.rows(),
    }
    with checkpoint.replacing(folder, force=force, replaceable=checkpoint.is_ported) as temporary:
        temporary.mkdir()
        (temporary / f"{stem}.py").write_text(ported.source, encoding="utf-8")
        write_safetensors(temporary / WEIGHTS, tensors, {"format": "flax"})
        (temporary / TABLE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        entries = {
            WEIGHTS: _entry(ported, temporary / WEIGHTS, tensors, source, module),
            f"{stem}.py": _entry(ported, temporary / f"{stem}.py", {}, source, module),
        }
        content = {"schema": SCHEMA, "kind": KIND, "outputs": entries}
        (temporary / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save_model(
    ported: PortedNetwork, model: nnx.Module, path: FilePath, *, force: bool = False
) -> None:
    """Writes a ported model with the weights that it has now.

    Args:
      ported: What it was ported from.
      path: A folder, for the code and the weights, or a file with one of the suffixes of a
        checkpoint, for the state dict of PyTorch alone.
      force: Replace what is there.
    """
    if not ported.source and checkpoint.output_format(path) == "orbax":
        raise InputError(
            "This model was loaded from the folder of a port, whose code you import, and only its "
            "weights are known here. Save its state dict, as .pth or .safetensors, or keep the "
            "folder and save nnx.state(model)."
        )
    if checkpoint.output_format(path) != "orbax":
        checkpoint.write(path, ported.to_torch(model), force=force)
        return
    arrays = flat_arrays(model)
    values = {one.path: arrays[one.path] for one in ported.table.tensors if one.path is not None}
    checkpoint.refuse_existing(path, force, checkpoint.is_ported)
    save_ported(replace(ported, values=values), path, stem=ported.name.lower(), force=force)


def _entry(
    ported: PortedNetwork,
    file: FilePath,
    tensors: Mapping[str, np.ndarray],
    source: Mapping[str, Any] | None,
    module: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Of the certificate."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {**(source or {}), "module": dict(module or {"spec": ported.origin})},
        "output": {"sha256": hashes(file)},
        "tensors": checkpoint.digests(tensors),
        "notes": list(ported.notes),
        "versions": versions(PACKAGES),
        "verification": {
            "passed": True,
            "compared_with": f"{ported.origin}, your own module",
            "image_size": list(ported.image_size),
            "inputs": [list(shape) for shape in ported.inputs],
            "figures": dict(ported.figures),
        },
    }


def read_ported(folder: FilePath, limits: Limits = LIMITS) -> PortedWeights:
    """The weights in a folder; its code is not run.

    Raises:
      InputError: It is no such folder, or damaged.
    """
    try:
        about = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{folder} is no folder of a ported network: {TABLE} cannot be read ({error}). "
            f"flax-resblock port writes such folders."
        ) from error
    if not isinstance(about, dict) or about.get("kind") != TABLE_KIND or about.get("schema") != 1:
        raise InputError(f"{folder / TABLE} is not a table that flax-resblock port wrote.")
    try:
        table = Table.of_rows(about.get("tensors"))
    except InputError as error:
        raise InputError(f"{folder / TABLE}: {error} Port the network again.") from error
    found = read_safetensors(folder / WEIGHTS, limits=limits).tensors
    names = {
        f"{UNUSED}{one.key}" if one.path is None else ".".join(map(str, one.path)): one
        for one in table.tensors
    }
    absent = sorted(names.keys() - found.keys())
    if absent:
        raise InputError(
            f"{folder / WEIGHTS} lacks {absent[0]!r}, which {TABLE} names. The two belong to "
            f"different networks, or one is damaged: port the network again."
        )
    values = {one.path: found[name] for name, one in names.items() if one.path is not None}
    unused = {one.key: found[name] for name, one in names.items() if one.path is None}
    return PortedWeights(table, values, unused, about)


def load_ported(
    folder: str | FilePath, network: Callable[..., nnx.Module], *, limits: Limits = LIMITS
) -> nnx.Module:
    """A ported network with its weights, in evaluation mode.

    Args:
      folder: That ``flax-resblock port`` wrote.
      network: The class in its Python file, which you import: nothing in the folder is executed.
      limits: See :class:`flax_resblock.Limits`.
    Raises:
      InputError: The weights are not those of the class, or the folder is damaged.
    Example:
      >>> from out.net import Net
      >>> model = load_ported("out", Net)
    """
    return read_ported(FilePath(folder), limits).create(network)


def ported_state_dict(model: nnx.Module, folder: str | FilePath) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a ported network, which may have been trained since.

    Args:
      model: A model of the class in the folder.
      folder: That ``flax-resblock port`` wrote.
    """
    read = read_ported(FilePath(folder))
    return read.table.to_torch(flat_arrays(model), read.unused)
