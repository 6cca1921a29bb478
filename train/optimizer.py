"""The optimizer: a direction from optax, and the learning rate applied outside it."""

from __future__ import annotations

from typing import Any

import jax
import optax

KERNEL = "kernel"


def decays(params: Any) -> Any:
    """The weight-decay mask: True for kernels of convolutions and linear layers, False for biases and norm scales.

    Args:
      params: Tree of parameters whose paths end in the variable's name.
    Returns:
      A tree of the same structure.
    """

    def is_kernel(path: tuple[Any, ...], _: Any) -> bool:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return names[-1] == KERNEL

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def sgd_direction(*, momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 5e-4) -> optax.GradientTransformation:
    r"""The direction :math:`d` of ``torch.optim.SGD``; the update is :math:`p - \eta d` with the step's learning rate :math:`\eta`.

    .. math:: g' = g + \lambda p, \qquad b = \mu b + g', \qquad d = g' + \mu b \;\text{(Nesterov)} \;\text{or}\; b

    The decay comes *before* the momentum, as in torch; after it (as in AdamW) the weights part within a few steps. The learning rate stays outside, so that
    the buffers hold what torch's ``momentum_buffer`` holds and the rate need not be rounded to float32 by a schedule inside the compiled step.

    Args:
      momentum: :math:`\mu`; 0: no buffers.
      nesterov: Whether to look ahead.
      weight_decay: :math:`\lambda`, on kernels only (:func:`decays`).
    """
    decay = optax.add_decayed_weights(weight_decay, mask=decays)
    return optax.chain(decay, optax.trace(momentum, nesterov=nesterov)) if momentum else decay
