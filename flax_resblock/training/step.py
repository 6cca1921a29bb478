"""The compiled training step: a pure function over a model that was split once; see
:mod:`flax_resblock.training.state`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from flax_resblock.config import Path
from flax_resblock.cpu.switch import compiler_options
from flax_resblock.nn.outputs import logits_of
from flax_resblock.nn.variables import STATISTICS
from flax_resblock.runs.optimizers import parameter_path
from flax_resblock.training.devices import AXIS, Placement
from flax_resblock.training.loss import Mixed, cross_entropy
from flax_resblock.training.pace import Rates
from flax_resblock.training.randomness import drawn, step_key
from flax_resblock.training.state import Leaves, TrainState


class Metrics(NamedTuple):
    """What a training step measures.

    Attributes:
      loss, accuracy: Means over the batch before the update, scalars.
      stop: Whether any process asked to stop, int32; None if none was asked.
    """

    loss: Array
    accuracy: Array
    stop: Array | None = None


class _Learned(NamedTuple):
    """The results for one piece of a batch."""

    loss: Array
    accuracy: Array
    stats: nnx.State
    gradients: nnx.State


class TrainStep:
    """A compiled training step; see :func:`make_train_step`."""

    def __init__(
        self, step: Callable[..., tuple[TrainState, Metrics]], placement: Placement
    ) -> None:
        def flat(arrays: list[Array], *batch: Any, structure: Any) -> tuple[list[Array], Metrics]:
            state, metrics = step(jax.tree.unflatten(structure, arrays), *batch)
            return jax.tree.leaves(state), metrics

        self.compiled: Any = jax.jit(
            flat,
            donate_argnums=0,
            static_argnames="structure",
            out_shardings=placement.copied,
            compiler_options=compiler_options(),
        )

    @property
    def compilations(self) -> int:
        """How many programs were compiled: one, unless shapes or dtypes change."""
        return self.compiled._cache_size()

    def __call__(self, state: TrainState, *batch: Any, **more: Any) -> tuple[TrainState, Metrics]:
        """``(state, images, labels, rates, mixed=None, stop=None, number=None) -> (state,
        metrics)``.
        """
        leaves = Leaves(state)
        metrics = self.advance(leaves, *batch, **more)
        return leaves.state, metrics

    def advance(
        self,
        leaves: Leaves,
        images: Any,
        labels: Any,
        rates: Rates,
        mixed: Mixed | None = None,
        stop: Any = None,
        number: Any = None,
    ) -> Metrics:
        """Takes the step in place."""
        batch = images, labels, rates, mixed, stop, number
        leaves.arrays, metrics = self.compiled(leaves.arrays, *batch, structure=leaves.structure)
        return metrics


def clipped(gradients: Any, max_norm: float) -> Any:
    """Scales gradients to a joint norm of at most ``max_norm``, as torch's ``clip_grad_norm_``."""
    norm = optax.tree.norm(gradients)
    factor = jnp.minimum(max_norm / (norm + 1e-6), 1.0)  # torch adds the 1e-6
    return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), gradients)


