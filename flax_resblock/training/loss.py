"""The loss of classification."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Mixed(NamedTuple):
    """What mixup or CutMix adds to the labels.

    Attributes:
      labels: Labels of the images that were mixed in, ``(N,)`` int32.
      weight: Weight of the original labels, ``(N,)`` float32 in [0, 1].
    """

    labels: Any
    weight: Any


def cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0, mixed: Mixed | None = None
) -> jax.Array:
    r"""Mean cross-entropy against :math:`(1 - s) \cdot onehot + s / K`, as
    ``torch.nn.functional.cross_entropy`` computes it.

    Args:
      logits: ``(N, K)``; computed in float32 at least.
      labels: ``(N,)``, integers in ``0..K-1``.
      label_smoothing: :math:`s`, in [0, 1).
      mixed: Second labels and the weight of the first, for mixed images.
    Returns:
      A scalar.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    of_label = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    if mixed is not None:
        others = jnp.take_along_axis(log_p, mixed.labels[:, None], axis=1)[:, 0]
        of_label = mixed.weight * of_label + (1 - mixed.weight) * others
    return -jnp.mean((1 - label_smoothing) * of_label + label_smoothing * jnp.mean(log_p, axis=1))
