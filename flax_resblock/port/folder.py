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
from flax_resblock.checkpoint import LIMITS, Limits, Record
from flax_resblock.checkpoint.folders import PORTED
from flax_resblock.checkpoint.safetensors_file import read_safetensors, write_safetensors
from flax_resblock.config import Path
from flax_resblock.convert.image_facts import carry_images, read_images
from flax_resblock.convert.metadata import PORT
from flax_resblock.convert.own import PORTED_FROM, OpenedTensors, open_own
from flax_resblock.errors import InputError, reason
from flax_resblock.nn.variables import flat_arrays
from flax_resblock.parity.certificate import KIND, NAME, SCHEMA, hashes, versions
from flax_resblock.port.network import PortedNetwork, described, filled
from flax_resblock.port.table import Table

TABLE, WEIGHTS = PORTED
PACKAGES = ("jax", "flax", "numpy", "safetensors", "torch")


@dataclass(frozen=True)
class PortedWeights:
    """The weights of a ported network.

    Attributes:
      table: Between the state dict and the Flax model; it holds what is never used.
      values: The weights, by attribute path.
    """

    table: Table
    values: Mapping[Path, np.ndarray]

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state dict of PyTorch."""
        return self.table.to_torch(self.table.whole(self.values))

    def create(self, network: Callable[..., nnx.Module]) -> nnx.Module:
        """A network of this class with these weights, in evaluation mode."""
        model = filled(network, self.values, self.table)
        setattr(model, PORTED_FROM, described(self.table))
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
    table = ported.carried.with_content(
        about={"file": f"{stem}.py", **ported.carried.about}, unused=ported.unused
    )
    tensors = table.in_flax().to_torch(table.whole(ported.values))
    with checkpoint.replacing(folder, force=force, replaceable=checkpoint.is_ported) as temporary:
        temporary.mkdir()
        (temporary / f"{stem}.py").write_text(ported.source, encoding="utf-8")
        write_safetensors(temporary / WEIGHTS, tensors, {"format": "flax"})
        (temporary / TABLE).write_text(
            json.dumps(table.content(), indent=1) + "\n", encoding="utf-8"
        )
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
      path: A folder, for the code and the weights.
      force: Replace what is there.
    Raises:
      InputError: The folder exists, or the code is not known.
    """
    if not ported.source:
        raise InputError(
            "This model was loaded from the folder of a port, whose code you import, and only its "
            "weights are known here. Save its state dict, as .pth or .safetensors, or keep the "
            "folder and save nnx.state(model)."
        )
    arrays = flat_arrays(model)
    paths = [one.flax_path for one in ported.table.entries if not one.unused]
    values = {path: arrays[path] for path in paths}
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


def read_ported(path: FilePath, limits: Limits = LIMITS) -> PortedWeights:
    """The weights in a folder of ``port``, or in a checkpoint or run of such a network; its code
    is not run.

    Raises:
      InputError: It is no such folder or checkpoint, or damaged.
    """
    return _opened(path, limits)[0]


def _opened(path: FilePath, limits: Limits) -> tuple[PortedWeights, OpenedTensors]:
    if checkpoint.is_ported(path):
        return opened_folder(path, limits)
    return opened_ported(checkpoint.read(path, limits=limits))


def opened_folder(path: FilePath, limits: Limits = LIMITS) -> tuple[PortedWeights, OpenedTensors]:
    """The weights in a folder of ``port``.

    Raises:
      InputError: It is damaged.
    """
    table = _table_in(path)
    record = read_safetensors(path / WEIGHTS, limits=limits)
    # names that look like a wrapper's are the network's own here
    record = replace(record, format="orbax", tensors=record.as_named, names={}, notes=())
    opened = open_own(record, table, str(table.about.get("network")))
    return _weights(table, opened), opened


def read_table(folder: FilePath) -> Table | None:
    """The table in a folder of ``port``, or in that of a run of such a network; None in any other.

    Raises:
      InputError: It is damaged.
    """
    if checkpoint.is_ported(folder):
        return _table_in(folder)
    text = checkpoint.metadata_in(folder).get(PORT)
    return None if text is None else _table_of(text, folder)


def _table_in(folder: FilePath) -> Table:
    try:
        text = (folder / TABLE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / TABLE} cannot be read ({reason(error)}).") from error
    return _table_of(text, folder / TABLE)


def _table_of(text: str, source: object) -> Table:
    try:
        return Table.of_content(json.loads(text))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{source}: its table of tensors is damaged ({error}). Port the network again."
        ) from error


def opened_ported(record: Record) -> tuple[PortedWeights, OpenedTensors]:
    """The weights in a checkpoint that :func:`flax_resblock.save` wrote of a ported network.

    Raises:
      InputError: It is none, or damaged.
    """
    if PORT not in record.metadata:
        raise InputError(
            f"{record.source} is no ported network. `flax-resblock port` writes a folder of one; "
            f"`flax-resblock train --model` and flax_resblock.save write checkpoints of it."
        )
    table = _table_of(record.metadata[PORT], record.source)
    opened = open_own(record, table, str(table.about.get("network")))
    return _weights(table, opened), opened


def _weights(table: Table, opened: OpenedTensors) -> PortedWeights:
    unused = opened.unused
    return PortedWeights(table.with_content(unused=unused), opened.values)


def load_ported(
    folder: str | FilePath, network: Callable[..., nnx.Module], *, limits: Limits = LIMITS
) -> nnx.Module:
    """A ported network with its weights, in evaluation mode.

    Args:
      folder: That ``flax-resblock port`` wrote, or the folder of a run of such a network, or one of
        its checkpoints.
      network: The class in its Python file, which you import: nothing in the folder is executed.
      limits: See :class:`flax_resblock.Limits`.
    Raises:
      InputError: The weights are not those of the class, or the folder is damaged.
    Example:
      >>> from out.net import Net
      >>> model = load_ported("out", Net)
    """
    weights, opened = _opened(FilePath(folder), limits)
    model = weights.create(network)
    carry_images(model, read_images(opened.record.metadata, opened.record.source))
    return model


def ported_state_dict(model: nnx.Module, folder: str | FilePath) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a ported network, which may have been trained since.

    Args:
      model: A model of the class in the folder. One that :func:`load_ported` made knows its names:
        ``flax_resblock.to_torch(model)`` is the same.
      folder: That ``flax-resblock port`` wrote.
    """
    table = read_ported(FilePath(folder)).table
    return table.to_torch(table.whole(flat_arrays(model)), copy=True)
