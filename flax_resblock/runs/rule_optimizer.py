"""A rule of :mod:`flax_resblock.runs.update_rules` as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from flax_resblock.runs.optimizer_kinds import OptimizerKind
from flax_resblock.runs.update_rules import Moved, ParameterStep


class RuleState(NamedTuple):
    """What a rule keeps: the number of updates, and tensors by torch's name."""

    updates: Array
    tensors: dict[str, Any]


def by_rule(
    rule: Callable[[ParameterStep], Moved],
    kind: OptimizerKind,
    number: int,
    options: Mapping[str, Any],
    momentum: tuple[float, float, float],
) -> optax.GradientTransformationExtraArgs:
    """A rule as the update of the param group ``number``; ``momentum`` as in
    :class:`~flax_resblock.runs.update_rules.ParameterStep`, which the argument ``momenta`` of
    ``update`` replaces."""
    names = [name for name in kind.tensors if kind.has(name, options)]

    def init(params: Any) -> RuleState:
        def made(name: str) -> Any:
            value = kind.beginning(name, options)
            if name in kind.scalars:
                return jax.tree.map(lambda _: jnp.full((), value, jnp.float32), params)
            return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params)

        return RuleState(jnp.zeros((), jnp.int32), {name: made(name) for name in names})

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        learning_rates: Any = None,
        momenta: Any = None,
        gradient_norm: Any = None,
        **_: Any,
    ) -> tuple[Any, RuleState]:
        rate = float(options["lr"]) if learning_rates is None else learning_rates[number]
        moving = momentum if momenta is None else tuple(momenta[number])
        count = jnp.asarray(optax.safe_increment(state.updates))

        def moved(gradient: Array, value: Array, *kept: Array) -> Moved:
            gradient = -gradient if options.get("maximize") else gradient
            own = dict(zip(names, kept, strict=True))
            return rule(
                ParameterStep(value, gradient, own, count, rate, moving, gradient_norm, options)
            )

        leaves, structure = jax.tree.flatten(updates)
        columns = [jax.tree.leaves(tree) for tree in (params, *(state.tensors[n] for n in names))]
        rows = [moved(*row) for row in zip(leaves, *columns, strict=True)]

        def joined(values: list[Array]) -> Any:
            return jax.tree.unflatten(structure, values)

        tensors = {name: joined([row.kept[name] for row in rows]) for name in names}
        return joined([row.by for row in rows]), RuleState(count, tensors)

    return optax.GradientTransformationExtraArgs(init, update)
