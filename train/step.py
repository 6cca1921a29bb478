"""The compiled steps: pure functions over a model that was split once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flax_resblock.errors import InputError
from flax_resblock.resnet import ResNet
from train.pace import Rates


class TrainState(NamedTuple):
    """What a training step changes: parameters, running statistics, optimizer buffers."""

    params: nnx.State
    stats: nnx.State
    opt_state: Any


class Metrics(NamedTuple):
    """Mean loss and accuracy of a batch before the update, scalars."""

    loss: jax.Array
    accuracy: jax.Array


class Mixed(NamedTuple):
    """Of images that were mixed: labels of the other image ``(N,)`` int32, and the weight of the first ``(N,)`` float32."""

    labels: Any
    weight: Any


TrainStep = Callable[..., tuple[TrainState, Metrics]]
EvalStep = Callable[[nnx.State, nnx.State, Any], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0, mixed: Mixed | None = None) -> jax.Array:
    r"""Mean cross-entropy against :math:`(1 - s) \cdot onehot + s / K`, as ``torch.nn.functional.cross_entropy`` computes it.

    Args:
      logits: ``(N, K)``; computed in float32 at least.
      labels: ``(N,)``, integers in ``0..K-1``.
      label_smoothing: :math:`s`, in [0, 1).
      mixed: Second labels, and the weight of the first, of images that were mixed.
    Returns:
      A scalar.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    of_label = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    if mixed is not None:
        others = jnp.take_along_axis(log_p, mixed.labels[:, None], axis=1)[:, 0]
        of_label = mixed.weight * of_label + (1 - mixed.weight) * others
    return -jnp.mean((1 - label_smoothing) * of_label + label_smoothing * jnp.mean(log_p, axis=1))


def split(model: ResNet, optimizer: optax.GradientTransformation, *, freeze: Sequence[str] = ()) -> tuple[nnx.GraphDef[ResNet], TrainState]:
    """The model's structure, in training mode but for the frozen parts, and a fresh training state.

    The state holds copies: a train step donates its input, and the model's own arrays must survive that.

    Args:
      model: Does not change.
      optimizer: See :func:`make_train_step`.
      freeze: Parts whose norms use their running statistics, ``"stem"``, ``"stage1"`` ...
    Raises:
      InputError: float64 values while jax's x64 mode is off; they would be narrowed silently.
    """
    graphdef, values = nnx.split(model)
    training = nnx.merge(graphdef, values)
    training.train()
    for part in freeze:
        block_or_list = getattr(training, part)
        for module in block_or_list if isinstance(block_or_list, nnx.List) else (block_or_list,):
            module.eval()
    graphdef, params, stats = nnx.split(training, nnx.Param, nnx.BatchStat)
    wide = {str(leaf.dtype) for leaf in jax.tree.leaves((params, stats)) if leaf.dtype.kind == "f" and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype}
    if wide:
        raise InputError(f"the model's values are {', '.join(sorted(wide))}, which jax would narrow. Turn on jax_enable_x64, or convert to float32 first.")
    params, stats = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (params, stats))
    return graphdef, TrainState(params, stats, optimizer.init(params))


def make_train_step(
    graphdef: nnx.GraphDef[ResNet], optimizer: optax.GradientTransformationExtraArgs, *, label_smoothing: float = 0.0, freeze: Sequence[str] = ()
) -> TrainStep:
    """One step of training, compiled; ``(state, images, labels, rates, mixed=None) -> (state, metrics)``.

    The given state is donated: its arrays are gone after the call. ``images`` are ``(N, H, W, C)``, ``labels`` ``(N,)`` int32. New rates do not compile
    again; a new ``N`` does.

    Args:
      graphdef: Structure of the model; see :func:`split`.
      optimizer: See :func:`flax_resblock.optimizers.optimizer_of`.
      label_smoothing: See :func:`cross_entropy`.
      freeze: Parts whose parameters keep their bits.
    """
    frozen = frozenset(freeze)

    def train_step(state: TrainState, images: jax.Array, labels: jax.Array, rates: Rates, mixed: Mixed | None = None) -> tuple[TrainState, Metrics]:
        def loss_of(params: nnx.State) -> tuple[jax.Array, tuple[jax.Array, nnx.State]]:
            # copy=True: the running statistics change inside the gradient's trace, and their variables must belong to it
            model = nnx.merge(graphdef, params, state.stats, copy=True)
            logits = model(images)
            return cross_entropy(logits, labels, label_smoothing, mixed), (logits, nnx.state(model, nnx.BatchStat))

        (loss, (logits, stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, learning_rates=rates.learning_rates, momenta=rates.momenta)
        params: Any = optax.apply_updates(state.params, updates)
        if frozen:
            params = jax.tree_util.tree_map_with_path(lambda keys, new, old: old if keys[0].key in frozen else new, params, state.params)
        accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels)
        return TrainState(params, stats, opt_state), Metrics(loss, accuracy)

    return jax.jit(train_step, donate_argnums=0)


@lru_cache(maxsize=8)
def make_eval_step(graphdef: nnx.GraphDef[ResNet]) -> EvalStep:
    """Logits in evaluation mode, compiled; ``(params, stats, images (N, H, W, C)) -> (N, num_classes)``. One function per structure, kept."""

    def eval_step(params: nnx.State, stats: nnx.State, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, stats, copy=True)
        return model(images, use_running_average=True)

    return jax.jit(eval_step)
