"""What JAX programs save, as ``{name: array}``: collections of variables, wherever they lie.

A checkpoint may hold the variables themselves (``{"params": ..., "batch_stats": ...}``), a training
state around them, the state of an NNX module, or the two dictionaries of Haiku. Collections are
merged, as their modules have the same names, and the parts of a name are joined by dots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from flax_resblock.checkpoint.limits import Limits, array_bytes, check_content
from flax_resblock.checkpoint.record import Record
from flax_resblock.errors import CheckpointError, damaged, some, visible

Path = tuple[str, ...]

PARAMS, STATISTICS = "params", "batch_stats"
STATISTIC_NAMES = ("mean", "var", "num_batches_tracked")
"""Last parts of the names in the collection of statistics."""
_COLLECTIONS = (PARAMS, STATISTICS, "state")
"""Of variables: Linen's, and the one that Haiku's users call so."""
_LEAVES = ("value", "raw_value")
"""The one entry of an NNX variable, as it is saved."""
_AVERAGES: Mapping[Path, str] = {
    ("mean_ema", "average"): "mean",
    ("var_ema", "average"): "var",
    ("mean_ema", "counter"): "num_batches_tracked",
}
"""Haiku's moving averages: what of them is a running statistic, and its name."""
_SPARE = (("mean_ema", "hidden"), ("var_ema", "hidden"), ("var_ema", "counter"))
"""The others: the averages before the correction of their bias, and the same counter again."""
_BROADCAST = ("scale", "offset", "mean", "var")


ROOT = "root"
"""The entry of the metadata that names the module around all others in a file."""
METADATA = "flax_resblock"
"""Where this library's own metadata lie in a file: a JSON object of strings."""


def metadata_of(text: Any, source: str) -> dict[str, str]:
    """What this library wrote into a file as metadata; raises CheckpointError if it is damaged."""
    place = f"the entry {METADATA!r}, where this library keeps what it knows of a network"
    with damaged(f"{source}: {place}, is damaged", "Copy the file again."):
        return strings_of(text)


def strings_of(text: Any) -> dict[str, str]:
    """A JSON object of strings; raises ValueError or another error of json for anything else."""
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise ValueError("it is no object of strings")
    return found


def record_of_tree(
    content: Any, source: str, format_name: str, limits: Limits, metadata: Any = None
) -> Record:
    """The record of a tree that a JAX program saved: nested mappings, lists and tuples of arrays,
    and other values beside them. ``metadata`` is the text for :func:`metadata_of`, if there is one.

    Raises:
      CheckpointError: No arrays, several sets of variables, or two arrays of one name.
    """
    check_content(content, limits, array_bytes, source)
    told = {} if metadata is None else metadata_of(metadata, source)
    notes: list[str] = []
    place, variables, extras = _variables(content, source)
    if place:
        notes.append(f"the weights are those of entry '{'.'.join(place)}'")
    if extras:
        notes.append(f"left out beside the variables: {some(list(extras), 6)}")
    flat: dict[Path, np.ndarray] = {}
    for collection in variables.values() if is_variables(variables) else [variables]:
        for path, array in _leaves(collection):
            if path in flat:
                raise CheckpointError(
                    f"{source} has two arrays called {visible('.'.join(path))[:120]!r} in its "
                    f"collections. It is damaged."
                )
            flat[path] = array
    flat = _without_haiku(flat, notes)
    flat = _without_shared_root(flat, notes)
    tensors = {".".join(path): array for path, array in flat.items()}
    if len(tensors) != len(flat):
        raise CheckpointError(f"{source} has two arrays whose names are equal but for dots.")
    if not tensors:
        raise CheckpointError(f"{source} holds no arrays. Check that it is the right file.")
    return Record(source, format_name, tensors, told, tuple(notes), extras)


def is_variables(value: Any) -> bool:
    """Whether a value is a mapping with the parameters of a network among its entries."""
    return isinstance(value, Mapping) and isinstance(value.get(PARAMS), Mapping)


def tree_of(arrays: Mapping[str, Any], source: str, joint: str = "/") -> dict[str, Any]:
    """The tree of names whose parts ``joint`` separates, ``"params/conv_init/kernel"``; raises
    CheckpointError for a name that is there twice, or inside an array."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, leaf = name.split(joint)
        node: Any = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or leaf in node:
            raise CheckpointError(
                f"{source} has {visible(name)[:120]!r} twice, or inside an array. It is damaged."
            )
        node[leaf] = array
    return tree


def nested(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Linen's variables: nested dictionaries of the collections ``params`` and ``batch_stats``."""
    paths = paths_of(tensors, metadata)
    return tree_of({name: np.asarray(value) for name, value in paths.items()}, "it")


