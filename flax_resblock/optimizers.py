"""SGD and Adam as PyTorch computes them, for optax; and the way from a torch optimizer's state to theirs and back.

``optax.scale_by_adam`` computes the bias correction ``1 - b2**count`` in the precision of the parameters. In float32 that difference of nearly equal numbers
has lost four digits at the first step (b2 = 0.999), so the first update is wrong by about 1e-5; PyTorch computes it in float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_resblock.architecture import Path
from flax_resblock.convert.optimizer import OptimizerState


def bias_correction(decay: float, count: jax.Array, dtype: Any) -> jax.Array:
    """``1 - decay**count``, accurate to the last bits of ``dtype`` at any count: ``-expm1(count * log(decay))``.

    Args:
      decay: Between 0 and 1.
      count: Updates so far, this one included; integer scalar.
      dtype: Floating dtype of the result.
    """
    if decay == 0:
        return jnp.ones((), dtype)
    return -jnp.expm1(count.astype(dtype) * jnp.asarray(math.log(decay), dtype))


def _corrected(m: jax.Array, v: jax.Array, count: jax.Array, betas: Sequence[float], eps: float) -> jax.Array:
    """Adam's direction from its two moments."""
    first, second = (bias_correction(float(decay), count, m.dtype) for decay in betas)
    return (m / first) / (jnp.sqrt(v / second) + eps)


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    r"""``optax.scale_by_adam`` with an accurate bias correction; its state is optax's own ``ScaleByAdamState``.

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

        return jax.tree.map(lambda m, v: _corrected(m, v, count, (b1, b2), eps), mu, nu), optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01, mask: Any = None
) -> optax.GradientTransformation:
    """``torch.optim.AdamW``: weight decay is decoupled from the gradient and multiplied by the learning rate.

    Args:
      learning_rate: Number, or a function of the step.
      b1, b2, eps: See :func:`scale_by_adam`.
      weight_decay: PyTorch's default is 0.01 (optax's is 1e-4).
      mask: Which parameters decay, as for ``optax.adamw``.
    Reference: Loshchilov & Hutter 2019, arXiv:1711.05101.
    """
    return optax.chain(scale_by_adam(b1, b2, eps), optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate))


def _path(keys: tuple[Any, ...]) -> Path:
    """The attribute path of a leaf of an nnx state."""
    return tuple(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))


def _each(function: Callable[..., Any], paths: Any, *trees: Any) -> Any:
    """``function(path, *leaves)`` for every leaf of trees of the same structure."""
    return jax.tree_util.tree_map_with_path(lambda keys, *leaves: function(_path(keys), *leaves), paths, *trees)


def direction_of(record: OptimizerState) -> optax.GradientTransformation:
    r"""The direction :math:`d` of a torch optimizer; the update is :math:`p - \eta d` with the first param group's learning rate :math:`\eta`.

    Every param group keeps its own decay, momentum, betas and eps; one with another learning rate keeps its ratio to the first. The rate itself stays
    outside, so that it can be computed on the host in float64, as torch does. Its state is optax's: ``TraceState`` for SGD, ``ScaleByAdamState`` for Adam and
    AdamW, with what torch calls ``momentum_buffer``, ``exp_avg`` and ``exp_avg_sq``.

    Args:
      record: The optimizer of a model whose parameters are an nnx state of ``nnx.Param``.
    """
    options = {path: group.options for group in record.groups for path in group.paths}
    first = float(record.groups[0].options["lr"])
    ratios = {path: float(option["lr"]) / first if first else 1.0 for path, option in options.items()}
    coupled = record.kind != "adamw"

    def decayed(path: Path, value: jax.Array, parameter: jax.Array) -> jax.Array:
        decay = float(options[path]["weight_decay"])
        return value + decay * parameter if decay else value

    def scaled(path: Path, value: jax.Array) -> jax.Array:
        return value if ratios[path] == 1 else value * ratios[path]

    def sgd_init(params: Any) -> optax.TraceState:
        return optax.TraceState(trace=jax.tree.map(jnp.zeros_like, params))

    def sgd_update(updates: Any, state: Any, params: Any = None) -> Any:
        gradients = _each(decayed, updates, params)

        def moved(path: Path, g: jax.Array, buffer: jax.Array) -> jax.Array:
            momentum = float(options[path]["momentum"])
            return g + momentum * buffer if momentum else buffer  # torch keeps no buffer without momentum

        trace = _each(moved, gradients, state.trace)

        def step(path: Path, g: jax.Array, buffer: jax.Array) -> jax.Array:
            ahead = g + float(options[path]["momentum"]) * buffer if options[path]["nesterov"] else buffer
            return scaled(path, ahead if options[path]["momentum"] else g)

        return _each(step, gradients, trace), optax.TraceState(trace=trace)

    def adam_init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=zeros, nu=zeros)

    def adam_update(updates: Any, state: Any, params: Any = None) -> Any:
        count = jnp.asarray(optax.safe_increment(state.count))
        gradients = _each(decayed, updates, params) if coupled else updates
        moments = []
        for which, old in ((0, state.mu), (1, state.nu)):

            def averaged(path: Path, m: jax.Array, g: jax.Array, which: int = which) -> jax.Array:
                decay = float(options[path]["betas"][which])
                return decay * m + (1 - decay) * (jnp.square(g) if which else g)

            moments.append(_each(averaged, old, gradients))

        def step(path: Path, m: jax.Array, v: jax.Array, parameter: jax.Array) -> jax.Array:
            value = _corrected(m, v, count, options[path]["betas"], float(options[path]["eps"]))
            return scaled(path, value if coupled else decayed(path, value, parameter))

        return _each(step, *moments, params), optax.ScaleByAdamState(count=count, mu=moments[0], nu=moments[1])

    return optax.GradientTransformation(sgd_init, sgd_update) if record.kind == "sgd" else optax.GradientTransformation(adam_init, adam_update)


_SLOTS = {"momentum_buffer": "trace", "exp_avg": "mu", "exp_avg_sq": "nu"}
"""torch's name of a tensor, and the field of optax's state that holds it."""


def state_of(record: OptimizerState, params: Any) -> Any:
    """The optax state for :func:`direction_of`, filled with what torch had; what torch had not made yet is zero.

    Args:
      record: The optimizer.
      params: The model's parameters, an nnx state; buffers take the dtype that torch had.
    """

    def tree(name: str) -> Any:
        return _each(lambda path, p: jnp.zeros_like(p) if path not in record.tensors[name] else jnp.array(record.tensors[name][path]), params)

    if record.kind == "sgd":
        return optax.TraceState(trace=tree("momentum_buffer"))
    count = int(float(next(iter(record.steps.values())))) if record.steps else 0
    return optax.ScaleByAdamState(count=jnp.asarray(count, jnp.int32), mu=tree("exp_avg"), nu=tree("exp_avg_sq"))


def record_of(record: OptimizerState, state: Any, *, learning_rate: float | None = None) -> OptimizerState:
    """The torch optimizer again, with what optax has now.

    Args:
      record: What it was; its groups and options stay.
      state: State of :func:`direction_of`.
      learning_rate: Of the first param group from now on; the others keep their ratio. None: as it was.
    """
    tensors: dict[str, dict[Path, np.ndarray]] = {}
    for name, before in record.tensors.items():
        now: dict[Path, np.ndarray] = {}
        _each(lambda path, leaf, now=now: now.update({path: np.asarray(leaf)}), getattr(state, _SLOTS[name]))
        tensors[name] = {path: value for path, value in now.items() if path in before or np.any(value)}  # torch makes a buffer at the first step
    steps: dict[Path, np.ndarray] = {}
    if record.kind != "sgd":
        like = next(iter(record.steps.values()), np.zeros((), np.float32))
        steps = {path: np.asarray(int(state.count), like.dtype) for path in tensors["exp_avg"]}
    groups = record.groups
    if learning_rate is not None:
        first = float(groups[0].options["lr"]) or 1.0
        groups = tuple(replace(group, options={**group.options, "lr": learning_rate * (float(group.options["lr"]) / first)}) for group in groups)
    return replace(record, tensors=tensors, steps=steps, groups=groups)
