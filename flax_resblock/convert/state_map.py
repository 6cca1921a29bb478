"""The map between a network's tensors in PyTorch and in Flax: one list, read in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np

from flax_resblock.checkpoint.parallel import on_every_core
from flax_resblock.config import Config, Path, ResNetConfig, Slot, SlotKind, walk
from flax_resblock.convert.codecs import AS_IS, Codec, one_block
from flax_resblock.convert.naming import Naming
from flax_resblock.convert.namings import naming_of
from flax_resblock.errors import InputError, some


@dataclass(frozen=True)
class Entry:
    """One tensor, as PyTorch and as Flax name it.

    Attributes:
      flax_path: Attribute path in the nnx model, ``("stage1", 0, "conv1", "kernel")``.
      torch_key: Key in the state dict, ``"layer1.0.conv1.weight"``.
      codec: Between the two memory layouts.
      role: ``"weight"``, ``"variance"``, ``"counter"``, or ``"buffer"`` for what may hold anything.
      flax_shape: Shape on the Flax side.
      frozen: Whether it is a parameter with ``requires_grad=False``.
      trained: Whether training changes it, if it is a parameter: not if it is frozen, nor where
        PyTorch has no gradient because the output does not depend on it.
      unused: Whether the Flax model leaves it out, because the forward pass never uses it. Its
        path then is not one of the model's.
    """

    flax_path: Path
    torch_key: str
    codec: Codec
    role: str
    flax_shape: tuple[int, ...]
    frozen: bool = False
    trained: bool = True
    unused: bool = False

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape in the state dict."""
        return self.codec.torch_shape(self.flax_shape)


@dataclass(frozen=True)
class Misfit:
    """How a state dict differs from what a map expects; empty when it fits."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    wrong_dtype: list[str] = field(default_factory=list)
    filled_counters: list[str] = field(default_factory=list)
    afresh: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of differences; absent counters and what may be absent do not count."""
        return sum(map(len, (self.missing, self.unexpected, self.wrong_shape, self.wrong_dtype)))

    @property
    def not_fitting(self) -> int:
        """Number of tensors in the state dict that the map has no place for."""
        return len(self) - len(self.missing)

    def lines(self) -> list[str]:
        """One line per kind of difference, for an error message."""
        titles = ("missing", "unexpected", "wrong shape", "wrong dtype")
        rows = [(title, getattr(self, title.replace(" ", "_"))) for title in titles]
        return [f"  {title:<12}{some(names)}" for title, names in rows if names]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype


