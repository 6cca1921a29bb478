"""A model in training, split into its structure and what a step changes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from flax_resblock.errors import InputError
from flax_resblock.nn.variables import STATISTICS
from flax_resblock.training.devices import Placement


class TrainState(NamedTuple):
    """What a training step changes.

    Attributes:
      ema: Averages of ``(params, stats)``; None if none are kept.
    """

    params: nnx.State
    stats: nnx.State
    opt_state: Any
    ema: tuple[nnx.State, nnx.State] | None = None


class Leaves:
    """A training state as the list of its arrays, which are handed over. Steps pass the list on
    instead of visiting every variable of the model, which takes milliseconds.
    """

    def __init__(self, state: TrainState) -> None:
        self.arrays, self.structure = jax.tree.flatten(state)

    @property
    def state(self) -> TrainState:
        """The current state."""
        return jax.tree.unflatten(self.structure, self.arrays)


def split(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    *,
    freeze: Collection[str] = (),
    placement: Placement | None = None,
) -> tuple[nnx.GraphDef[Any], TrainState]:
    """Splits a model into its structure, in training mode except for the frozen parts, and a fresh
    training state.

    The state holds copies, because a training step donates its input. What the model draws random
    numbers with is in neither; see :mod:`flax_resblock.training.randomness`.

    Args:
      model: Is not changed.
      freeze: Parts in evaluation mode, by attribute: ``"stem"``, ``"stage1"`` ...
    Raises:
      InputError: float64 values while jax's x64 mode is off; they would be narrowed silently.
    """
    placement = placement or Placement()
    graphdef, values = nnx.split(model)
    training = nnx.merge(graphdef, values)
    training.train()
    for part in freeze:
        for _, module in nnx.iter_modules(getattr(training, part)):
            if isinstance(module, nnx.Module):
                module.eval()
    graphdef, params, stats, _ = nnx.split(training, nnx.Param, STATISTICS, ...)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((params, stats)) if leaf.dtype.kind == "f"}
    wide = {str(dtype) for dtype in dtypes if jax.dtypes.canonicalize_dtype(dtype) != dtype}
    if wide:
        raise InputError(
            f"the model's values are {', '.join(sorted(wide))}, which jax would narrow. Turn "
            f"on jax_enable_x64, or convert to float32 first."
        )
    params, stats = placement.copies((params, stats))
    # in one program, instead of one for every shape
    opt_state = jax.jit(optimizer.init, out_shardings=placement.copied)(params)
    return graphdef, TrainState(params, stats, opt_state)


def by_path(values: nnx.State) -> dict[tuple[Any, ...], np.ndarray]:
    """Arrays by attribute path; counters as int64, as in checkpoints."""
    return {
        path: np.asarray(leaf[...], np.int64 if path[-1] == "num_batches_tracked" else None)
        for path, leaf in nnx.to_flat_state(values)
    }
