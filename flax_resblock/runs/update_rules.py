"""The updates of PyTorch's optimizers that optax has with another meaning or not at all.

Each rule takes one parameter and says by how much it moves and what the optimizer keeps of it. The
differences from optax are small and hard to see: where epsilon is added, whether the first step is
damped, what the bias correction covers (docs/training-runs.md has the errors of all).
Learning rates may be numbers or scalars on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


def bias_correction(decay: float, count: Array, dtype: Any) -> Array:
    """``1 - decay**count``, accurate to the last bits of ``dtype`` at any count, of updates with
    this one included: ``-expm1(count * log(decay))``."""
    return corrected(log_of(decay), count, dtype)


def log_of(decay: float) -> float:
    """The logarithm of a decay, for :func:`corrected`; minus infinity of 0."""
    return math.log(decay) if decay else -math.inf


def corrected(log_decay: Any, count: Array, dtype: Any) -> Array:
    """:func:`bias_correction` by the logarithm of the decay."""
    return -jnp.expm1(count.astype(dtype) * jnp.asarray(log_decay, dtype))


@dataclass(frozen=True)
class ParameterStep:
    """One parameter at one step.

    Attributes:
      value, gradient: Of the parameter; the gradient points downhill (``maximize`` is applied).
      kept: What the optimizer keeps of it, by torch's names.
      count: Updates, this one included; int32 scalar.
      rate: The learning rate.
      momentum: The momentum or Adam's first beta, its complement and its logarithm.
      norm: Of all gradients together, where the optimizer needs it.
      options: Of the param group.
    """

    value: Array
    gradient: Array
    kept: Mapping[str, Array]
    count: Array
    rate: Any
    momentum: tuple[Any, Any, Any]
    norm: Array | None
    options: Mapping[str, Any]

    def number(self, value: Any) -> Array:
        """A number in the parameter's dtype."""
        return jnp.asarray(value, self.value.dtype)

    @property
    def decayed(self) -> Array:
        """The gradient with the decay added to it."""
        return self.gradient + self.number(self.options["weight_decay"]) * self.value

    @property
    def betas(self) -> tuple[Array, Array, float]:
        """The first beta, its complement, and the second beta."""
        first, complement, _ = map(self.number, self.momentum)
        return first, complement, float(self.options["betas"][1])

    def corrections(self) -> tuple[Array, Array]:
        """The bias corrections of both moments."""
        second = bias_correction(float(self.options["betas"][1]), self.count, self.value.dtype)
        return corrected(self.momentum[2], self.count, self.value.dtype), second

    def moments(self, gradient: Array) -> tuple[Array, Array]:
        """Adam's moments after this gradient."""
        first, complement, second = self.betas
        mean = first * self.kept["exp_avg"] + complement * gradient
        return mean, second * self.kept["exp_avg_sq"] + (1 - second) * gradient**2

    def decay(self) -> tuple[Array, Array]:
        """The gradient, and how far a decoupled decay moves the parameter."""
        if self.options.get("decoupled_weight_decay"):
            amount = self.number(self.rate) * self.number(self.options["weight_decay"])
            return self.gradient, -amount * self.value
        return self.decayed, self.number(0)


class Moved(NamedTuple):
    """By how much a parameter moves, and what the optimizer keeps of it from now on."""

    by: Array
    kept: dict[str, Array]


def _with_momentum(p: ParameterStep, gradient: Array) -> tuple[Array, dict[str, Array]]:
    """SGD's direction: torch makes the buffer of the first gradient, undamped."""
    if "momentum_buffer" not in p.kept:
        return gradient, {}
    momentum = p.number(p.momentum[0])
    damped = p.number(1 - float(p.options["dampening"])) * gradient
    later = momentum * p.kept["momentum_buffer"] + damped
    buffer = jnp.where(p.count == 1, gradient, later)
    direction = gradient + momentum * buffer if p.options["nesterov"] else buffer
    return direction, {"momentum_buffer": buffer}


def _sgd(p: ParameterStep) -> Moved:
    direction, kept = _with_momentum(p, p.decayed)
    return Moved(-p.number(p.rate) * direction, kept)