def describe(tensors: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Shape and dtype of every array."""
    return {key: TensorInfo(tuple(one.shape), np.dtype(one.dtype)) for key, one in tensors.items()}


def is_floating(dtype: np.dtype) -> bool:
    """True for numpy's and ml_dtypes' floating types (bfloat16, float8)."""
    return dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name)


def matches_any(key: str, globs: Sequence[str]) -> bool:
    """Whether a key is named by one of the shell-style patterns."""
    return any(fnmatchcase(key, glob) for glob in globs)


class TensorMap:
    """The tensors of a network in both frameworks, in the order of the state dict, and those that
    are parameters, in the order of ``module.parameters()``. Both directions are loops over the same
    list, and so is whatever else is kept per parameter: gradients, momentum buffers, Adam's
    moments."""

    def __init__(self, entries: Sequence[Entry], parameters: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self.parameters = tuple(parameters)

    def in_flax(self) -> TensorMap:
        """The same tensors under Flax's names and in Flax's memory layout."""
        own = {  # of tensors that share a path, the one that is the parameter
            one.flax_path: replace(one, torch_key=".".join(map(str, one.flax_path)), codec=AS_IS)
            for one in (*self.entries, *self.parameters)
        }
        return TensorMap(list(own.values()), [own[one.flax_path] for one in self.parameters])

    def whole(self, state: Mapping[Path, np.ndarray]) -> Mapping[Path, np.ndarray]:
        """Arrays of the Flax model by path, with those that it leaves out."""
        return state

    def check(self, found: Mapping[str, TensorInfo], allow_missing: Sequence[str] = ()) -> Misfit:
        """Every way in which the state dict described by ``found`` differs from this map; keys
        matching ``allow_missing`` (globs) may be absent."""
        misfit = Misfit()
        for entry in self.entries:
            info = found.get(entry.torch_key)
            if info is None:
                absent = misfit.missing
                if entry.role == "counter":
                    absent = misfit.filled_counters
                elif matches_any(entry.torch_key, allow_missing):
                    absent = misfit.afresh
                absent.append(entry.torch_key)
                continue
            if info.shape != entry.torch_shape:
                misfit.wrong_shape.append(
                    f"{entry.torch_key} {list(info.shape)}, expected {list(entry.torch_shape)}"
                )
            fits = info.dtype.kind in "iu" if entry.role == "counter" else is_floating(info.dtype)
            if not fits and entry.role != "buffer":
                expected = "an integer" if entry.role == "counter" else "a floating type"
                misfit.wrong_dtype.append(
                    f"{entry.torch_key} {info.dtype.name}, expected {expected}"
                )
        known = {entry.torch_key for entry in self.entries}
        misfit.unexpected.extend(key for key in found if key not in known)
        return misfit

    def to_flax(
        self, state: Mapping[str, np.ndarray], *, in_one_block: bool = False
    ) -> dict[Path, np.ndarray]:
        """State dict to Flax arrays by path, without what the model leaves out; keys that are
        absent are left out too (call :meth:`check` first). With ``in_one_block``, arrays whose
        layout stays are copied as well, so that nothing is shared with ``state``, all into one
        block of memory; see :func:`flax_resblock.convert.codecs.one_block`."""
        entries = [one for one in self.entries if one.torch_key in state and not one.unused]
        arrays = [state[entry.torch_key] for entry in entries]
        places: Sequence[np.ndarray | None] = [None] * len(entries)
        if in_one_block:
            dtypes = [array.dtype for array in arrays]
            places = one_block([(e.flax_shape, d) for e, d in zip(entries, dtypes, strict=True)])
        moved = on_every_core(
            lambda i: entries[i].codec.to_flax(arrays[i], places[i]),
            range(len(entries)),
            lambda i: arrays[i].nbytes,
        )
        return dict(zip([entry.flax_path for entry in entries], moved, strict=True))

    def to_torch(
        self, state: Mapping[Path, np.ndarray], *, copy: bool = False
    ) -> dict[str, np.ndarray]:
        """Flax arrays by path to a state dict, in PyTorch's order; paths that are absent are left
        out.

        Args:
          state: Arrays by path.
          copy: Also copy arrays whose layout stays, so that nothing is shared with ``state``.
        """
        entries = [entry for entry in self.entries if entry.flax_path in state]
        arrays = on_every_core(
            lambda e: e.codec.to_torch(_owned(state[e.flax_path], e.codec, copy)),
            entries,
            lambda e: state[e.flax_path].nbytes,
        )
        return dict(zip([e.torch_key for e in entries], arrays, strict=True))


class StateMap(TensorMap):
    """The tensors of a network or block of this library under a naming scheme; :attr:`modules`
    names the modules whose activations can be compared. Raises InputError for an unknown name, or a
    scheme without a name for a place that has parameters (a projection in a scheme of option-A
    networks)."""

    def __init__(self, config: Config, naming: str | Naming) -> None:
        self.config = config
        self.naming = naming_of(naming)
        if isinstance(config, ResNetConfig):
            self.naming = self.naming.laid_out(config.depths)
        slots = list(walk(config))
        starts = {(one.stage, one.block): i for i, one in reversed([*enumerate(slots)])}
        rank = {part: n for n, part in enumerate(self.naming.parts)}
        slots.sort(key=lambda one: (starts[one.stage, one.block], rank.get(one.branch, 0)))
        expanded = [(slot, entry) for slot in slots for entry in self._expand(slot)]
        entries = [entry for _, entry in expanded]
        trained = [entry for slot, entry in expanded if slot.kind is not SlotKind.FROZEN_NORM]
        parameters = ("kernel", "scale", "bias")
        super().__init__(entries, [one for one in trained if one.flax_path[-1] in parameters])
        paths = {entry.flax_path for entry in self.entries}
        keys = {entry.torch_key for entry in self.entries}
        if not len(paths) == len(keys) == len(self.entries):
            raise InputError(
                f"naming scheme {self.naming.name!r} gives two tensors of this network the same "
                f"name."
            )

    def _expand(self, slot: Slot) -> list[Entry]:
        tensors = self.naming.tensors_of(slot.kind, slot.role)
        module = self.naming.module_name(slot)
        if tensors and module is None:
            raise InputError(
                f"naming scheme {self.naming.name!r} has no name for {slot.name}; choose "
                f"another naming scheme."
            )
        entries = []
        for tensor in tensors:
            path, key = (*slot.path, tensor.flax_name), tensor.key(module or "")
            shape = slot.shape if tensor.flax_name == "kernel" else slot.shape[-1:]
            shape = () if tensor.role == "counter" else shape
            entries.append(Entry(path, key, tensor.codec, tensor.role, shape))
        return entries

    def written(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A state dict as this naming scheme's files have it: some have no counters."""
        counters = {e.torch_key for e in self.entries if e.role == "counter"}
        counters = set() if self.naming.counts else counters
        return {key: value for key, value in tensors.items() if key not in counters}

    @cached_property
    def modules(self) -> dict[str, str]:
        """Torch module name of every slot that has one; ``""`` is a bare block."""
        named = {slot.name: self.naming.module_name(slot) for slot in walk(self.config)}
        return {slot: module for slot, module in named.items() if module is not None}


def _owned(array: np.ndarray, codec: Codec, copy: bool) -> np.ndarray:
    """The array, copied where asked for and where the codec would not make a new one."""
    return np.array(array) if copy and codec.axes is None else array


def transcode(
    source: StateMap, target: StateMap, state: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A state dict under ``source`` as one under ``target``, two maps of the same network. Where
    both lay out every tensor alike, the arrays are shared; else all are new, so that ``state`` (a
    memory-mapped file) can be let go."""
    names = {entry.flax_path: entry for entry in source.entries}
    both = ((names[entry.flax_path], entry) for entry in target.entries)
    pairs = [(old, new) for old, new in both if old.torch_key in state]
    all_alike = all(old.codec == new.codec for old, new in pairs)

    def convert(pair: tuple[Entry, Entry]) -> np.ndarray:
        old, new = pair
        array = state[old.torch_key]
        if old.codec == new.codec:
            return array if all_alike else np.array(array)
        return new.codec.to_torch(old.codec.to_flax(array))

    arrays = on_every_core(convert, pairs, lambda pair: state[pair[0].torch_key].nbytes)
    return dict(zip([new.torch_key for _, new in pairs], arrays, strict=True))
