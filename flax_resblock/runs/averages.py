"""Averaged weights of a PyTorch program, as this library's and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flax_resblock.checkpoint.unwrap import strip
from flax_resblock.config import Path
from flax_resblock.convert.run_names import EMA
from flax_resblock.convert.state_map import TensorMap, describe
from flax_resblock.errors import CheckpointError
from flax_resblock.runs.param_groups import WEIGHTS_ONLY


@dataclass(frozen=True)
class AverageEntry:
    """How a program writes averaged weights: the name of the entry, what stands before every name
    of a tensor (as AveragedModel's ``"module."``), and what it counts beside them, as
    ``n_averaged``."""

    name: str = EMA
    prefix: str = ""
    counters: Mapping[str, int] = field(default_factory=dict)

    def written(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The entry with these values."""
        counted = {name: np.asarray(n, np.int64) for name, n in self.counters.items()}
        return counted | {f"{self.prefix}{name}": value for name, value in tensors.items()}


def read_average(
    state: Any, state_map: TensorMap, name: str, source: str
) -> tuple[dict[Path, np.ndarray], AverageEntry]:
    """Averages by Flax path, and their form; raises CheckpointError if they are another model's."""
    where = f"{source}, entry '{name}'"
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{where} holds no averaged weights, but a {type(state).__name__}. {WEIGHTS_ONLY}"
        )
    arrays = {str(key): value for key, value in state.items() if isinstance(value, np.ndarray)}
    tensors = strip(arrays, [])
    misfit = state_map.check(describe(tensors))
    if len(misfit):
        raise CheckpointError(
            f"{where} is not the state of this model: "
            f"{'; '.join(line.strip() for line in misfit.lines())}. {WEIGHTS_ONLY}"
        )
    first = next(iter(tensors))
    whole = next((key for key in arrays if key.endswith(first)), first)
    prefix = whole.removesuffix(first)
    prefix = prefix if all(f"{prefix}{key}" in arrays for key in tensors) else ""
    strays = [key for key in arrays if key.removeprefix(prefix) not in tensors]
    counters = {key: int(arrays[key]) for key in strays if arrays[key].size == 1}
    return state_map.to_flax(tensors), AverageEntry(name, prefix, counters)
