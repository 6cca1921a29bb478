"""SGD and Adam as PyTorch computes them, for optax; and the way from a torch optimizer's state to
theirs and back.

``optax.scale_by_adam`` computes the bias correction ``1 - b2**count`` in the precision of the
parameters. In float32 that difference of nearly equal numbers has lost four digits at the first
step (b2 = 0.999), so the first update is wrong by about 1e-5; PyTorch computes it in float64 on the
host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_resblock.config import Path
from flax_resblock.runs.optimizer_state import KINDS, OptimizerState


def bias_correction(decay: float, count: jax.Array, dtype: Any) -> jax.Array:
    """``1 - decay**count``, accurate to the last bits of ``dtype`` at any count: ``-expm1(count *
    log(decay))``.

    Args:
      decay: Between 0 and 1.
      count: Updates so far, this one included; integer scalar.
      dtype: Floating dtype of the result.
    """
    return _bias_correction(_log(decay), count, dtype)


def _log(decay: float) -> float:
    return math.log(decay) if decay else -math.inf


def _bias_correction(log_decay: Any, count: jax.Array, dtype: Any) -> jax.Array:
    return -jnp.expm1(count.astype(dtype) * jnp.asarray(log_decay, dtype))


def _corrected(
    m: jax.Array, v: jax.Array, count: jax.Array, logs: tuple[Any, Any], eps: float
) -> jax.Array:
    """Adam's direction from its two moments; ``logs`` are the logarithms of the betas."""
    first, second = (_bias_correction(log, count, m.dtype) for log in logs)
    return (m / first) / (jnp.sqrt(v / second) + eps)


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    r"""``optax.scale_by_adam`` with an accurate bias correction; its state is optax's own
    ``ScaleByAdamState``.

    .. math:: u = \frac{m / (1 - b_1^t)}{\sqrt{v / (1 - b_2^t)} + \epsilon}

    Args:
      b1, b2: Decay of the first and second moment, PyTorch's ``betas``.
      eps: Added to the root.
    Reference: Kingma & Ba 2015, arXiv:1412.6980.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        return optax.scale_by_adam(b1, b2, eps).init(params)  # pyright: ignore[reportReturnType]

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)

        return jax.tree.map(
            lambda m, v: _corrected(m, v, count, (_log(b1), _log(b2)), eps), mu, nu
        ), optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Any = None,
) -> optax.GradientTransformation:
    """``torch.optim.AdamW``: weight decay is decoupled from the gradient and multiplied by the
    learning rate.

    Args:
      learning_rate: Number, or a function of the step.
      b1, b2, eps: See :func:`scale_by_adam`.
      weight_decay: PyTorch's default is 0.01 (optax's is 1e-4).
      mask: Which parameters decay, as for ``optax.adamw``.
    Reference: Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    return optax.chain(
        scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def path_of(keys: tuple[Any, ...]) -> Path:
    """The attribute path of a leaf of an nnx state."""
    return tuple(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))


