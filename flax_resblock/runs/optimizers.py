"""SGD, Adam and their relatives as PyTorch computes them, for optax; and a torch optimizer's state
as an optax state and back.

``optax.scale_by_adam`` computes the bias correction ``1 - b2**count`` in the precision of the
parameters. In float32 that difference of nearly equal numbers has lost four digits at the first
step (b2 = 0.999), so the first update is wrong by about 1e-5; PyTorch computes it in float64 on the
host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_resblock.config import Path
from flax_resblock.runs.optimizer_kinds import OPTIMIZERS
from flax_resblock.runs.optimizer_state import OptimizerState
from flax_resblock.runs.rule_optimizer import by_rule
from flax_resblock.runs.update_rules import bias_correction, corrected, log_of, rule_of

__all__ = [
    "adamw", "bias_correction", "moving", "optimizer_of", "parameter_path", "record_of",
    "scale_by_adam", "state_of",
]  # fmt: skip

Transformation = optax.GradientTransformationExtraArgs


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, number: int = 0
) -> Transformation:
    r"""``optax.scale_by_adam`` with an accurate bias correction; its state is optax's own
    ``ScaleByAdamState``.

    .. math:: u = \frac{m / (1 - b_1^t)}{\sqrt{v / (1 - b_2^t)} + \epsilon}

    Args:
      b1, b2: Decay of the first and second moment, PyTorch's ``betas``.
      eps: Added to the root.
      number: Of the param group; the argument ``momenta`` of ``update`` replaces its ``b1``.
    Reference: Kingma & Ba 2015, arXiv:1412.6980.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, momenta: Any = None, **_: Any
    ) -> Any:
        first, complement, log = moving([b1])[0].tolist() if momenta is None else momenta[number]
        count = jnp.asarray(optax.safe_increment(state.count))

        def averaged(m: jax.Array, g: jax.Array) -> jax.Array:
            return jnp.asarray(first, m.dtype) * m + jnp.asarray(complement, m.dtype) * g

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            by_first, by_second = (corrected(it, count, m.dtype) for it in (log, log_of(b2)))
            return (m / by_first) / (jnp.sqrt(v / by_second) + eps)

        mu = jax.tree.map(averaged, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return Transformation(optax.scale_by_adam(b1, b2, eps).init, update)


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, eps: float = 1e-8, weight_decay: float = 0.01
) -> optax.GradientTransformation:
    """``torch.optim.AdamW`` with its default betas: weight decay is decoupled from the
    gradient and multiplied by the learning rate.

    Args:
      learning_rate: Number, or a function of the step.
      eps: Added to the square root of the second moment.
      weight_decay: PyTorch's default is 0.01 (optax's is 1e-4).
    Reference: Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    return optax.chain(
        scale_by_adam(0.9, 0.999, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def parameter_path(keys: tuple[Any, ...]) -> Path:
    """The attribute path of a leaf of an nnx state."""
    return tuple(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))


def moving(momenta: Sequence[float]) -> np.ndarray:
    """Momenta (or Adam's first betas) of the param groups at one step, for :func:`optimizer_of`:
    ``(groups, 3)`` float64, the momentum, its complement and its logarithm, which would lose digits
    if they were computed from a float32 momentum."""
    return np.array([(value, 1 - value, log_of(value)) for value in map(float, momenta)])


def optimizer_of(record: OptimizerState) -> Transformation:
    r"""An optimizer as an optax transformation: :math:`p \leftarrow p + u` is torch's update.

    Every param group keeps its own rate, decay, momentum, betas and eps; they are joined by
    ``optax.partition``. Parameters in no group stay as they are. ``update`` takes two more
    arguments, so that a schedule can be computed on the host in float64, as torch does, and a new
    rate compiles nothing: ``learning_rates``, ``(groups,)``, and ``momenta``, from :func:`moving`;
    None leaves what the groups have. SGD and LARS keep torch's ``momentum_buffer`` in an
    ``optax.TraceState`` per group; Adam, AdamW and LAMB keep ``exp_avg`` and ``exp_avg_sq`` in an
    ``optax.ScaleByAdamState``. The trust ratio of LARS and LAMB is optax's, applied to the groups
    that have a coefficient for it.

    Args:
      record: The optimizer of a model whose parameters are an nnx state of ``nnx.Param``.
    Example:
      >>> optimizer = optimizer_of(record)
      >>> updates, state = optimizer.update(gradients, state, params, learning_rates=(0.1, 0.1))
      >>> params = optax.apply_updates(params, updates)
    """
    number_of = {path: number for number, group in enumerate(record.groups) for path in group.paths}
    partition = optax.partition(
        {
            **{
                number: _group_optimizer(record.kind, number, group.options)
                for number, group in enumerate(record.groups)
            },
            _IN_NO_GROUP: optax.set_to_zero(),
        },
        lambda params: jax.tree_util.tree_map_with_path(
            lambda keys, _: number_of.get(parameter_path(keys), _IN_NO_GROUP), params
        ),
    )
    if record.kind != "timm-lamb":
        return partition
    # which clips the norm of all gradients that torch has; it keeps moments of those alone
    counted = record.tensors["exp_avg"].keys() or number_of.keys()

    def update(updates: Any, state: Any, params: Any = None, **rates: Any) -> Any:
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        norm = optax.tree.norm([leaf for keys, leaf in leaves if parameter_path(keys) in counted])
        return partition.update(updates, state, params, gradient_norm=norm, **rates)

    return Transformation(partition.init, update)


_IN_NO_GROUP = -1


def _group_optimizer(kind: str, number: int, options: Mapping[str, Any]) -> Transformation:
    """The update of one param group, the ``number``-th."""
    rule = rule_of(kind, options)
    if rule is not None:
        first = options["betas"][0] if "betas" in options else options.get("momentum", 0)
        momentum = tuple(moving([first])[0].tolist())
        return by_rule(rule, OPTIMIZERS[kind], number, options, momentum)
    chained = _chained(kind, number, options)
    return optax.chain(optax.scale(-1.0), chained) if options.get("maximize") else chained


def _chained(kind: str, number: int, options: Mapping[str, Any]) -> Transformation:
    """The same where it consists of optax's transformations."""
    rate = _scale_by_rate(number, float(options["lr"]))
    amount = float(options["weight_decay"])
    decay = optax.add_decayed_weights(amount) if amount else optax.identity()
    if OPTIMIZERS[kind].counts:
        first, second = map(float, options["betas"])
        adam = scale_by_adam(first, second, float(options["eps"]), number=number)
        if kind == "adam":
            return optax.chain(decay, adam, rate)
        return optax.chain(adam, decay, _trust(kind, options), rate)
    momentum = _scale_by_momentum(number, options)
    if kind == "lars":  # which multiplies by the rate before the momentum, SGD after it
        return optax.chain(decay, _trust(kind, options), rate, momentum)
    return optax.chain(decay, momentum, rate)


def _trust(kind: str, options: Mapping[str, Any]) -> optax.GradientTransformation:
    coefficient = options.get("trust_coefficient")
    if not coefficient:
        return optax.identity()
    eps = float(options["eps"]) if kind == "lars" else 0.0  # LAMB's eps is Adam's
    return optax.scale_by_trust_ratio(trust_coefficient=float(coefficient), eps=eps)


def _scale_by_rate(number: int, rate: float) -> Transformation:
    def update(
        updates: Any, state: Any, params: Any = None, *, learning_rates: Any = None, **_: Any
    ) -> Any:
        now = rate if learning_rates is None else learning_rates[number]
        return jax.tree.map(lambda u: -(jnp.asarray(now, u.dtype) * u), updates), state

    return Transformation(lambda params: optax.EmptyState(), update)


def _scale_by_momentum(number: int, options: Mapping[str, Any]) -> Transformation:
    """``optax.trace`` with a momentum that may be given at each step."""
    own, nesterov = float(options["momentum"]), bool(options["nesterov"])

    def init(params: Any) -> optax.TraceState:
        return optax.TraceState(trace=jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: Any, params: Any = None, *, momenta: Any = None, **_: Any
    ) -> Any:
        if momenta is None and not own:
            return updates, state  # torch keeps no buffer without momentum
        momentum = own if momenta is None else momenta[number][0]

        def add(g: jax.Array, buffer: jax.Array) -> jax.Array:
            return g + jnp.asarray(momentum, g.dtype) * buffer

        trace = jax.tree.map(add, updates, state.trace)
        steps = jax.tree.map(add, updates, trace) if nesterov else trace
        return steps, optax.TraceState(trace=trace)

    return Transformation(init, update)


_FIELDS = {"trace": "momentum_buffer", "mu": "exp_avg", "nu": "exp_avg_sq"}
"""Field of an optax state that holds one value per parameter, and torch's name for it."""


def _tensor_at(keys: tuple[Any, ...]) -> tuple[str, Path] | None:
    """Torch's name of an optimizer's tensor and its parameter's path; None for a counter."""
    for index, key in enumerate(keys):
        if isinstance(key, jax.tree_util.GetAttrKey) and key.name == "tensors":
            return keys[index + 1].key, parameter_path(keys[index + 2 :])
        if isinstance(key, jax.tree_util.GetAttrKey) and key.name in _FIELDS:
            return _FIELDS[key.name], parameter_path(keys[index:])
    return None


def state_of(record: OptimizerState, params: Any, fresh: Any = None) -> Any:
    """The optax state for :func:`optimizer_of`, filled with what torch had, in torch's dtypes; what
    torch had not made yet is as torch would make it. ``fresh`` is what :func:`optimizer_of` starts
    with for these parameters, where it is known."""
    if fresh is None:
        fresh = optimizer_of(record).init(params)
    made = any(record.tensors.values())
    count = int(float(next(iter(record.steps.values()), int(made))))

    def filled(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        place = _tensor_at(keys)
        if place is None:
            return jnp.asarray(count, leaf.dtype)
        name, path = place
        value = record.tensors[name].get(path)
        return leaf if value is None else jnp.array(value)

    return jax.tree_util.tree_map_with_path(filled, fresh)


def record_of(record: OptimizerState, state: Any) -> OptimizerState:
    """The torch optimizer ``record``, with what the state of :func:`optimizer_of` holds now."""
    kind = OPTIMIZERS[record.kind]
    now: dict[str, dict[Path, np.ndarray]] = {name: {} for name in record.tensors}
    count = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        place = _tensor_at(keys)
        if place is None:
            count = int(leaf)
        else:
            now[place[0]][place[1]] = np.asarray(leaf)
    tensors: dict[str, dict[Path, np.ndarray]] = {}
    for name, before in record.tensors.items():
        having = (group for group in record.groups if kind.has(name, group.options))
        kept = {path for group in having for path in group.paths}
        # torch makes a parameter's tensors at its first step
        moved = not kind.counts and any(map(np.any, now[name].values()))
        stepped = bool(before) or count > 0 or moved
        paths = [path for path in now[name] if stepped and (path in kept or path in before)]
        tensors[name] = {path: now[name][path] for path in paths}
    if not kind.counts:
        return replace(record, tensors=tensors, steps={})
    like = next(iter(record.steps.values()), np.zeros((), np.float32))
    steps = {path: np.asarray(count, like.dtype) for path in tensors[kind.tensors[0]]}
    return replace(record, tensors=tensors, steps=steps)
