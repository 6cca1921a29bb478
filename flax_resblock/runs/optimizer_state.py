"""The state of a ``torch.optim`` optimizer, tensor by tensor and option by option, through the same
StateMap as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from flax_resblock.config import Path
from flax_resblock.convert.state_map import Entry, StateMap
from flax_resblock.errors import CheckpointError, some
from flax_resblock.runs.param_groups import WEIGHTS_ONLY, names_of, trainable


@dataclass(frozen=True)
class Kind:
    """An optimizer that both frameworks have.

    Attributes:
      tensors: What it keeps per parameter, by torch's names.
      options: Hyper-parameters that decide what it computes.
      only: Options that have no counterpart unless they have this value.
      in_torch: Whether ``torch.optim`` has it.
      adaptive: Whether the update of a kernel is scaled by the ratio of the kernel's norm to its
        own (the options ``trust_coefficient`` and, for LARS, ``eps``; 0 leaves it as it is).
    """

    tensors: tuple[str, ...]
    options: tuple[str, ...]
    only: Mapping[str, Any]
    in_torch: bool = True
    adaptive: bool = False

    @property
    def counts(self) -> bool:
        """Whether it counts its steps, as Adam does."""
        return "exp_avg" in self.tensors

    def buffered(self, options: Mapping[str, Any]) -> bool:
        """Whether parameters of a group with these options have tensors; without momentum SGD keeps
        none.
        """
        return self.counts or bool(options["momentum"])


_ADAM = Kind(
    ("exp_avg", "exp_avg_sq"),
    ("lr", "betas", "eps", "weight_decay"),
    {"amsgrad": False, "maximize": False},
)
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "sgd": Kind(
            ("momentum_buffer",),
            ("lr", "momentum", "nesterov", "weight_decay"),
            {"dampening": 0, "maximize": False},
        ),
        "adam": _ADAM,
        "adamw": _ADAM,
        "lars": Kind(
            ("momentum_buffer",),
            ("lr", "momentum", "nesterov", "weight_decay", "trust_coefficient", "eps"),
            {},
            in_torch=False,
            adaptive=True,
        ),
        "lamb": Kind(
            _ADAM.tensors, (*_ADAM.options, "trust_coefficient"), {}, in_torch=False, adaptive=True
        ),
    }
)
IGNORED = ("foreach", "fused", "capturable", "differentiable", "swap_params")
"""Options that change how torch computes, not what; kept for the way back."""

SCHEDULED = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
"""Options that belong to a learning-rate scheduler, which keeps them in the param groups."""


@dataclass(frozen=True)
class Group:
    """A param group.

    Attributes:
      options: As torch has them, in torch's order.
      paths: Flax paths of its parameters, in torch's order.
      named: Whether torch knows its parameters by name,
        ``torch.optim.SGD(model.named_parameters())``.
    """

    options: Mapping[str, Any]
    paths: tuple[Path, ...]
    named: bool = False


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer between the frameworks.

    Attributes:
      kind: One of :data:`KINDS`.
      groups: Its param groups.
      tensors: By torch's name of the tensor, then by Flax path, in Flax's layout. Parameters
        without one (torch makes them on first use) are absent.
      steps: By Flax path; empty for SGD and LARS.
      notes: What was found out and what was left out.
    """

    kind: str
    groups: tuple[Group, ...]
    tensors: Mapping[str, Mapping[Path, np.ndarray]]
    steps: Mapping[Path, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read(
    state: Mapping[str, Any],
    state_map: StateMap,
    *,
    kind: str | None = None,
    source: str = "the optimizer",
) -> OptimizerState:
    """The state dict of a torch optimizer.

    Args:
      state: ``{"state": {0: {...}}, "param_groups": [...]}`` with numpy arrays for tensors.
      state_map: Of the model that it belongs to.
      kind: ``"sgd"``, ``"adam"`` or ``"adamw"``, where the options do not tell.
      source: For messages.
    Raises:
      CheckpointError: No optimizer state, one without counterpart, or one that does not belong to
        this model; the message says which part.
    """
    groups, per_parameter = state.get("param_groups"), state.get("state")
    if (
        not isinstance(groups, Sequence)
        or not isinstance(per_parameter, Mapping)
        or not groups
        or not all(isinstance(g, Mapping) for g in groups)
    ):
        raise CheckpointError(
            f"{source} is no state of a torch optimizer: it has no 'param_groups' and 'state'. "
            f"{WEIGHTS_ONLY}"
        )
    kind = _kind(groups, kind, source)
    per_parameter = {int(number): tensors for number, tensors in per_parameter.items()}
    numbers = [[int(number) for number in group["params"]] for group in groups]
    _check_options(groups, kind, source)
    keys, how = names_of(groups, numbers, per_parameter, state_map, source)
    entries = {entry.torch_key: entry for entry in trainable(state_map)}
    of_number = {
        number: entries[key]
        for group, names in zip(numbers, keys, strict=True)
        for number, key in zip(group, names, strict=True)
    }
    stray = sorted(set(per_parameter) - set(of_number))
    if stray:
        raise CheckpointError(
            f"{source} keeps tensors for parameters {some([str(n) for n in stray])} that are "
            f"in none of its param groups. {WEIGHTS_ONLY}"
        )
    tensors: dict[str, dict[Path, np.ndarray]] = {name: {} for name in KINDS[kind].tensors}
    steps: dict[Path, np.ndarray] = {}
    unknown: set[str] = set()
    for number, entry in of_number.items():
        for name, value in per_parameter.get(number, {}).items():
            if name == "step":
                steps[entry.flax_path] = np.asarray(value)
            elif name not in tensors:
                unknown.add(name)
            elif value is not None:
                tensors[name][entry.flax_path] = entry.codec.to_flax(np.asarray(value))
    if unknown:
        raise CheckpointError(
            f"{source} keeps {some(sorted(unknown))} per parameter, which {kind} has no place "
            f"for. {WEIGHTS_ONLY}"
        )
    counts = some([f"{count:g}" for count in sorted({float(step) for step in steps.values()})])
    if ", " in counts:
        raise CheckpointError(
            f"{source} has parameters that were updated a different number of times ({counts} "
            f"steps); optax counts once for all of them. {WEIGHTS_ONLY}"
        )
    notes = [f"{kind}, {len(groups)} param group{'s' if len(groups) > 1 else ''}: {how}"]
    lacking = _lacking(kind, groups, keys, entries, tensors)
    if lacking:
        name, absent, expected = lacking
        if len(absent) < expected or steps:
            raise CheckpointError(
                f"{source} lacks {name} of {len(absent)} of {expected} parameters: "
                f"{some(absent)}. torch makes it with a parameter's first gradient, so these "
                f"were frozen, which JAX would not keep, or the file is damaged. {WEIGHTS_ONLY}"
            )
        notes.append(f"no {name} yet, as before the first step; it starts at zero")
    made = tuple(
        Group(
            {name: value for name, value in group.items() if name not in ("params", "param_names")},
            tuple(entries[key].flax_path for key in names),
            named="param_names" in group,
        )
        for group, names in zip(groups, keys, strict=True)
    )
    return OptimizerState(kind, made, tensors, steps, tuple(notes))


def _lacking(
    kind: str,
    groups: Sequence[Mapping[str, Any]],
    keys: Sequence[Sequence[str]],
    entries: Mapping[str, Entry],
    tensors: Mapping[str, Mapping[Path, np.ndarray]],
) -> tuple[str, list[str], int] | None:
    """The first tensor that parameters lack, their names, and how many should have it."""
    expected = [
        key
        for group, names in zip(groups, keys, strict=True)
        for key in names
        if KINDS[kind].buffered(group)
    ]
    for name, found in tensors.items():
        absent = [key for key in expected if entries[key].flax_path not in found]
        if absent:
            return name, absent, len(expected)
    return None


ENTRIES = (
    "optimizer",
    "optimizer_state_dict",
    "optimizer_state",
    "optim",
    "opt",
    "optimizer_states",
)
"""Entries of a training checkpoint that hold it; Lightning keeps a list under the last."""


def only(value: Any) -> Any:
    """What is in a list of one: Lightning keeps lists of optimizers and schedulers."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def find(extras: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The state dict of an optimizer among the entries of a training checkpoint, with the entry's
    name; None where there is none.
    """
    for name in ENTRIES:
        value = only(extras.get(name))
        if isinstance(value, Mapping) and "param_groups" in value:
            return name, value
    return None


_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sgd": {
            "lr": 1e-3,
            "momentum": 0,
            "dampening": 0,
            "weight_decay": 0,
            "nesterov": False,
            "maximize": False,
        }
        | {"foreach": None, "differentiable": False, "fused": None},
        "adam": {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
        }
        | {
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": False,
        },
        "adamw": {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 1e-2,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
        }
        | {
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
        },
        "lars": {
            "lr": 1.0,
            "momentum": 0.9,
            "weight_decay": 0,
            "nesterov": False,
            "trust_coefficient": 0.001,
            "eps": 0.0,
        },
        "lamb": {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-6,
            "weight_decay": 0,
            "trust_coefficient": 1.0,
        },
    }
)
"""torch's options and their defaults; optax's for what torch does not have."""