def _amsgrad(p: ParameterStep) -> Moved:
    """Adam and AdamW by the largest second moment so far."""
    gradient, moved = p.decay()
    mean, square = p.moments(gradient)
    most = jnp.maximum(p.kept["max_exp_avg_sq"], square)
    by_first, by_second = p.corrections()
    root = jnp.sqrt(most) / jnp.sqrt(by_second) + p.options["eps"]
    kept = {"exp_avg": mean, "exp_avg_sq": square, "max_exp_avg_sq": most}
    return Moved(moved - p.number(p.rate) / by_first * mean / root, kept)


def _rmsprop(p: ParameterStep) -> Moved:
    gradient, alpha = p.decayed, float(p.options["alpha"])
    square = alpha * p.kept["square_avg"] + (1 - alpha) * gradient**2
    kept, spread = {"square_avg": square}, square
    if "grad_avg" in p.kept:
        mean = p.kept["grad_avg"] + (1 - alpha) * (gradient - p.kept["grad_avg"])
        kept, spread = {**kept, "grad_avg": mean}, square - mean**2
    direction = gradient / (jnp.sqrt(spread) + p.options["eps"])
    if "momentum_buffer" in p.kept:
        direction = p.number(p.momentum[0]) * p.kept["momentum_buffer"] + direction
        kept["momentum_buffer"] = direction
    return Moved(-p.number(p.rate) * direction, kept)


def _adagrad(p: ParameterStep) -> Moved:
    gradient = p.decayed
    total = p.kept["sum"] + gradient**2
    before = (p.count - 1).astype(total.dtype)
    rate = p.number(p.rate) / (1 + before * float(p.options["lr_decay"]))
    return Moved(-rate * gradient / (jnp.sqrt(total) + p.options["eps"]), {"sum": total})


def _adadelta(p: ParameterStep) -> Moved:
    gradient, rho, eps = p.decayed, float(p.options["rho"]), float(p.options["eps"])
    square = rho * p.kept["square_avg"] + (1 - rho) * gradient**2
    delta = jnp.sqrt(p.kept["acc_delta"] + eps) / jnp.sqrt(square + eps) * gradient
    kept = {"square_avg": square, "acc_delta": rho * p.kept["acc_delta"] + (1 - rho) * delta**2}
    return Moved(-p.number(p.rate) * delta, kept)


def _adamax(p: ParameterStep) -> Moved:
    gradient, (first, complement, second) = p.decayed, p.betas
    mean = first * p.kept["exp_avg"] + complement * gradient
    most = jnp.maximum(second * p.kept["exp_inf"], jnp.abs(gradient) + p.options["eps"])
    by_first, _ = p.corrections()
    return Moved(-p.number(p.rate) / by_first * mean / most, {"exp_avg": mean, "exp_inf": most})


def _nadam(p: ParameterStep) -> Moved:
    gradient, moved = p.decay()
    mean, square = p.moments(gradient)
    first, rate = p.number(p.momentum[0]), p.number(p.rate)
    now = p.count.astype(rate.dtype) * float(p.options["momentum_decay"])
    half, half_next = (
        0.5 * first * 0.96**at for at in (now, now + float(p.options["momentum_decay"]))
    )
    mu, mu_next, rest = first - half, first - half_next, p.number(p.momentum[1]) + half
    # torch multiplies in the type of the tensor, float32
    product = p.kept["mu_product"] * mu.astype(p.kept["mu_product"].dtype)
    wide = product.astype(rate.dtype)
    root = jnp.sqrt(square / p.corrections()[1]) + p.options["eps"]
    step = rest / (1 - wide) * gradient + mu_next / (1 - wide * mu_next) * mean
    kept = {"exp_avg": mean, "exp_avg_sq": square, "mu_product": product}
    return Moved(moved - rate * step / root, kept)


def _averaged_length(decay: float, count: Array, dtype: Any) -> Array:
    """RAdam's length of the average, ``2 / (1 - b) - 1 - 2 t b**t / (1 - b**t)``.

    As it stands, float32 loses four digits of the first lengths: they are differences of thousands.
    With ``x = -t log(b)`` it is a small constant and ``1 - x / expm1(x)``, which has a series.
    """
    rate = -log_of(decay)
    x = count.astype(dtype) * jnp.asarray(rate, dtype)
    small = jnp.minimum(x, 0.5)
    y, series = small**2, jnp.zeros_like(x)
    # Bernoulli numbers over factorials, from the last
    for term in (-691 / 1307674368000, 1 / 47900160, -1 / 1209600, 1 / 30240, -1 / 720, 1 / 12):
        series = term + y * series
    large = jnp.maximum(x, 0.5)
    share = jnp.where(x < 0.5, small / 2 - y * series, 1 - large / jnp.expm1(large))
    return (2 / (1 - decay) - 1 - 2 / rate) + 2 / rate * share


