"""DeepSpeed's files for a run that goes back: the model's, and the shards of ZeRO's optimizer as
they were when it came.

They have no objects of DeepSpeed's own classes, which it does not need to go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.folders import ZERO_MODEL

LAYOUT = "zero_layout"
"""Entry of a run that says which part of each parameter the processes have, for the way back."""
VECTORS, PLACES = "single_partition_of_fp32_groups", "param_slice_mappings"
ALIGNED = "param_alignment_paddings"


def shard_names(path: Path, extras: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The names of the files beside the model's for these entries of a run; none beside others."""
    layout = (extras or {}).get(LAYOUT)
    if path.name != ZERO_MODEL or layout is None:
        return ()
    ranks = range(len(layout["parts"]))
    return tuple(f"{layout['prefix']}zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in ranks)


def taken_apart(
    tensors: Mapping[str, np.ndarray], extras: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The inverse of :func:`flax_resblock.checkpoint.zero_shards.with_optimizer`: the entries of
    the model's file beside the weights, and the shards, none without ZeRO."""
    steps, layout = extras.get("step", 0), extras.get(LAYOUT)
    counts = {"global_steps": steps, "skipped_steps": 0, "mp_world_size": 1, "dp_world_size": 1}
    made = {"lr_scheduler": None, **extras, **counts}
    if layout is None:
        return made, []
    groups, kept = extras["optimizer"]["param_groups"], extras["optimizer"]["state"]
    names = [group["param_names"] for group in groups]
    values = [
        [{"": tensors[name], **kept.get(number, {})} for name, number in zip(*pair, strict=True)]
        for pair in zip(names, (group["params"] for group in groups), strict=True)
    ]
    done = [[0] * len(group) for group in names]
    shards = []
    each = (layout[name] for name in ("parts", "lengths", "paddings"))
    for parts, lengths, paddings in zip(*each, strict=True):
        vectors = []
        for places, (short, long), of, begun in zip(parts, lengths, values, done, strict=True):
            made_of: dict[str, Any] = {}
            for number, start, count in places:
                for key, value in of[number].items():
                    if np.ndim(value):
                        size = long if key else short
                        vector = made_of.setdefault(key, np.zeros(size, value.dtype))
                        part = value.ravel()[begun[number] : begun[number] + count]
                        vector[start : start + count] = part
                    else:
                        made_of[key] = value
                begun[number] += count
            vectors.append(made_of)
        options = [
            {k: v for k, v in group.items() if k != "param_names"} | {"params": [n]}
            for n, group in enumerate(groups)
        ]
        mappings = [
            {of[number]: {"start": start, "numel": count} for number, start, count in places}
            for of, places in zip(names, parts, strict=True)
        ]
        content = {
            VECTORS: [vector.pop("") for vector in vectors],
            "base_optimizer_state": {"state": dict(enumerate(vectors)), "param_groups": options},
            PLACES: mappings,
            "ds_version": layout["version"],
            **({} if paddings is None else {ALIGNED: paddings}),
        }
        shards.append({"optimizer_state_dict": content, "ds_version": layout["version"]})
    shapes = [{name: tensors[name].shape for name in group} for group in names]
    made |= {"optimizer": None, "param_shapes": shapes, "dp_world_size": len(shards)}
    del made[LAYOUT]
    return {**made, "ds_version": layout["version"]}, shards
