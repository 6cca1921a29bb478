"""The state of a ``torch.optim`` optimizer, tensor by tensor and option by option, through the same StateMap as the weights.

A torch optimizer numbers its parameters; which number is which tensor is nowhere written down unless it was given names. It is found from the usual ways to
split parameters into groups, and only where exactly one of them fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from flax_resblock.architecture import Path
from flax_resblock.convert.state_map import Entry, StateMap
from flax_resblock.errors import CheckpointError, some

WEIGHTS_ONLY = "Go on with the weights alone (--weights-only): they do not depend on it."


@dataclass(frozen=True)
class Kind:
    """An optimizer that both frameworks have.

    Attributes:
      tensors: What it keeps per parameter, by torch's names.
      options: Hyper-parameters that decide what it computes.
      only: Options that have no counterpart unless they have this value.
    """

    tensors: tuple[str, ...]
    options: tuple[str, ...]
    only: Mapping[str, Any]


_ADAM = Kind(("exp_avg", "exp_avg_sq"), ("lr", "betas", "eps", "weight_decay"), {"amsgrad": False, "maximize": False})
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "sgd": Kind(("momentum_buffer",), ("lr", "momentum", "nesterov", "weight_decay"), {"dampening": 0, "maximize": False}),
        "adam": _ADAM,
        "adamw": _ADAM,
    }
)
IGNORED = ("foreach", "fused", "capturable", "differentiable", "initial_lr", "swap_params")
"""Options that change how torch computes, not what; kept for the way back. ``initial_lr`` belongs to the scheduler."""


@dataclass(frozen=True)
class Group:
    """A param group.

    Attributes:
      options: As torch has them, in torch's order.
      paths: Flax paths of its parameters, in torch's order.
    """

    options: Mapping[str, Any]
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer between the frameworks.

    Attributes:
      kind: ``"sgd"``, ``"adam"`` or ``"adamw"``.
      groups: Its param groups.
      tensors: By torch's name of the tensor, then by Flax path, in Flax's layout. Parameters without one (torch makes them on first use) are absent.
      steps: By Flax path; empty for SGD.
      notes: What was found out and what was left out.
    """

    kind: str
    groups: tuple[Group, ...]
    tensors: Mapping[str, Mapping[Path, np.ndarray]]
    steps: Mapping[Path, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def trainable(state_map: StateMap) -> list[Entry]:
    """Entries of the parameters, in the order of ``model.parameters()``."""
    return [entry for entry in state_map.entries if entry.flax_path[-1] in ("kernel", "scale", "bias")]


def read(state: Mapping[str, Any], state_map: StateMap, *, kind: str | None = None, source: str = "the optimizer") -> OptimizerState:
    """The state dict of a torch optimizer.

    Args:
      state: ``{"state": {0: {...}}, "param_groups": [...]}`` with numpy arrays for tensors.
      state_map: Of the model that it belongs to.
      kind: ``"sgd"``, ``"adam"`` or ``"adamw"``, where the options do not tell.
      source: For messages.
    Raises:
      CheckpointError: No optimizer state, one without counterpart, or one that does not belong to this model; the message says which part.
    """
    groups, per_parameter = state.get("param_groups"), state.get("state")
    if not isinstance(groups, Sequence) or not isinstance(per_parameter, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups):
        raise CheckpointError(f"{source} is no state of a torch optimizer: it has no 'param_groups' and 'state'. {WEIGHTS_ONLY}")
    kind = _kind(groups, kind, source)
    per_parameter = {int(number): tensors for number, tensors in per_parameter.items()}
    numbers = [[int(number) for number in group["params"]] for group in groups]
    _check_options(groups, kind, source)
    keys, how = _names(groups, numbers, per_parameter, state_map, source)
    entries = {entry.torch_key: entry for entry in trainable(state_map)}
    of_number = {number: entries[key] for group, names in zip(numbers, keys, strict=True) for number, key in zip(group, names, strict=True)}
    stray = sorted(set(per_parameter) - set(of_number))
    if stray:
        raise CheckpointError(f"{source} keeps tensors for parameters {some([str(n) for n in stray])} that are in none of its param groups. {WEIGHTS_ONLY}")
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
        raise CheckpointError(f"{source} keeps {some(sorted(unknown))} per parameter, which {kind} has no place for. {WEIGHTS_ONLY}")
    counts = some([f"{count:g}" for count in sorted({float(step) for step in steps.values()})])
    if ", " in counts:
        raise CheckpointError(
            f"{source} has parameters that were updated a different number of times ({counts} steps); optax counts once for all of them. {WEIGHTS_ONLY}"
        )
    notes = [f"{kind}, {len(groups)} param group{'s' if len(groups) > 1 else ''}: {how}"]
    absent = [f"{len(of_number) - len(found)} of {len(of_number)} {name}" for name, found in tensors.items() if len(found) < len(of_number)]
    if absent and not (kind == "sgd" and not any(group.get("momentum") for group in groups)):
        notes.append(f"absent, as before the first step: {', '.join(absent)}; they start at zero")
    made = tuple(
        Group({name: value for name, value in group.items() if name not in ("params", "param_names")}, tuple(entries[key].flax_path for key in names))
        for group, names in zip(groups, keys, strict=True)
    )
    return OptimizerState(kind, made, tensors, steps, tuple(notes))


ENTRIES = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "opt", "optimizer_states")
"""Entries of a training checkpoint that hold it; Lightning keeps a list under the last."""


