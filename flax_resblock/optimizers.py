"""Adam as PyTorch computes it, for optax.

``optax.scale_by_adam`` computes the bias correction ``1 - b2**count`` in the precision of the parameters. In float32 that difference of nearly equal numbers
has lost four digits at the first step (b2 = 0.999), so the first update is wrong by about 1e-5; PyTorch computes it in float64 on the host.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


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

        def step(m: jax.Array, v: jax.Array) -> jax.Array:
            first, second = (bias_correction(decay, count, m.dtype) for decay in (b1, b2))
            return (m / first) / (jnp.sqrt(v / second) + eps)

        return jax.tree.map(step, mu, nu), optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

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
