"""The variables of a model by attribute path: read, set, and moved between host and device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resblock.config import Path
from flax_resblock.errors import InputError

_PASSING = nnx.Any(nnx.RngState, nnx.Intermediate)
KEPT = nnx.Not(_PASSING)
"""Filter of what a checkpoint of a model holds: not its random state, and nothing intermediate."""
STATISTICS = nnx.Not(nnx.Any(nnx.Param, _PASSING))
"""Filter of what it holds beside its parameters, such as running statistics."""


def refuse_integers(layer: nnx.Module, x: Any) -> None:
    """Raises InputError for an input of integers, such as pixels from 0 to 255, to a layer that
    multiplies it by weights. PyTorch refuses it as well.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise InputError(
            f"{type(layer).__name__} got {x.dtype} {tuple(x.shape)}; a network takes floating "
            f"images, normalised as in its training. flax_resblock.preprocess(images, model) makes "
            f"them from pixels or files."
        )


def variable_at(model: nnx.Module, path: tuple[Any, ...]) -> Any:
    """The variable or submodule at an attribute path, ``("stage1", 0, "conv1", "kernel")``."""
    node: Any = model
    for part in path:
        node = node[part] if isinstance(part, int) else getattr(node, part)
    return node


def fill(model: nnx.Module, values: Mapping[Path, np.ndarray]) -> None:
    """Gives every variable of a model its value, in the dtype of the value.

    Args:
      values: By attribute path, one for every variable.
    """
    set_values(model, on_device(values))


def set_values(model: nnx.Module, values: Mapping[Path, Any]) -> None:
    """As :func:`fill`, with values that are on their device already."""
    for path, value in values.items():
        variable_at(model, path).set_value(value)


def on_device(arrays: Mapping[Path, np.ndarray]) -> dict[Path, jax.Array | np.ndarray]:
    """Every array on jax's default device, which takes it over as it is where that is the CPU; kept
    by numpy where jax would narrow it and lose bits.
    """
    pairs = ((path, _as_jax_keeps_it(array)) for path, array in arrays.items())
    kept = {path: value for path, value in pairs if value is not None}
    put = jax.device_put(list(kept.values()), may_alias=True)  # in one call, as each has its price
    moved = dict(zip(kept, put, strict=True))
    return {path: moved[path] if path in moved else np.array(arrays[path]) for path in arrays}


def _as_jax_keeps_it(array: np.ndarray) -> np.ndarray | None:
    """The same values in a dtype that jax has: counters as int32; None where there is none."""
    narrow = jax.dtypes.canonicalize_dtype(array.dtype)
    if narrow == array.dtype:
        return array
    if array.dtype.kind not in "iu" or array.ndim:
        return None
    limits = np.iinfo(narrow)
    return array.astype(narrow) if limits.min <= int(array) <= limits.max else None


def flat_arrays(model: nnx.Module) -> dict[Path, np.ndarray]:
    """Every variable of a model by path, on the host, counters as int64."""
    flat: Any = nnx.to_flat_state(nnx.state(model, KEPT))
    return {
        path: np.asarray(variable[...], np.int64 if path[-1] == "num_batches_tracked" else None)
        for path, variable in flat
    }