def fresh(
    kind: str, state_map: StateMap, *, decay: Sequence[str] = ("kernel",), **options: Any
) -> OptimizerState:
    """An optimizer before its first step, for a run that begins in JAX.

    Args:
      kind: One of :data:`KINDS`.
      state_map: Of the model.
      decay: Which parameters decay, some of ``"kernel"``, ``"scale"``, ``"bias"``; those that do
        are the first param group.
      **options: torch's names: ``lr``, ``momentum``, ``weight_decay`` ...
    """
    settings = {**_DEFAULTS[kind], **options}
    members: dict[tuple[bool, bool], list[Path]] = {}
    for entry in trainable(state_map):
        what = str(entry.flax_path[-1])
        members.setdefault((what in decay, KINDS[kind].adaptive and what == "kernel"), []).append(
            entry.flax_path
        )
    groups = []
    for (decays, adapts), paths in sorted(members.items(), reverse=True):
        own = {**settings, "weight_decay": settings["weight_decay"] if decays else 0.0}
        groups.append(
            Group(
                own | ({"trust_coefficient": 0.0} if KINDS[kind].adaptive and not adapts else {}),
                tuple(paths),
            )
        )
    return OptimizerState(kind, tuple(groups), {name: {} for name in KINDS[kind].tensors})