def _radam(p: ParameterStep) -> Moved:
    gradient, moved = p.decay()
    mean, square = p.moments(gradient)
    by_first, by_second = p.corrections()
    second = float(p.options["betas"][1])
    longest, length = 2 / (1 - second) - 1, _averaged_length(second, p.count, mean.dtype)
    long = length > 5
    safe = jnp.where(long, length, 6.0)
    share = (safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe)
    scaled = jnp.sqrt(share) * jnp.sqrt(by_second) / (jnp.sqrt(square) + p.options["eps"])
    step = p.number(p.rate) * mean / by_first * jnp.where(long, scaled, 1.0)
    return Moved(moved - step, {"exp_avg": mean, "exp_avg_sq": square})


def _norm(value: Array) -> Array:
    return jnp.sqrt(jnp.sum(value**2))


def _ratio(value: Array, step: Array, ratio: Callable[[Array, Array], Array]) -> Array:
    """A ratio of norms; 1 where one of them is 0."""
    ours, theirs = _norm(value), _norm(step)
    both = (ours > 0) & (theirs > 0)
    one = jnp.ones_like(ours)
    return jnp.where(both, ratio(jnp.where(both, ours, one), jnp.where(both, theirs, one)), one)


def _timm_lars(p: ParameterStep) -> Moved:
    o, gradient, rate = p.options, p.gradient, p.number(p.rate)
    if o["weight_decay"] or o["always_adapt"]:

        def trust(ours: Array, theirs: Array) -> Array:
            return o["trust_coeff"] * ours / (theirs + ours * o["weight_decay"] + o["eps"])

        ratio = _ratio(p.value, gradient, trust)
        gradient = p.decayed * (jnp.minimum(ratio / rate, 1.0) if o["trust_clip"] else ratio)
    direction, kept = _with_momentum(p, gradient)
    return Moved(-rate * direction, kept)


def _timm_lamb(p: ParameterStep) -> Moved:
    o, gradient, rate = p.options, p.gradient, p.number(p.rate)
    if p.norm is not None and o["max_grad_norm"] is not None:
        gradient = gradient / jnp.maximum(p.norm / o["max_grad_norm"], 1.0).astype(rate.dtype)
    first, complement, second = p.betas
    share = complement if o["grad_averaging"] else p.number(1)
    mean = first * p.kept["exp_avg"] + share * gradient
    square = second * p.kept["exp_avg_sq"] + (1 - second) * gradient**2
    by_first, by_second = p.corrections() if o["bias_correction"] else (p.number(1), p.number(1))
    step = mean / by_first / (jnp.sqrt(square) / jnp.sqrt(by_second) + o["eps"])
    value, decay = p.value, p.number(o["weight_decay"])
    if o["weight_decay"] and o.get("decoupled_decay"):
        value = value - rate * decay * value
    elif o["weight_decay"]:
        step = step + decay * value
    if o["weight_decay"] or o["always_adapt"]:
        ratio = _ratio(value, step, lambda ours, theirs: ours / theirs)
        step = step * (jnp.minimum(ratio, float(o["trust_clip"])) if o["trust_clip"] else ratio)
    return Moved(value - p.value - rate * step, {"exp_avg": mean, "exp_avg_sq": square})


RULES: Mapping[str, Callable[[ParameterStep], Moved]] = {
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "adadelta": _adadelta,
    "adamax": _adamax,
    "nadam": _nadam,
    "radam": _radam,
    "timm-lars": _timm_lars,
    "timm-lamb": _timm_lamb,
}
"""By the name of the optimizer."""


def rule_of(kind: str, options: Mapping[str, Any]) -> Callable[[ParameterStep], Moved] | None:
    """The rule of a param group; None where optax computes what torch does."""
    if kind == "sgd" and options.get("dampening"):
        return _sgd
    return _amsgrad if options.get("amsgrad") else RULES.get(kind)
