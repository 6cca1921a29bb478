"""The state of a ``torch.optim`` optimizer, through the same map as the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import numpy as np

from flax_resblock.config import Path
from flax_resblock.convert.state_map import Entry, TensorMap
from flax_resblock.errors import CheckpointError, some
from flax_resblock.runs import fastai_optimizer
from flax_resblock.runs.optimizer_kinds import OPTIMIZERS, OptimizerKind, read_kind
from flax_resblock.runs.param_groups import (
    WEIGHTS_ONLY,
    are_names,
    kind_of,
    names_of,
    numbered,
    refuse_trained_elsewhere,
)

ENTRIES = (
    *("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "opt"),
    "optimizer_states",
)
"""Entries of a training checkpoint that hold an optimizer; Lightning keeps a list in the last."""


@dataclass(frozen=True)
class ParamGroup:
    """A param group.

    Attributes:
      options: As torch has them, in torch's order, with numbers for tensors of one element.
      paths: Flax paths of its parameters, in torch's order.
      named: Whether torch knows its parameters by name,
        ``torch.optim.SGD(model.named_parameters())``.
      tensors: Options that torch has as tensors, such as the rate of a ``capturable`` optimizer:
        arrays of their shape and dtype.
    """

    options: Mapping[str, Any]
    paths: tuple[Path, ...]
    named: bool = False
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def written(self) -> dict[str, Any]:
        """The options with tensors where torch has them."""
        made = {name: np.full_like(like, self.options[name]) for name, like in self.tensors.items()}
        return {**self.options, **made}


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer between the frameworks.

    Attributes:
      kind: A key of :data:`~flax_resblock.runs.optimizer_kinds.OPTIMIZERS`.
      groups: Its param groups.
      tensors: By torch's name of the tensor, then by Flax path, in Flax's memory layout. Parameters
        that have none yet (torch makes them on first use) are absent.
      steps: Steps taken, by Flax path; empty for SGD and LARS.
      notes: How the parameters were told apart, and what starts at zero.
      by_name: Whether torch has names in place of numbers, as PyTorch's distributed checkpoints and
        FSDP have.
    """

    kind: str
    groups: tuple[ParamGroup, ...]
    tensors: Mapping[str, Mapping[Path, np.ndarray]]
    steps: Mapping[Path, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    by_name: bool = False


def only_item(value: Any) -> Any:
    """The item of a list of one, anything else as it is: Lightning keeps lists of optimizers."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def find_optimizer(extras: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Name and state dict of the optimizer in a checkpoint: by its usual names, or the only one."""
    items = {str(name): only_item(value) for name, value in extras.items()}
    forms = {"param_groups", "hypers"}
    found = {n: v for n, v in items.items() if isinstance(v, Mapping) and v.keys() & forms}
    names = [name for name in ENTRIES if name in found] or list(found)[: len(found) == 1]
    return (names[0], found[names[0]]) if names else None


def read_optimizer(
    state: Mapping[str, Any],
    state_map: TensorMap,
    *,
    kind: str | None = None,
    source: str = "the optimizer",
) -> OptimizerState:
    """Reads the state dict of a torch optimizer.

    Args:
      state: ``{"state": {0: {...}}, "param_groups": [...]}`` with numpy arrays for tensors.
      kind: A key of :data:`~flax_resblock.runs.optimizer_kinds.OPTIMIZERS`, if the options do not
        tell.
    Raises:
      CheckpointError: No optimizer state, one without counterpart, or one that does not belong to
        this model; the message says which part.
    """
    notes: list[str] = []
    if "hypers" in state:
        state, kind, assumed = fastai_optimizer.as_torch(state, kind, source)
        notes += [fastai_optimizer.ASSUMED] if assumed else []
    groups, per_parameter = state.get("param_groups"), state.get("state")
    if (
        not isinstance(groups, Sequence)
        or not isinstance(per_parameter, Mapping)
        or not groups
        or not all(isinstance(group, Mapping) for group in groups)
    ):
        raise CheckpointError(
            f"{source} is no state of a torch optimizer: it has no 'param_groups' and 'state'. "
            f"{WEIGHTS_ONLY}"
        )
    by_name = are_names([key for group in groups for key in group["params"]])
    groups, per_parameter = numbered(groups, per_parameter)
    kept = {str(name) for tensors in per_parameter.values() for name in tensors}
    kind = read_kind(groups, kept, kind, source)
    numbers = [[int(number) for number in group["params"]] for group in groups]
    if OPTIMIZERS[kind].counts_in_group:
        groups, per_parameter = _counted_by_parameter(groups, per_parameter)
    keys, how = names_of(groups, numbers, per_parameter, state_map, source)
    by_key = {entry.torch_key: entry for entry in state_map.parameters}
    entries = [[by_key[key] for key in names] for names in keys]
    of_number = dict(zip(chain(*numbers), chain(*entries), strict=True))
    refuse_trained_elsewhere(per_parameter, of_number, source)
    tensors, steps = _tensors(per_parameter, of_number, kind, source)
    notes[:0] = [f"{kind}, {len(groups)} param group{'s' if len(groups) > 1 else ''}: {how}"]
    if lacking := _lacking(OPTIMIZERS[kind], groups, entries, tensors):
        name, absent, expected = lacking
        if len(absent) < expected or steps:
            raise CheckpointError(
                f"{source} lacks {name} of {len(absent)} of {expected} parameters: "
                f"{some(absent)}. torch makes it with a parameter's first gradient, so these "
                f"were frozen, which JAX would not keep, or the file is damaged. {WEIGHTS_ONLY}"
            )
        notes.append(f"no {name} yet, as before the first step; it starts at zero")
    made = tuple(_group(group, of) for group, of in zip(groups, entries, strict=True))
    return OptimizerState(kind, made, tensors, steps, tuple(notes), by_name)


def _group(group: Mapping[str, Any], members: Sequence[Entry]) -> ParamGroup:
    options = {name: v for name, v in group.items() if name not in ("params", "param_names")}
    tensors = {name: v for name, v in options.items() if isinstance(v, np.ndarray) and v.size == 1}
    numbers = {name: value.item() for name, value in tensors.items()}
    paths = tuple(entry.flax_path for entry in members)
    return ParamGroup({**options, **numbers}, paths, "param_names" in group, tensors)


def _tensors(
    per_parameter: Mapping[int, Mapping[str, Any]],
    of_number: Mapping[int, Entry],
    kind: str,
    source: str,
) -> tuple[dict[str, dict[Path, np.ndarray]], dict[Path, np.ndarray]]:
    """What the optimizer keeps, by name and path, and the steps by path."""
    if stray := sorted(set(per_parameter) - set(of_number)):
        raise CheckpointError(
            f"{source} keeps tensors for parameters {some([str(n) for n in stray])} that are "
            f"in none of its param groups. {WEIGHTS_ONLY}"
        )
    tensors: dict[str, dict[Path, np.ndarray]] = {name: {} for name in OPTIMIZERS[kind].tensors}
    steps, unknown = dict[Path, np.ndarray](), set[str]()
    for number, entry in of_number.items():
        for name, value in per_parameter.get(number, {}).items():
            if name == "step":
                steps[entry.flax_path] = np.asarray(value)
            elif name not in tensors:
                unknown.add(name)
            elif value is not None:
                array, scalar = np.asarray(value), name in OPTIMIZERS[kind].scalars
                tensors[name][entry.flax_path] = array if scalar else entry.codec.to_flax(array)
    if unknown:
        raise CheckpointError(
            f"{source} keeps {some(sorted(unknown))} per parameter, which {kind} has no place "
            f"for. {WEIGHTS_ONLY}"
        )
    counts = sorted({float(step) for step in steps.values()})
    if len(counts) > 1:
        raise CheckpointError(
            f"{source} has parameters that were updated a different number of times "
            f"({some([f'{count:g}' for count in counts])} steps); a run in JAX counts once for all "
            f"of them. {WEIGHTS_ONLY}"
        )
    return tensors, steps


def _lacking(
    kind: OptimizerKind,
    groups: Sequence[Mapping[str, Any]],
    entries: Sequence[Sequence[Entry]],
    tensors: Mapping[str, Mapping[Path, np.ndarray]],
) -> tuple[str, list[str], int] | None:
    """The first tensor that parameters lack, their names, and how many should have it."""
    for name, found in tensors.items():
        pairs = zip(groups, entries, strict=True)
        having = (entry for group, of in pairs if kind.has(name, group) for entry in of)
        expected = [entry for entry in having if entry.trained]
        absent = [entry.torch_key for entry in expected if entry.flax_path not in found]
        if absent:
            return name, absent, len(expected)
    return None


def _counted_by_parameter(
    groups: Sequence[Mapping[str, Any]], per_parameter: Mapping[int, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """The same with the count of each group at each of its parameters."""
    steps = {int(n): g["step"] for g in groups if "step" in g for n in g["params"]}
    counted = {n: {**found, "step": steps[n]} for n, found in per_parameter.items() if n in steps}
    bare = [{name: value for name, value in group.items() if name != "step"} for group in groups]
    return bare, {**{n: dict(found) for n, found in per_parameter.items()}, **counted}


def fresh_optimizer(
    kind: str, state_map: TensorMap, *, decay: Sequence[str] = ("kernel",), **options: Any
) -> OptimizerState:
    """An optimizer before its first step, for a run that begins in JAX, with ``options`` by torch's
    names: ``lr``, ``momentum``, ``weight_decay`` and so on.

    Args:
      kind: A key of :data:`~flax_resblock.runs.optimizer_kinds.OPTIMIZERS`.
      decay: Which parameters decay, some of ``"kernel"``, ``"scale"``, ``"bias"`` (see
        :func:`~flax_resblock.runs.param_groups.kind_of`); those that do are the first param group.
    """
    row = OPTIMIZERS[kind]
    settings = {**row.options, **row.later, **row.only, **row.flags, **options}
    members: dict[tuple[bool, bool], list[Path]] = {}
    for entry in state_map.parameters:
        what = kind_of(entry)
        group = (what in decay, row.adaptive and what == "kernel")
        members.setdefault(group, []).append(entry.flax_path)
    groups = []
    for (decays, adapts), paths in sorted(members.items(), reverse=True):
        own = {} if decays else {"weight_decay": 0.0}
        own |= {"trust_coefficient": 0.0} if row.adaptive and not adapts else {}
        groups.append(ParamGroup({**settings, **own}, tuple(paths)))
    return OptimizerState(kind, tuple(groups), {name: {} for name in row.tensors})


def write_optimizer(state: OptimizerState, state_map: TensorMap) -> dict[str, Any]:
    """What ``load_state_dict`` of torch's optimizer (or fastai's) takes, with numpy arrays for
    tensors; the exact inverse of :func:`read_optimizer`. Raises CheckpointError if torch has no
    such optimizer."""
    kind = OPTIMIZERS[state.kind]
    if kind.package is None:
        raise CheckpointError(
            f"{state.kind} has no counterpart in torch.optim, so a PyTorch file cannot hold "
            f"this run. Write a .safetensors file or an Orbax folder, or the weights without "
            f"`run=...`."
        )
    entries = {entry.flax_path: entry for entry in state_map.parameters}
    per_parameter: dict[int | str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    first = 0
    for group in state.groups:
        members = [entries[path] for path in group.paths]
        keys = [entry.torch_key for entry in members]
        numbers = list(range(first, first := first + len(members)))
        names = {"param_names": keys} if group.named and not state.by_name else {}
        numbers = keys if state.by_name else numbers
        groups.append({**names, **group.written, "params": numbers})
        for number, entry in zip(numbers, members, strict=True):
            path = entry.flax_path
            counted = path in state.steps and not kind.counts_in_group and entry.trained
            kept = {"step": state.steps[path]} if counted else {}
            for name, found in state.tensors.items():
                if path in found and entry.trained:
                    scalar = name in kind.scalars
                    kept[name] = found[path] if scalar else entry.codec.to_torch(found[path])
            if kept:
                per_parameter[number] = kept
        steps = [state.steps[path] for path in group.paths if path in state.steps]
        if kind.counts_in_group and steps:
            groups[-1]["step"] = steps[0]
    made = {"state": per_parameter, "param_groups": groups}
    if all(fastai_optimizer.FORM in group for group in groups):
        number_of = dict(
            zip(chain(*(group.paths for group in state.groups)), count(), strict=False)
        )
        order = [number_of[path] for path in entries if path in number_of]
        return fastai_optimizer.from_torch(made, order, state.kind)
    return made
