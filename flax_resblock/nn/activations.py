"""Activation functions with PyTorch's values and PyTorch's derivatives, also at the kinks.

Where jax agrees with PyTorch its function is taken; the others are written out. A derivative at a
kink is a choice: ``jax.nn.relu6`` has 0.5 at zero and six, PyTorch has 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_resblock.config import Activation

relu = jax.nn.relu
elu = jax.nn.elu
selu = jax.nn.selu
silu = jax.nn.silu
sigmoid = jax.nn.sigmoid
log_sigmoid = jax.nn.log_sigmoid
softsign = jax.nn.soft_sign
softmax = jax.nn.softmax
log_softmax = jax.nn.log_softmax
tanh = jnp.tanh


def identity(x: jax.Array) -> jax.Array:
    """``x`` itself, as ``torch.nn.Identity`` returns it."""
    return x


@jax.custom_jvp
def relu_by_output(x: jax.Array) -> jax.Array:
    """:func:`relu`, whose derivative looks at its result and not at its input.

    At the end of a block the result is kept anyway, for the next convolution, while the input is a
    sum that would have to be read or computed again. The barrier keeps XLA from doing so
    nevertheless."""
    return lax.optimization_barrier(relu(x))


@relu_by_output.defjvp
def _relu_by_output_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y = relu_by_output(primals[0])
    return y, jnp.where(y > 0, tangents[0], jnp.zeros_like(tangents[0]))


def leaky_relu(x: jax.Array, slope: float = 0.01) -> jax.Array:
    """``x`` above zero, ``slope * x`` below; the derivative at zero is ``slope``."""
    return jnp.where(x > 0, x, slope * x)


def prelu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x`` above zero, ``weight * x`` below.

    Args:
      x: ``(..., C)``.
      weight: ``(C,)`` or ``(1,)``.
    """
    return jnp.where(x > 0, x, weight * x)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def celu(x: jax.Array, alpha: float = 1.0, inplace: bool = False) -> jax.Array:
    """``x`` above zero, ``alpha * expm1(x / alpha)`` below.

    The derivative is PyTorch's, which divides by ``alpha`` rounded to float32, in float64 too.

    Args:
      x: Any shape.
      alpha: As in the formula.
      inplace: Take the derivative of PyTorch's function in place, which is computed from the result
        and therefore rounds ``alpha`` once only. Nothing else depends on it.
    """
    return jax.nn.celu(x, alpha)


@celu.defjvp
def _celu_jvp(
    alpha: float, inplace: bool, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    inverse = 1 / float(np.float32(alpha))
    below = jnp.minimum(x, 0)
    slope = alpha * inverse * jnp.exp(below / alpha if inplace else below * inverse)
    return celu(x, alpha, inplace), jnp.where(x > 0, dx, dx * slope)


def gelu(x: jax.Array, approximate: bool = False) -> jax.Array:
    """``x`` times the normal distribution function; with ``approximate`` its form with tanh.

    ``jax.nn.gelu`` is approximate by default; PyTorch's is not.
    """
    return jax.nn.gelu(x, approximate)


def mish(x: jax.Array) -> jax.Array:
    """``x * tanh(softplus(x))``."""
    return x * jnp.tanh(jax.nn.softplus(x))


def hardtanh(x: jax.Array, min_value: float = -1.0, max_value: float = 1.0) -> jax.Array:
    """``x`` clipped to a range; the derivative at both ends is zero."""
    return jnp.where(x <= min_value, min_value, jnp.where(x >= max_value, max_value, x))


def relu6(x: jax.Array) -> jax.Array:
    """``x`` clipped to 0 ... 6; the derivative at both ends is zero."""
    return hardtanh(x, 0.0, 6.0)


def hardswish(x: jax.Array) -> jax.Array:
    """``x * relu6(x + 3) / 6``; the derivative is 0 at -3 and 1 at 3."""
    return jnp.where(x <= -3, 0.0, jnp.where(x >= 3, x, x * (x + 3) / 6))


@jax.custom_jvp
def hardsigmoid(x: jax.Array) -> jax.Array:
    """``relu6(x + 3) / 6``.

    The derivative is PyTorch's: zero at -3 and 3, and between them the float32 nearest to 1/6, in
    float64 too.
    """
    return hardtanh(x + 3, 0.0, 6.0) / 6


@hardsigmoid.defjvp
def _hardsigmoid_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    sixth = float(np.float32(1) / np.float32(6))
    return hardsigmoid(x), jnp.where((x > -3) & (x < 3), dx * sixth, 0)


def softplus(x: jax.Array, beta: float = 1.0, threshold: float = 20.0) -> jax.Array:
    """``log(1 + exp(beta x)) / beta``; ``x`` itself where ``beta x`` exceeds ``threshold``."""
    straight = beta * x > threshold
    bent = jnp.where(straight, 0, beta * x)  # exp(beta x) would overflow where it is not used
    return jnp.where(straight, x, jnp.log1p(jnp.exp(bent)) / beta)


def softshrink(x: jax.Array, lambd: float = 0.5) -> jax.Array:
    """``x`` moved towards zero by ``lambd``, and zero within that distance of it."""
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, 0 * x))


def hardshrink(x: jax.Array, lambd: float = 0.5) -> jax.Array:
    """``x``, and zero where it lies between ``-lambd`` and ``lambd``."""
    return jnp.where((x >= -lambd) & (x <= lambd), 0, x)


def tanhshrink(x: jax.Array) -> jax.Array:
    """``x - tanh(x)``."""
    return x - jnp.tanh(x)


def threshold(x: jax.Array, limit: float, value: float) -> jax.Array:
    """``x`` above ``limit``, ``value`` elsewhere."""
    return jnp.where(x <= limit, value, x)


def glu(x: jax.Array, axis: int = -1) -> jax.Array:
    """The first half of an axis times the sigmoid of the second half."""
    first, second = jnp.split(x, 2, axis)
    return first * jax.nn.sigmoid(second)


def normalize(x: jax.Array, axis: int = -1, eps: float = 1e-12, p: float = 2.0) -> jax.Array:
    """``x`` divided by its norm along an axis, or by ``eps`` where the norm is smaller.

    Args:
      x: Any shape.
      axis: Along which the norm is taken.
      eps: The least divisor.
      p: Exponent of the norm, positive and finite.
    Raises:
      ValueError: ``p`` is not positive and finite.
    """
    if not 0 < p < float("inf"):
        raise ValueError(f"normalize needs a positive and finite p; got {p}.")
    magnitudes = jnp.square(x) if p == 2 else jnp.abs(x) ** p
    total = jnp.sum(magnitudes, axis, keepdims=True)
    some = jnp.where(total > 0, total, 1)  # the root has no derivative at zero
    root = jnp.sqrt(some) if p == 2 else some ** (1 / p)
    norm = jnp.where(total > 0, root, 0)
    return x / jnp.where(norm >= eps, norm, lax.full_like(norm, eps))


ACTIVATIONS: Mapping[Activation, Callable[[jax.Array], jax.Array]] = {
    "relu": relu,
    "leaky_relu": leaky_relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "silu": silu,
}
"""As ``torch.nn.ReLU()``, ``LeakyReLU()``, ``GELU()`` and ``SiLU()`` compute them."""