def has_statistics(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether any of the tensors belongs into the collection of statistics."""
    return any(name.rpartition(".")[2] in STATISTIC_NAMES for name in tensors)


def paths_of(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, collections: bool = True
) -> dict[str, np.ndarray]:
    """The same tensors under names that are paths, in the collections of Linen unless told not to
    be, and below the root that the metadata say."""
    found, root = {}, f"{metadata[ROOT]}/" if ROOT in metadata else ""
    for name, value in tensors.items():
        collection = f"{STATISTICS if has_statistics({name: value}) else PARAMS}/"
        collection = collection if collections else ""
        found[collection + root + name.replace(".", "/")] = value
    return found


def _variables(content: Any, source: str) -> tuple[Path, Any, dict[str, Any]]:
    """The variables in a tree: where they are, they, and the entries beside them."""
    if isinstance(content, list | tuple):  # (params, state)
        parts = [part for part in content if isinstance(part, Mapping) and part]
        if len(parts) not in (1, 2) or len(parts) != len(content):
            raise CheckpointError(
                f"{source} holds a {type(content).__name__} of {len(content)} values, and not the "
                f"parameters and the state of a network. Save one dictionary with both."
            )
        return (), dict(zip((PARAMS, "state"), parts, strict=False)), {}
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(content).__name__}, not the variables of a network."
        )
    if not is_variables(content):
        inner = {str(key): value for key, value in content.items() if _holds_variables(value)}
        if len(inner) > 1:
            raise CheckpointError(
                f"{source} holds several sets of variables: {some(list(inner))}. Save the one "
                f"that you want in a file of its own."
            )
        if not inner:
            return (), content, {}
        ((name, value),) = inner.items()
        place, found, beside = _variables(value, source)
        extras = {str(key): other for key, other in content.items() if str(key) != name}
        return (name, *place), found, {**extras, **beside}
    if is_variables(content[PARAMS]):  # the variables as a whole, under the name of a part
        place, found, beside = _variables(content[PARAMS], source)
        extras = {str(key): value for key, value in content.items() if key != PARAMS}
        return (PARAMS, *place), found, {**extras, **beside}
    extras = {str(key): value for key, value in content.items() if key not in _COLLECTIONS}
    return (), {key: content[key] for key in _COLLECTIONS if key in content}, extras


def _holds_variables(value: Any) -> bool:
    if is_variables(value):
        return True
    return isinstance(value, Mapping) and any(map(_holds_variables, value.values()))


def _leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, np.ndarray]]:
    """Every array of a tree and the path to it, without the wrapper of NNX's variables."""
    if isinstance(tree, np.ndarray | np.generic):
        yield path, np.asarray(tree)
        return
    if isinstance(tree, Mapping):
        if len(tree) == 1 and (only := next(iter(tree))) in _LEAVES and path:
            inner = tree[only]
            if isinstance(inner, np.ndarray | np.generic):
                yield path, np.asarray(inner)
                return
        items = [(key, value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = list(enumerate(tree))
    else:
        return
    for key, value in items:
        parts = (part for part in str(key).split("/") if part != "~")
        yield from _leaves(value, (*path, *parts))


def _without_haiku(flat: Mapping[Path, np.ndarray], notes: list[str]) -> dict[Path, np.ndarray]:
    """The same with Haiku's moving averages as running statistics; other trees as they are."""
    if not any(path[-2:] in _AVERAGES for path in flat):
        return dict(flat)
    found: dict[Path, np.ndarray] = {}
    spare = 0
    for path, array in flat.items():
        if path[-2:] in _SPARE:
            spare += 1
            continue
        if (name := _AVERAGES.get(path[-2:])) is not None:
            path = (*path[:-2], name)
        if path[-1] in _BROADCAST and array.shape[:-1] == (1, 1, 1):
            array = array.reshape(-1)
        found[path] = array
    notes.append(
        f"left out {spare} tensors of Haiku's moving averages: the averages before the correction "
        f"of their bias, and a second counter"
    )
    return found


def _without_shared_root(
    flat: Mapping[Path, np.ndarray], notes: list[str]
) -> dict[Path, np.ndarray]:
    """The same without the modules that are around everything."""
    paths, depth = list(flat), 0
    while paths and all(len(p) > depth + 2 and p[depth] == paths[0][depth] for p in paths):
        depth += 1
    if depth:
        notes.append(f"removed the prefix '{'.'.join(paths[0][:depth])}.' of every name")
    return {path[depth:]: array for path, array in flat.items()}
