"""Which parameter of the model each number of a torch optimizer stands for.

A torch optimizer numbers its parameters, and its state dict names them only if the optimizer was
made from named parameters. Otherwise the names are found by trying the usual ways to split the
parameters into groups; exactly one of them has to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from flax_resblock.checkpoint.unwrap import shared_prefixes
from flax_resblock.convert.state_map import Entry, TensorMap
from flax_resblock.errors import CheckpointError, some

WEIGHTS_ONLY = "Go on with the weights alone (`flax_resblock.load`): they do not depend on it."
"""Ends the message of every refusal of a run."""


def kind_of(entry: Entry) -> str:
    """``"kernel"``, ``"scale"`` or ``"bias"``; a parameter of another name, such as an embedding of
    positions, is a kernel if it has several axes, else a scale."""
    name = str(entry.flax_path[-1])
    if name in ("kernel", "scale", "bias"):
        return name
    return "kernel" if len(entry.flax_shape) > 1 else "scale"


def _splits(entries: Sequence[Entry]) -> dict[str, list[list[Entry]]]:
    """The usual ways to split parameters, each in the model's order."""

    def apart(words: str, first: Callable[[Entry], bool]) -> dict[str, list[list[Entry]]]:
        yes, no = [e for e in entries if first(e)], [e for e in entries if not first(e)]
        return {f"{words} first": [yes, no], f"{words} last": [no, yes]}

    norms = {e.flax_path[:-1] for e in entries if e.flax_path[-1] == "scale"}
    last = {e.flax_path[0] for e in entries[-1:]}
    kernels, biases, scales = (
        [e for e in entries if kind_of(e) == what] for what in ("kernel", "bias", "scale")
    )
    return {
        "all parameters in the model's order": [list(entries)],
        **apart("kernels", lambda e: kind_of(e) == "kernel"),
        **apart("biases", lambda e: kind_of(e) == "bias"),
        **apart("norms", lambda e: e.flax_path[:-1] in norms),
        **apart("the head", lambda e: e.flax_path[0] in last),
        "kernels, norm scales, biases": [kernels, scales, biases],
        "kernels, biases, norm scales": [kernels, biases, scales],
        "norm scales, kernels, biases": [scales, kernels, biases],
    }


def names_of(
    groups: Sequence[Mapping[str, Any]],
    numbers: list[list[int]],
    per_parameter: Mapping[int, Mapping[str, Any]],
    state_map: TensorMap,
    source: str,
) -> tuple[list[tuple[str, ...]], str]:
    """The names in the model of the parameters of every group, and how they were found. The shapes
    of ``per_parameter``, what the optimizer keeps of each number, tell parameters apart. Raises
    CheckpointError if they are not this model's, or if more than one way to name them fits."""
    entries = state_map.parameters
    known = {entry.torch_key for entry in entries}
    trained = [entry for entry in entries if entry.trained]
    if all("param_names" in group for group in groups):
        named = [tuple(map(str, group["param_names"])) for group in groups]
        if not known.issuperset(chain(*named)):
            wrapped = "".join(shared_prefixes(chain(*named)))
            named = [tuple(name.removeprefix(wrapped) for name in names) for names in named]
        given = list(chain(*named))
        strangers = [name for name in given if name not in known]
        missing = sorted({entry.torch_key for entry in trained} - set(given))
        if strangers or missing or len(given) != len(set(given)):
            words = f"leaves out {some(missing)}"
            if strangers:
                words = f"names {some(strangers)}, which the model does not have"
            raise CheckpointError(
                f"{source} does not belong to this model: it {words}. {WEIGHTS_ONLY}"
            )
        return named, "parameters by name"
    total = sum(map(len, numbers))
    asking = [entry for entry in entries if not entry.frozen]
    if total not in (len(entries), len(asking), len(trained)):
        raise CheckpointError(
            f"{source} does not belong to this model: it has {total} parameters, the model "
            f"{len(entries)}. {WEIGHTS_ONLY}"
        )

    def fits(split: list[list[Entry]]) -> bool:
        if [len(part) for part in split] != [len(group) for group in numbers]:
            return False
        pairs = zip(chain(*numbers), chain(*split), strict=True)
        return all(
            np.shape(v) == e.torch_shape
            for n, e in pairs
            for name, v in per_parameter.get(n, {}).items()
            if v is not None and np.size(v) != 1
        )

    found = {
        tuple(tuple(e.torch_key for e in part) for part in split): words
        for members in (trained, asking, entries)
        for words, split in list(_splits(members).items())[::-1]
        if fits(split)
    }
    if len(found) != 1:
        sizes = " + ".join(str(len(group)) for group in numbers)
        words = "does not fit any of the usual ways to group the model's parameters"
        if found:
            words = f"fits {len(found)} of the usual ways: {some(list(found.values()))}"
        raise CheckpointError(
            f"{source} does not say in which order it has its parameters, and that cannot be "
            f"known: it has param groups of {sizes} parameters, which {words}. Make it from "
            f"named parameters, torch.optim.SGD(model.named_parameters()), "
            f"so that it carries their names. {WEIGHTS_ONLY}"
        )
    (names, how), *_ = found.items()
    return list(names), how


def numbered(
    groups: Sequence[Mapping[str, Any]], per_parameter: Mapping[Any, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[int, Mapping[str, Any]]]:
    """Param groups and state with numbers, where FSDP and distributed checkpoints have names."""
    keys = [key for group in groups for key in group["params"]]
    number_of: dict[Any, Any] = {key: key for key in keys}
    named = are_names(keys)
    if named:
        number_of = {key: number for number, key in enumerate(keys)}
    made = []
    for group in groups:
        members = list(group["params"])
        names = {"param_names": members} if named else {}
        made.append({**group, **names, "params": [number_of[key] for key in members]})
    return made, {int(number_of.get(key, key)): found for key, found in per_parameter.items()}


def are_names(keys: Sequence[Any]) -> bool:
    """Whether the parameters of an optimizer have names in place of numbers."""
    return bool(keys) and all(isinstance(key, str) and not key.isdecimal() for key in keys)


def refuse_trained_elsewhere(
    per_parameter: Mapping[int, Mapping[str, Any]], of_number: Mapping[int, Entry], source: str
) -> None:
    """Raises CheckpointError for an optimizer that trains what the Flax network does not."""
    kept = [
        entry
        for number, entry in of_number.items()
        if any(value is not None for value in per_parameter.get(number, {}).values())
        and not entry.trained
    ]
    if not kept:
        return
    raise CheckpointError(
        f"{source} has trained {some([entry.torch_key for entry in kept])}, which training the "
        f"Flax network does not change: in the module that was ported, the output in evaluation "
        f"mode does not depend on them (as on auxiliary heads), or they have requires_grad=False. "
        f"In JAX it would be another run. {WEIGHTS_ONLY}"
    )