def _each(function: Callable[..., Any], paths: Any, *trees: Any) -> Any:
    """``function(path, *leaves)`` for every leaf of trees of the same structure."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: function(path_of(keys), *leaves), paths, *trees
    )


def moving(momenta: Sequence[float]) -> np.ndarray:
    """Momenta (or Adam's first betas) of the param groups at one step, for :func:`optimizer_of`.

    Returns:
      ``(groups, 3)`` float64: the momentum, its complement and its logarithm, which would lose
      digits if they were computed from a float32 momentum.
    """
    return np.array(
        [(float(momentum), 1 - float(momentum), _log(float(momentum))) for momentum in momenta]
    )


def optimizer_of(record: OptimizerState) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer as an optax transformation: :math:`p \leftarrow p + u` is torch's update.

    Every param group keeps its own rate, decay, momentum, betas and eps. ``update`` takes two more
    arguments, so that a schedule can be computed on the host in float64, as torch does, and a new
    rate compiles nothing: ``learning_rates``, ``(groups,)``, and ``momenta``, from :func:`moving`;
    None leaves what the groups have. The state is optax's: ``TraceState`` for SGD and LARS,
    ``ScaleByAdamState`` for Adam, AdamW and LAMB, with what torch calls ``momentum_buffer``,
    ``exp_avg`` and ``exp_avg_sq``. LARS and LAMB are optax's, their trust ratio applied to the
    groups that have a coefficient for it.

    Args:
      record: The optimizer of a model whose parameters are an nnx state of ``nnx.Param``.
    Example:
      >>> optimizer = optimizer_of(record)
      >>> updates, state = optimizer.update(gradients, state, params, learning_rates=(0.1, 0.1))
      >>> params = optax.apply_updates(params, updates)
    """
    kind = KINDS[record.kind]
    group_of = {path: number for number, group in enumerate(record.groups) for path in group.paths}
    options = [group.options for group in record.groups]
    coupled = record.kind not in ("adamw", "lamb")

    def init(params: Any) -> Any:
        first, second = (
            jax.tree.map(jnp.zeros_like, params) for _ in range(2)
        )  # two, as a step that donates its state must not see a buffer twice
        return (
            optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=first, nu=second)
            if kind.counts
            else optax.TraceState(trace=first)
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        learning_rates: Any = None,
        momenta: Any = None,
        **_: Any,
    ) -> Any:
        rates = [group["lr"] for group in options] if learning_rates is None else learning_rates

        moved_by = (
            moving(
                [group["betas"][0] if kind.counts else group["momentum"] for group in options]
            ).tolist()
            if momenta is None
            else momenta
        )

        def decayed(path: Path, value: jax.Array, parameter: jax.Array) -> jax.Array:
            decay = float(options[group_of[path]]["weight_decay"])
            return value + decay * parameter if decay else value

        def scaled(path: Path, value: jax.Array) -> jax.Array:
            return jnp.asarray(rates[group_of[path]], value.dtype) * value

        def trusted(path: Path, value: jax.Array, parameter: jax.Array) -> jax.Array:
            option = options[group_of[path]]
            if not kind.adaptive or not option["trust_coefficient"]:
                return value
            eps = float(option["eps"]) if not kind.counts else 0.0  # LAMB's eps is Adam's
            ratio = optax.scale_by_trust_ratio(
                trust_coefficient=float(option["trust_coefficient"]), eps=eps
            )
            return ratio.update(value, ratio.init(parameter), parameter)[0]  # pyright: ignore[reportReturnType]

        def lowered(updates: Any) -> Any:
            return jax.tree.map(jnp.negative, updates)

        gradients = _each(decayed, updates, params) if coupled else updates
        if not kind.counts:
            early = kind.adaptive  # LARS multiplies by the rate before the momentum, SGD after it

            def moved(path: Path, g: jax.Array, buffer: jax.Array) -> jax.Array:
                momentum = moved_by[group_of[path]][0]
                return (
                    buffer if _is_zero(momentum) else g + jnp.asarray(momentum, g.dtype) * buffer
                )  # torch keeps no buffer without momentum

            def sgd(path: Path, g: jax.Array, buffer: jax.Array) -> jax.Array:
                momentum = moved_by[group_of[path]][0]
                if _is_zero(momentum):
                    return g
                return (
                    g + jnp.asarray(momentum, g.dtype) * buffer
                    if options[group_of[path]]["nesterov"]
                    else buffer
                )

            if early:
                gradients = _each(scaled, _each(trusted, gradients, params))
            trace = _each(moved, gradients, state.trace)
            steps = _each(sgd, gradients, trace)
            return lowered(steps if early else _each(scaled, steps)), optax.TraceState(trace=trace)

        count = jnp.asarray(optax.safe_increment(state.count))

        def averaged(path: Path, m: jax.Array, g: jax.Array) -> jax.Array:
            decay, complement, _ = (
                jnp.asarray(value, m.dtype) for value in moved_by[group_of[path]]
            )
            return decay * m + complement * g

        def squared(path: Path, v: jax.Array, g: jax.Array) -> jax.Array:
            decay = float(options[group_of[path]]["betas"][1])
            return decay * v + (1 - decay) * jnp.square(g)

        def step(path: Path, m: jax.Array, v: jax.Array, parameter: jax.Array) -> jax.Array:
            option = options[group_of[path]]
            value = _corrected(
                m,
                v,
                count,
                (moved_by[group_of[path]][2], _log(float(option["betas"][1]))),
                float(option["eps"]),
            )
            return scaled(
                path,
                value if coupled else trusted(path, decayed(path, value, parameter), parameter),
            )

        mu, nu = _each(averaged, state.mu, gradients), _each(squared, state.nu, gradients)
        return lowered(_each(step, mu, nu, params)), optax.ScaleByAdamState(
            count=count, mu=mu, nu=nu
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _is_zero(value: Any) -> bool:
    """Whether a momentum is none, rather than one that the schedule moves."""
    return isinstance(value, float) and value == 0


_SLOTS = {"momentum_buffer": "trace", "exp_avg": "mu", "exp_avg_sq": "nu"}
"""torch's name of a tensor, and the field of optax's state that holds it."""


def state_of(record: OptimizerState, params: Any) -> Any:
    """The optax state for :func:`optimizer_of`, filled with what torch had; what torch had not made
    yet is zero.

    Args:
      record: The optimizer.
      params: The model's parameters, an nnx state; buffers take the dtype that torch had.
    """

    def tree(name: str) -> Any:
        return _each(
            lambda path, p: (
                jnp.zeros_like(p)
                if path not in record.tensors[name]
                else jnp.array(record.tensors[name][path])
            ),
            params,
        )

    if not KINDS[record.kind].counts:
        return optax.TraceState(trace=tree("momentum_buffer"))
    count = int(float(next(iter(record.steps.values())))) if record.steps else 0
    return optax.ScaleByAdamState(
        count=jnp.asarray(count, jnp.int32), mu=tree("exp_avg"), nu=tree("exp_avg_sq")
    )


def record_of(record: OptimizerState, state: Any) -> OptimizerState:
    """The torch optimizer again, with what optax has now.

    Args:
      record: What it was; its groups and options stay.
      state: State of :func:`optimizer_of`.
    """
    tensors: dict[str, dict[Path, np.ndarray]] = {}
    kind = KINDS[record.kind]
    kept = {path for group in record.groups for path in group.paths if kind.buffered(group.options)}
    for name, before in record.tensors.items():
        now: dict[Path, np.ndarray] = {}
        _each(
            lambda path, leaf, now=now: now.update({path: np.asarray(leaf)}),
            getattr(state, _SLOTS[name]),
        )
        stepped = bool(before) or (
            any(map(np.any, now.values())) if not kind.counts else int(state.count) > 0
        )  # torch makes them at the first step
        tensors[name] = {
            path: value
            for path, value in now.items()
            if stepped and (path in kept or path in before)
        }
    steps: dict[Path, np.ndarray] = {}
    if kind.counts:
        like = next(iter(record.steps.values()), np.zeros((), np.float32))
        steps = {path: np.asarray(int(state.count), like.dtype) for path in tensors["exp_avg"]}
    return replace(record, tensors=tensors, steps=steps)