def make_train_step(
    graphdef: nnx.GraphDef[Any],
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    label_smoothing: float = 0.0,
    aux_weight: float = 0.3,
    freeze: Collection[Path] = (),
    accumulate: int = 1,
    clip_norm: float | None = None,
    ema: float = 0.0,
    replicas: bool = False,
    mesh: Mesh | None = None,
    random: nnx.State | None = None,
    seed: int = 0,
) -> TrainStep:
    """Compiles one training step: ``(state, images, labels, rates, mixed=None, stop=None,
    number=None) -> (state, metrics)``.

    The given state is donated: its arrays cannot be used after the call. ``images`` are
    ``(N, H, W, C)``, ``labels`` ``(N,)`` int32. With ``accumulate``, all arrays of a batch have a
    leading axis of pieces: ``(accumulate, N / accumulate, ...)``. New rates do not compile again; a
    new ``N`` does.

    Args:
      freeze: What keeps its bits: paths of parameters, or of parts that they are in.
      accumulate: Number of pieces that a batch is computed in.
      ema: Decay of the averages; used if the state has any.
      replicas: Every device normalises its own images, and the running statistics of the first are
        kept. Otherwise the statistics are those of the whole batch.
      random: The random streams of the model; if it has any, a step takes its ``number``.
    """
    frozen = frozenset(freeze)

    def unless_frozen(new: Any, old: Any) -> Any:
        """``new``; ``old`` of what is frozen."""

        def chosen(keys: tuple[Any, ...], new: Any, old: Any) -> Any:
            path = parameter_path(keys)
            lengths = range(1, len(path) + 1)
            return old if any(path[:length] in frozen for length in lengths) else new

        return jax.tree_util.tree_map_with_path(chosen, new, old) if frozen else new

    def learn(
        params: nnx.State,
        stats: nnx.State,
        images: Array,
        labels: Array,
        mixed: Mixed | None,
        key: Array | None,
    ) -> _Learned:
        rest: tuple[nnx.State, ...] = ()
        if random is not None and key is not None:
            own = jax.random.fold_in(key, lax.axis_index(AXIS)) if replicas else key
            rest = (drawn(random, own),)

        def loss_of(params: nnx.State) -> tuple[Array, tuple[Array, nnx.State]]:
            # so that gradients are summed over the devices in the shape of the parameters, not of
            # the activations
            if replicas:
                params = jax.tree.map(lambda leaf: lax.pcast(leaf, AXIS, to="varying"), params)
            # copy=True: the running statistics change inside the gradient's trace, and their
            # variables must belong to it
            model = nnx.merge(graphdef, params, stats, *rest, copy=True)
            logits, others = logits_of(model(images))
            loss = cross_entropy(logits, labels, label_smoothing, mixed)
            for one in others:
                loss += aux_weight * cross_entropy(one, labels, label_smoothing, mixed)
            # inside the differentiated function: the gradient of a parameter that all devices share
            # is summed over them by itself
            new = nnx.state(model, STATISTICS)
            return lax.pmean(loss, AXIS) if replicas else loss, (logits, new)

        (loss, (logits, new)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels)
        if replicas:
            accuracy, new = lax.pmean(accuracy, AXIS), jax.tree.map(_of_first, new)
        return _Learned(loss, accuracy, new, gradients)

    if replicas:
        if mesh is None:
            raise ValueError("replicas need a mesh")
        whole, spread = PartitionSpec(), PartitionSpec(AXIS)
        learn = jax.shard_map(
            learn,
            mesh=mesh,
            in_specs=(whole, whole, spread, spread, spread, whole),
            out_specs=whole,
        )

    def key_of(number: Any, piece: Any) -> Array | None:
        return None if random is None else step_key(seed, number, piece)

    def learn_all(
        state: TrainState, images: Array, labels: Array, mixed: Mixed | None, number: Any
    ) -> _Learned:
        if accumulate == 1:
            return learn(state.params, state.stats, images, labels, mixed, key_of(number, 0))

        def piece(
            stats: nnx.State, batch: tuple[Array, Array, Mixed | None, Any]
        ) -> tuple[nnx.State, tuple[Array, Array, nnx.State]]:
            images, labels, mixed, place = batch
            learned = learn(state.params, stats, images, labels, mixed, key_of(number, place))
            return learned.stats, (learned.loss, learned.accuracy, learned.gradients)

        if jax.default_backend() == "cpu":  # whose convolutions are many times slower inside a loop
            stats, learned = state.stats, []
            for n in range(accumulate):
                batch = jax.tree.map(lambda array, n=n: array[n], (images, labels, mixed))
                stats, one = piece(stats, (*batch, n))
                learned.append(one)
            means = jax.tree.map(lambda *values: sum(values[1:], values[0]) / accumulate, *learned)
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params)

            def summed(carry: Any, batch: Any) -> tuple[Any, None]:
                stats, sums = carry
                stats, one = piece(stats, batch)
                return (stats, jax.tree.map(jnp.add, sums, one)), None

            wide = jnp.promote_types(jax.tree.leaves(state.params)[0].dtype, jnp.float32)
            start = state.stats, (jnp.zeros((), wide), jnp.zeros(()), zeros)
            pieces = images, labels, mixed, jnp.arange(accumulate)
            (stats, sums), _ = lax.scan(summed, start, pieces)
            means = jax.tree.map(lambda value: value / accumulate, sums)
        return _Learned(means[0], means[1], stats, means[2])

    def train_step(
        state: TrainState,
        images: Array,
        labels: Array,
        rates: Rates,
        mixed: Any,
        stop: Any,
        number: Any,
    ) -> tuple[TrainState, Metrics]:
        learned = learn_all(state, images, labels, mixed, number)
        gradients = learned.gradients
        if clip_norm is not None:  # what is frozen does not count in the norm
            zeros = jax.tree.map(jnp.zeros_like, gradients)
            gradients = clipped(unless_frozen(gradients, zeros), clip_norm)
        updates, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, **rates._asdict()
        )
        params: Any = unless_frozen(optax.apply_updates(state.params, updates), state.params)
        averages = state.ema and jax.tree.map(
            lambda old, new: _averaged(old, new, ema), state.ema, (params, learned.stats)
        )
        metrics = Metrics(learned.loss, learned.accuracy, None if stop is None else jnp.max(stop))
        return TrainState(params, learned.stats, opt_state, averages), metrics

    return TrainStep(train_step, Placement(mesh))


def _of_first(value: Array) -> Array:
    return lax.psum(jnp.where(lax.axis_index(AXIS) == 0, value, jnp.zeros_like(value)), AXIS)


def _averaged(old: Array, new: Array, decay: float) -> Array:
    """``decay * old + (1 - decay) * new``; counters take the new value."""
    return old + (1 - decay) * (new - old) if jnp.issubdtype(old.dtype, jnp.floating) else new