def find(extras: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The state dict of an optimizer among the entries of a training checkpoint, with the entry's name; None where there is none."""
    for name in ENTRIES:
        value = extras.get(name)
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        if isinstance(value, Mapping) and "param_groups" in value:
            return name, value
    return None


_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sgd": {"lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False}
        | {"foreach": None, "differentiable": False, "fused": None},
        "adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False, "foreach": None}
        | {"capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": False},
        "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": False, "maximize": False, "foreach": None}
        | {"capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True},
    }
)
"""torch's options and their defaults."""


def fresh(kind: str, state_map: StateMap, *, decay_kernels_only: bool = True, **options: Any) -> OptimizerState:
    """An optimizer before its first step, for a run that begins in JAX.

    Args:
      kind: ``"sgd"``, ``"adam"`` or ``"adamw"``.
      state_map: Of the model.
      decay_kernels_only: Two param groups: kernels decay; biases and norm scales, in the second group, do not.
      **options: torch's names: ``lr``, ``momentum``, ``weight_decay`` ...
    """
    settings = {**_DEFAULTS[kind], **options}
    paths = [entry.flax_path for entry in trainable(state_map)]
    kernels, others = (tuple(path for path in paths if (path[-1] == "kernel") == wanted) for wanted in (True, False))
    groups = (Group(settings, kernels), Group({**settings, "weight_decay": 0.0}, others)) if decay_kernels_only else (Group(settings, tuple(paths)),)
    return OptimizerState(kind, groups, {name: {} for name in KINDS[kind].tensors})


def write(state: OptimizerState, state_map: StateMap) -> dict[str, Any]:
    """The state dict that ``torch.optim.Optimizer.load_state_dict`` takes, with numpy arrays for tensors; the exact inverse of :func:`read`.

    Args:
      state: The optimizer.
      state_map: Of the model.
    """
    entries = {entry.flax_path: entry for entry in trainable(state_map)}
    per_parameter: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    number = 0
    for group in state.groups:
        groups.append({**group.options, "params": list(range(number, number + len(group.paths)))})
        for path in group.paths:
            entry = entries[path]
            found: dict[str, Any] = {}
            if entry.flax_path in state.steps:
                found["step"] = state.steps[entry.flax_path]
            found |= {name: entry.codec.to_torch(t[entry.flax_path]) for name, t in state.tensors.items() if entry.flax_path in t}
            if found:
                per_parameter[number] = found
            number += 1
    return {"state": per_parameter, "param_groups": groups}


def _kind(groups: Sequence[Mapping[str, Any]], kind: str | None, source: str) -> str:
    options = set(groups[0])
    if kind is not None:
        if kind not in KINDS:
            raise CheckpointError(f"{source}: optimizer {kind!r} is unknown; known: {', '.join(KINDS)}.")
        return kind
    if {"momentum", "dampening", "nesterov"} <= options:
        return "sgd"
    if {"betas", "eps", "amsgrad"} <= options:
        if "decoupled_weight_decay" in options:
            return "adamw" if groups[0]["decoupled_weight_decay"] else "adam"
        if all(not group["weight_decay"] for group in groups):
            return "adam"  # without decay the two are the same
        raise CheckpointError(f"{source} is Adam or AdamW, which torch before 2.6 writes alike; they decay differently. Say which: --optimizer adam or adamw.")
    raise CheckpointError(
        f"{source} is no optimizer with a counterpart here (SGD, Adam, AdamW): its options are {some(sorted(options - {'params'}))}. {WEIGHTS_ONLY}"
    )


