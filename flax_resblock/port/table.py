"""The table between the tensors of a module and those of the Flax network it was ported to.

Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from flax_resblock.checkpoint import digests
from flax_resblock.config import Path
from flax_resblock.convert.codecs import AS_IS, Codec, folded
from flax_resblock.convert.state_map import Entry, TensorMap
from flax_resblock.errors import InputError, some

TABLE_KIND = "flax-resblock ported network"
_SCHEMA = 2
UNUSED = "unused"
"""Begins the paths of tensors that the forward pass never uses; the rest is their PyTorch key."""


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of the state dict and where the Flax model has it.

    Attributes:
      key: In the state dict.
      path: In the model; None for what the forward pass never uses.
      codec: Between the two memory layouts.
    """

    key: str
    path: Path | None
    codec: Codec


class Parameter(NamedTuple):
    """A parameter of a module.

    Attributes:
      requires_grad: Whether it asks for a gradient.
      trained: Whether training changes it: the output depends on it too.
    """

    requires_grad: bool
    trained: bool


class Table(TensorMap):
    """The tensors of a ported network, as :class:`~flax_resblock.convert.StateMap` has those of a
    network of this library.

    Tables are equal if they say the same; a model carries one as a part of its structure.

    Args:
      entries: One for every tensor of the state dict. Tensors that modules share have one path.
      parameters: Those that are parameters, in the order of ``module.parameters()``.
      about: The network: ``network``, the name of its class; ``channels`` and ``image_size`` of
        the images that it was traced with; ``file``, if it was written to one.
      unused: What the forward pass never uses, by key.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        parameters: Sequence[Entry],
        about: Mapping[str, Any] | None = None,
        unused: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        super().__init__(entries, parameters)
        self.about = dict(about or {})
        self.unused = dict(unused or {})

    @classmethod
    def of(
        cls,
        tensors: Iterable[PlacedTensor],
        state: Mapping[str, np.ndarray],
        parameters: Mapping[str, Parameter],
        versions: Mapping[str, int] | None = None,
    ) -> Table:
        """The table of a module.

        Args:
          tensors: Where its tensors are.
          state: Its state dict.
          parameters: Its parameters, in their order.
          versions: With which its classes mark their state dicts, by the names of modules.
        """
        entries = [_entry(one, state[one.key].shape, parameters.get(one.key)) for one in tensors]
        by_key = {one.torch_key: one for one in entries}
        about = {"versions": dict(versions)} if versions else {}
        return cls(entries, [by_key[key] for key in parameters if key in by_key], about)

    def with_content(
        self, *, about: Mapping[str, Any] | None = None, unused: Mapping[str, np.ndarray]
    ) -> Table:
        """The same table with what the forward pass never uses, and what it says of the network."""
        both = self.about if about is None else about, unused
        return Table(self.entries, self.parameters, *both)

    def unused_of(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the forward pass never uses, of a state dict."""
        return {one.torch_key: state[one.torch_key] for one in self.entries if one.unused}

    def whole(self, state: Mapping[Path, np.ndarray]) -> Mapping[Path, np.ndarray]:
        """Arrays of the Flax model by path, with those that it leaves out.

        Raises:
          InputError: They are not those of this network.
        """
        found = {**{(UNUSED, key): value for key, value in self.unused.items()}, **state}
        wrong = {
            one.torch_key
            for one in self.entries
            if one.flax_path not in found or found[one.flax_path].shape != one.flax_shape
        }
        if wrong:
            raise InputError(
                f"The model is not the network that was ported: it has another "
                f"{some(sorted(wrong))}, or none. Was it changed since?"
            )
        return found

    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        numbers = {one.torch_key: number for number, one in enumerate(self.parameters)}
        rows = [
            {
                "torch": one.torch_key,
                "flax": None if one.unused else list(one.flax_path),
                "shape": list(one.torch_shape),
                "axes": None if one.codec.axes is None else list(one.codec.axes),
                **({"columns": list(one.codec.columns)} if one.codec.columns else {}),
                "parameter": numbers.get(one.torch_key),
                "requires_grad": one.torch_key in numbers and not one.frozen,
                "trained": one.torch_key in numbers and one.trained,
            }
            for one in self.entries
        ]
        return {"kind": TABLE_KIND, "schema": _SCHEMA, **self.about, "tensors": rows}

    @classmethod
    def of_content(cls, content: Any) -> Table:
        """From JSON.

        Raises:
          InputError: It is no such table.
        """
        if not isinstance(content, dict) or content.get("kind") != TABLE_KIND:
            raise InputError("it is not a table that flax-resblock port wrote.")
        if content.get("schema") != _SCHEMA:
            raise InputError(
                f"it has schema {str(content.get('schema'))[:20]}, not {_SCHEMA}: another version "
                f"of flax-resblock wrote it. Port the network again."
            )
        rows = content.get("tensors")
        entries, numbers = [], dict[int, Entry]()
        for row in rows if isinstance(rows, list) else [None]:
            entry, number = _of_row(row)
            entries.append(entry)
            if number is not None:
                numbers[number] = entry
        paths = {one.torch_key for one in entries}
        counted = sum(row["parameter"] is not None for row in rows or ())
        if sorted(numbers) != list(range(counted)) or len(paths) != len(entries):
            raise InputError("its rows are damaged. Port the network again.")
        about = {name: value for name, value in content.items() if name not in _OWN}
        _check(about)
        return cls(entries, [numbers[number] for number in sorted(numbers)], about)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the table says and holds."""
        said = json.dumps([self.content(), digests(self.unused)], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


_OWN = ("kind", "schema", "tensors")


def _check(about: Mapping[str, Any]) -> None:
    """Refuses what a table says of its network if it has another form."""

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)

    slots, inputs, versions = (about.get(name) for name in ("slots", "inputs", "versions"))
    sound = (
        isinstance(about.get("network"), str)
        and sizes(about.get("image_size"))
        and len(about["image_size"]) == 2
        and sizes([about.get("channels")])
        and isinstance(inputs, list)
        and all(map(sizes, inputs))
        and isinstance(slots, dict)
        and all(isinstance(path, list) for path in slots.values())
        and all(isinstance(step, int | str) for path in slots.values() for step in path)
        and (versions is None or (isinstance(versions, dict) and sizes([*versions.values()])))
    )
    if not sound:
        raise InputError("what it says of the network is damaged. Port the network again.")


def _entry(one: PlacedTensor, torch_shape: Sequence[int], parameter: Parameter | None) -> Entry:
    """Of a tensor; ``parameter`` is None for one that is none."""
    name = one.key.rpartition(".")[2]
    role = {"num_batches_tracked": "counter", "running_var": "variance"}.get(name, "buffer")
    role = "weight" if parameter is not None or name == "running_mean" else role
    shape = one.codec.flax_shape(torch_shape)
    if shape is None:
        raise _damaged(one.key)
    unused = one.path is None
    path = (UNUSED, one.key) if one.path is None else one.path
    frozen = parameter is not None and not parameter.requires_grad
    trained = parameter is not None and parameter.trained and not unused
    return Entry(path, one.key, one.codec, role, shape, frozen, trained, unused)


def _damaged(where: str) -> InputError:
    return InputError(f"the table of tensors is damaged at {where!r}. Port the network again.")


def _of_row(row: Any) -> tuple[Entry, int | None]:
    """Of JSON: the tensor, and its number among the parameters."""
    names = ("torch", "flax", "shape", "axes", "parameter", "requires_grad", "trained")
    values: list[Any] = [row.get(name) if isinstance(row, dict) else None for name in names]
    key, path, shape, axes, number, *said = values
    sizes: list[Any] = shape if isinstance(shape, list) else [None]
    sound = (
        isinstance(key, str)
        and all(isinstance(step, int | str) for step in path or [])
        and all(isinstance(size, int) and size >= 0 for size in sizes)
        and (axes is None or sorted(axes) == list(range(len(sizes))))
        and (number is None or isinstance(number, int))
        and all(isinstance(one, bool) for one in said)
    )
    if not sound:
        raise _damaged(str(row)[:120])
    codec = AS_IS if axes is None else Codec("axes moved", tuple(axes))
    columns = row.get("columns")
    if columns is not None:
        whole = isinstance(columns, list) and [type(one) for one in columns] == [int] * 3
        if not whole or axes != [1, 0] or math.prod(columns) != sizes[1] or min(columns) < 1:
            raise _damaged(str(row)[:120])
        codec = folded((columns[0], columns[1], columns[2]))
    tensor = PlacedTensor(str(key), None if path is None else tuple(path), codec)
    return _entry(tensor, sizes, None if number is None else Parameter(*said)), number