def write(state: OptimizerState, state_map: StateMap) -> dict[str, Any]:
    """The state dict that ``torch.optim.Optimizer.load_state_dict`` takes, with numpy arrays for
    tensors; the exact inverse of :func:`read`.

    Args:
      state: The optimizer.
      state_map: Of the model.
    Raises:
      CheckpointError: An optimizer that torch does not have.
    """
    if not KINDS[state.kind].in_torch:
        raise CheckpointError(
            f"{state.kind} has no counterpart in torch.optim, so a PyTorch file cannot hold "
            f"this run. Write a .safetensors file or an Orbax folder, or the "
            "weights without --with-optimizer."
        )
    entries = {entry.flax_path: entry for entry in trainable(state_map)}
    per_parameter: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    number = 0
    for group in state.groups:
        names = (
            {"param_names": [entries[path].torch_key for path in group.paths]}
            if group.named
            else {}
        )
        groups.append(
            {**names, **group.options, "params": list(range(number, number + len(group.paths)))}
        )
        for path in group.paths:
            entry = entries[path]
            found: dict[str, Any] = {}
            if entry.flax_path in state.steps:
                found["step"] = state.steps[entry.flax_path]
            found |= {
                name: entry.codec.to_torch(t[entry.flax_path])
                for name, t in state.tensors.items()
                if entry.flax_path in t
            }
            if found:
                per_parameter[number] = found
            number += 1
    return {"state": per_parameter, "param_groups": groups}


def _kind(groups: Sequence[Mapping[str, Any]], kind: str | None, source: str) -> str:
    options = set(groups[0])
    if kind is not None:
        if kind not in KINDS:
            raise CheckpointError(
                f"{source}: optimizer {kind!r} is unknown; known: {', '.join(KINDS)}."
            )
        return kind
    if {"momentum", "dampening", "nesterov"} <= options:
        return "sgd"
    if {"betas", "eps", "amsgrad"} <= options:
        if "decoupled_weight_decay" in options:
            return "adamw" if groups[0]["decoupled_weight_decay"] else "adam"
        if all(not group["weight_decay"] for group in groups):
            return "adam"  # without decay the two are the same
        raise CheckpointError(
            f"{source} is Adam or AdamW, which torch before 2.6 writes alike; they decay "
            f"differently. Say which: --optimizer adam or adamw."
        )
    raise CheckpointError(
        f"{source} is no optimizer with a counterpart here (SGD, Adam, AdamW): its options are "
        f"{some(sorted(options - {'params'}))}. {WEIGHTS_ONLY}"
    )


def _check_options(groups: Sequence[Mapping[str, Any]], kind: str, source: str) -> None:
    known = {
        *KINDS[kind].options,
        *KINDS[kind].only,
        *IGNORED,
        *SCHEDULED,
        "params",
        "param_names",
        "decoupled_weight_decay",
    }
    for number, group in enumerate(groups):
        for name, value in KINDS[kind].only.items():
            if group.get(name, value) != value:
                raise CheckpointError(
                    f"{source}, param group {number}: {name}={group[name]!r} has no "
                    f"counterpart in optax (only {name}={value!r}). {WEIGHTS_ONLY}"
                )
        missing, other = (
            [name for name in KINDS[kind].options if name not in group],
            sorted(set(group) - known),
        )
        if missing or other:
            words = (
                f"lacks {some(missing)}"
                if missing
                else f"has options that {kind} does not know: {some(other)}"
            )
            raise CheckpointError(f"{source}, param group {number} {words}. {WEIGHTS_ONLY}")