def _check_options(groups: Sequence[Mapping[str, Any]], kind: str, source: str) -> None:
    known = {*KINDS[kind].options, *KINDS[kind].only, *IGNORED, "params", "param_names", "decoupled_weight_decay"}
    for number, group in enumerate(groups):
        for name, value in KINDS[kind].only.items():
            if group.get(name, value) != value:
                raise CheckpointError(
                    f"{source}, param group {number}: {name}={group[name]!r} has no counterpart in optax (only {name}={value!r}). {WEIGHTS_ONLY}"
                )
        missing, other = [name for name in KINDS[kind].options if name not in group], sorted(set(group) - known)
        if missing or other:
            words = f"lacks {some(missing)}" if missing else f"has options that {kind} does not know: {some(other)}"
            raise CheckpointError(f"{source}, param group {number} {words}. {WEIGHTS_ONLY}")


def _splits(entries: Sequence[Entry]) -> dict[str, list[list[Entry]]]:
    """The usual ways to split parameters, each in the model's order."""

    def apart(words: str, first: Callable[[Entry], bool]) -> dict[str, list[list[Entry]]]:
        yes, no = [e for e in entries if first(e)], [e for e in entries if not first(e)]
        return {f"{words} first": [yes, no], f"{words} last": [no, yes]}

    kernels, biases = [e for e in entries if e.flax_path[-1] == "kernel"], [e for e in entries if e.flax_path[-1] == "bias"]
    scales = [e for e in entries if e.flax_path[-1] == "scale"]
    return {
        "all parameters in the model's order": [list(entries)],
        **apart("kernels", lambda e: e.flax_path[-1] == "kernel"),
        **apart("biases", lambda e: e.flax_path[-1] == "bias"),
        **apart("norms", lambda e: e.flax_path[-1] == "scale" or (e.flax_path[-1] == "bias" and "head" not in e.flax_path)),
        **apart("the head", lambda e: e.flax_path[0] == "head"),
        "kernels, norm scales, biases": [kernels, scales, biases],
        "kernels, biases, norm scales": [kernels, biases, scales],
        "norm scales, kernels, biases": [scales, kernels, biases],
    }


def _names(
    groups: Sequence[Mapping[str, Any]], numbers: list[list[int]], per_parameter: Mapping[int, Mapping[str, Any]], state_map: StateMap, source: str
) -> tuple[list[tuple[str, ...]], str]:
    """Names of the parameters of every group, and how they were found."""
    entries = trainable(state_map)
    known = {entry.torch_key for entry in entries}
    if all("param_names" in group for group in groups):
        named = [tuple(str(name).removeprefix("module.") for name in group["param_names"]) for group in groups]
        strangers = [name for names in named for name in names if name not in known]
        if strangers or sorted(name for names in named for name in names) != sorted(known):
            missing = sorted(known - {name for names in named for name in names})
            words = f"names {some(strangers)}, which the model does not have" if strangers else f"leaves out {some(missing)}"
            raise CheckpointError(f"{source} does not belong to this model: it {words}. {WEIGHTS_ONLY}")
        return named, "parameters by name"
    total = sum(map(len, numbers))
    if total != len(entries):
        raise CheckpointError(f"{source} does not belong to this model: it has {total} parameters, the model {len(entries)}. {WEIGHTS_ONLY}")

    def fits(split: list[list[Entry]]) -> bool:
        if [len(part) for part in split] != [len(group) for group in numbers]:
            return False
        pairs = ((n, e) for group, part in zip(numbers, split, strict=True) for n, e in zip(group, part, strict=True))
        return all(np.shape(v) == e.torch_shape for n, e in pairs for name, v in per_parameter.get(n, {}).items() if name != "step" and v is not None)

    found = {tuple(tuple(e.torch_key for e in part) for part in split): words for words, split in list(_splits(entries).items())[::-1] if fits(split)}
    if len(found) != 1:
        sizes = " + ".join(str(len(group)) for group in numbers)
        words = (
            "does not fit any of the usual ways to group the model's parameters"
            if not found
            else f"fits {len(found)} of the usual ways: {some(list(found.values()))}"
        )
        raise CheckpointError(
            f"{source} has param groups of {sizes} parameters, which {words}. Make it from named parameters, torch.optim.SGD(model.named_parameters()), "
            f"so that it carries their names. {WEIGHTS_ONLY}"
        )
    (names, how), *_ = found.items()
    return list(names), how
