"""Values that no healthy checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flax_resblock.checkpoint.parallel import on_every_core
from flax_resblock.convert.state_map import Entry, TensorMap, is_floating


def unhealthy(state_map: TensorMap, state: Mapping[str, np.ndarray]) -> list[str]:
    """Tensors with NaN, infinity or a negative running variance; one line each."""
    entries = [
        e
        for e in state_map.entries
        if e.role not in ("counter", "buffer")
        and e.torch_key in state
        and is_floating(state[e.torch_key].dtype)
    ]
    problems = on_every_core(
        lambda entry: _problem(entry, state[entry.torch_key]),
        entries,
        lambda entry: state[entry.torch_key].nbytes,
    )
    return [problem for problem in problems if problem]


def _problem(entry: Entry, values: np.ndarray) -> str:
    if values.dtype.kind != "f":
        values = values.astype(np.float32)
    if entry.role != "variance" and values.dtype.itemsize >= 4:
        flat = values.reshape(-1)
        with np.errstate(all="ignore"):
            # One pass at memory speed: NaN and infinity cannot hide in a sum of squares.
            if np.isfinite(np.dot(flat, flat)):
                return ""
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad:
        return f"{entry.torch_key} ({bad} of {values.size} values not finite)"
    if entry.role == "variance" and values.size and float(np.min(values)) < 0:
        return f"{entry.torch_key} (negative variance {float(np.min(values)):.3g})"
    return ""
