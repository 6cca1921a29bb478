"""The optimizer of DeepSpeed's ZeRO, stages 1 and 2, put together of the shards of all processes.

Each process keeps a part of every param group as one flat vector: the trained weights in float32,
and what the optimizer keeps of them. ``param_slice_mappings`` says where each parameter's part is.
That the weights in the shards round to those of the model shows that it was read rightly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.folders import ZERO_MODEL, ZERO_SHARD
from flax_resblock.checkpoint.limits import Limits, check_files
from flax_resblock.checkpoint.record import Record
from flax_resblock.checkpoint.torch_file import load_torch, plain
from flax_resblock.checkpoint.zero_writing import ALIGNED, LAYOUT, PLACES, VECTORS
from flax_resblock.errors import CheckpointError, damaged, raised, some

_AGAIN = "Copy the folder again, with the shards of all processes."


def with_optimizer(record: Record, files: Sequence[Path], limits: Limits) -> Record:
    """A file of model states, whose entry ``optimizer`` is empty, with the optimizer of all shards,
    and its weights in float32. The optimizer has numbers for parameters, and their names beside
    them. Raises CheckpointError for shards that are damaged, missing, or of another model."""
    where = f"{files[0].parent}, its shards of the optimizer"
    count = record.extras.get("dp_world_size")
    numbers = [int(found[1]) for one in files if (found := ZERO_SHARD.fullmatch(one.name))]
    if record.extras.get("mp_world_size") != 1 or numbers != list(range(count or 0)):
        raise CheckpointError(
            f"{where} are those of the processes {some([str(n) for n in numbers])}, where the "
            f"model was trained by {count} with {record.extras.get('mp_world_size')} parts of it. "
            f"{_AGAIN}"
        )
    check_files(list(files), limits, files[0].parent)
    parts = [plain(load_torch(one, limits)) for one in files]
    words = f"{where} are not those that ZeRO writes in its stages 1 and 2, or are damaged"
    with damaged(words, _AGAIN, says=raised):
        states = [part["optimizer_state_dict"] for part in parts]
        merged = _merged(states)
        groups = _groups(states[0], record.extras["param_shapes"])
        prefix = files[0].name.partition("zero_pp_rank")[0]
        names = {"prefix": prefix, "version": record.extras["ds_version"]}
        layout = {**_layout(states, groups), **names}
    own = {record.names.get(name, name): name for name in record.tensors}
    tensors = {
        name: value.astype(np.float32) if value.dtype.itemsize == 2 else value
        for name, value in record.tensors.items()
    }
    state: dict[int, dict[str, Any]] = {}
    names = [name for group in groups for name in group["param_names"]]
    for number, name in enumerate(names):
        weight = record.tensors.get(own.get(name, ""))
        found = merged[name]
        trained = found.pop("")
        if weight is None or trained.size != weight.size:
            raise CheckpointError(
                f"{where} have {trained.size} elements of {name[:120]!r}, and the model "
                f"{'none' if weight is None else weight.size}. {_AGAIN}"
            )
        if not np.array_equal(trained.astype(weight.dtype), weight.ravel(), equal_nan=True):
            raise CheckpointError(
                f"{where} hold other weights of {name[:120]!r} than {ZERO_MODEL}: they were "
                f"written at another step, or are not of this model. {_AGAIN}"
            )
        tensors[own[name]] = trained.reshape(weight.shape)
        state[number] = {
            key: value if np.ndim(value) == 0 else value.reshape(weight.shape)
            for key, value in found.items()
        }
    optimizer = {"state": state, "param_groups": groups}
    extras = {**record.extras, "optimizer": optimizer, LAYOUT: layout}
    clipping = {"gradient_clipping": states[0].get("clip_grad", 0.0)}
    extras |= {"ds_config": {**clipping, **(record.extras.get("ds_config") or {})}}
    scaler = states[0].get("loss_scaler")
    extras |= {"loss_scaler": dict(scaler)} if isinstance(scaler, Mapping) else {}
    notes = (*record.notes, f"weights and optimizer are those of {len(files)} shards of ZeRO")
    return replace(record, tensors=tensors, extras=extras, notes=notes)


def _merged(states: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By parameter, what the optimizer keeps of it, flat; its weights have the name ``""``."""
    found: dict[str, dict[str, list[Any]]] = {}
    for state in states:
        kept = state["base_optimizer_state"]["state"]
        pairs = zip(state[PLACES], state[VECTORS], strict=True)
        for number, (places, weights) in enumerate(pairs):
            values = {"": weights, **kept[number]}
            for name, place in places.items():
                start, end = place["start"], place["start"] + place["numel"]
                for key, value in values.items():
                    part = value if np.ndim(value) == 0 else value[start:end]
                    if np.ndim(value) == 1 and part.size != place["numel"]:
                        raise ValueError(f"the part of {name[:120]} reaches beyond its vector")
                    found.setdefault(name, {}).setdefault(key, []).append(part)
    return {
        name: {key: _together(key, parts) for key, parts in values.items()}
        for name, values in found.items()
    }


def _together(key: str, parts: Sequence[Any]) -> Any:
    if np.ndim(parts[0]):
        return np.concatenate(parts)
    if any(part != parts[0] for part in parts):
        raise ValueError(f"the processes have different values of {key}")
    return parts[0]


def _groups(state: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The param groups with the numbers and names of their parameters."""
    made, first = [], 0
    options = state["base_optimizer_state"]["param_groups"]
    for group, names in zip(options, shapes, strict=True):
        members = list(range(first, first := first + len(names)))
        made.append({**group, "params": members, "param_names": list(names)})
    return made


def _layout(states: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> Any:
    """The parts of every process, by param group: number in the group, start and length, and the
    lengths of the vectors, of which those of the optimizer have a padding."""
    numbers = [{name: n for n, name in enumerate(group["param_names"])} for group in groups]
    parts, lengths = [], []
    for state in states:
        parts.append(
            [
                [[of[name], int(p["start"]), int(p["numel"])] for name, p in places.items()]
                for of, places in zip(numbers, state[PLACES], strict=True)
            ]
        )
        kept = [state["base_optimizer_state"]["state"][n].values() for n in range(len(groups))]
        lengths.append(
            [
                [len(weights), max((len(v) for v in values if np.ndim(v)), default=len(weights))]
                for weights, values in zip(state[VECTORS], kept, strict=True)
            ]
        )
    paddings = [state.get(ALIGNED) for state in states]
    return {"parts": parts, "lengths": lengths, "paddings": paddings}
