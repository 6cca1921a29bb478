"""The tensors of networks that are none of this library's, and checkpoints of them.

Such a network says itself how its tensors are called: the model carries the table that ``port``
wrote, as a ``ResNet`` carries its configuration. Nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from flax_resblock.checkpoint import Record
from flax_resblock.checkpoint.unwrap import unwrap
from flax_resblock.config import Path
from flax_resblock.convert.health import unhealthy
from flax_resblock.convert.metadata import NETWORK, PORT
from flax_resblock.convert.run_names import weights_among
from flax_resblock.convert.state_map import TensorMap, describe
from flax_resblock.errors import CheckpointError, visible

_CARRIED = "_flax_resblock_tensors"
PORTED_FROM = "__ported__"
"""Attribute of a ported model that describes it, see
:func:`flax_resblock.port.network.ported_of`; ``nnx.split`` and ``nnx.merge`` keep it."""


def carry(model: Any, tensors: TensorMap) -> None:
    """Gives a model the names of its tensors in PyTorch, which its copies carry too; they are
    hashable by what they say, as they become part of the model's structure."""
    setattr(model, _CARRIED, tensors)


def carried(model: Any) -> TensorMap | None:
    """What :func:`carry` gave a model, or a ported one has from its class; None for nothing."""
    own, ported = getattr(model, _CARRIED, None), getattr(model, PORTED_FROM, None)
    return own if own is not None or ported is None else ported.carried


@dataclass(frozen=True)
class OpenedTensors:
    """A checkpoint of a network that says itself how its tensors are called: the record, the names
    in the file, the arrays by name, absent counters filled with zero, and what was unwrapped or
    filled."""

    record: Record
    state_map: TensorMap
    tensors: Mapping[str, np.ndarray]
    notes: tuple[str, ...]

    @property
    def values(self) -> dict[Path, np.ndarray]:
        """The values of the Flax model by path."""
        return self.state_map.to_flax(self.tensors, in_one_block=True)

    @property
    def unused(self) -> dict[str, np.ndarray]:
        """What the Flax model leaves out, by its key in PyTorch."""
        return {
            str(one.flax_path[-1]): self.tensors[one.torch_key]
            for one in self.state_map.entries
            if one.unused
        }

    @cached_property
    def unhealthy(self) -> list[str]:
        """Tensors with non-finite values or negative variances."""
        return unhealthy(self.state_map, self.tensors)


def open_own(record: Record, tensors: TensorMap, network: str) -> OpenedTensors:
    """The checkpoint of a network whose tensors are called so; else CheckpointError."""
    found = weights_among(record.tensors, record.metadata)
    there, ways = describe(found), (tensors, _as_unwrapped(tensors, network))
    if record.format == "orbax":
        ways = (tensors.in_flax(),)
    names = min(ways, key=lambda way: len(way.check(there)))
    misfit = names.check(there)
    if len(misfit):
        lines = [f"The tensors of {record.source} are not those of {network}.", *misfit.lines()]
        raise CheckpointError("\n".join(lines))
    notes = list(record.notes)
    if counters := misfit.filled_counters:
        notes.append(f"filled {len(counters)} absent num_batches_tracked with 0, as PyTorch does")
        found |= {key: np.zeros((), np.int64) for key in counters}
    return OpenedTensors(record, names, found, tuple(notes))


def _as_unwrapped(tensors: TensorMap, network: str) -> TensorMap:
    """The same tensors as a file has them that was read: without what looks like a wrapper."""
    keys = {one.torch_key: one.torch_key for one in tensors.entries}
    found = unwrap(keys, is_tensor=lambda key: isinstance(key, str), source=network).state
    short = {full: key for key, full in found.items()}

    def renamed(entries: Any) -> list[Any]:
        return [replace(one, torch_key=short.get(one.torch_key, one.torch_key)) for one in entries]

    return TensorMap(renamed(tensors.entries), renamed(tensors.parameters))


def refuse_own(record: Record) -> None:
    """Raises CheckpointError for a checkpoint of a network that is none of this library's."""
    if not {PORT, NETWORK} & record.metadata.keys():
        return
    name = visible(record.metadata.get(NETWORK, "Net"))
    words = f"{record.source} is a checkpoint of {name}, which is no network of this library."
    if PORT in record.metadata:
        words += (
            f" In Python, import the class that `flax-resblock port` wrote and call "
            f"flax_resblock.load_ported({record.source!r}, {name}); `flax-resblock convert` "
            f"returns the state dict of PyTorch."
        )
    raise CheckpointError(
        f"{words} `flax-resblock predict --model FILE.py:{name}` and `flax-resblock export --model "
        f"FILE.py:{name}` take it, and so does `flax-resblock train --model FILE.py:{name}`, as "
        f"the value of `resume=...`, `init=...` or `eval_only=...`."
    )
