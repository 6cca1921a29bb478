"""The random numbers of a training step: those of dropout and its relatives.

They depend on the seed, the number of the step and the piece of the batch, and on nothing else. A
run that was interrupted draws what it would have drawn, and no checkpoint holds a random state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resblock.nn.variables import KEPT


def random_state(model: nnx.Module) -> nnx.State | None:
    """What a model holds that no checkpoint does: its random streams; None if nothing."""
    rest = nnx.state(model, nnx.Not(KEPT))
    return rest if jax.tree.leaves(rest) else None


def step_key(seed: int, step: Any, piece: Any = 0) -> jax.Array:
    """The key of a piece of a step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), piece)


def drawn(rest: nnx.State, key: jax.Array) -> nnx.State:
    """The random streams of a model, each begun anew from this key and its own place."""
    leaves, structure = jax.tree.flatten(rest)
    return jax.tree.unflatten(
        structure,
        [_anew(leaf, jax.random.fold_in(key, place)) for place, leaf in enumerate(leaves)],
    )


def _anew(leaf: Any, key: jax.Array) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(key, leaf.shape) if leaf.shape else key
    return jnp.zeros_like(leaf)
