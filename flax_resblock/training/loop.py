"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flax_resblock.errors import InputError, some
from flax_resblock.nn.resnet import Model, ResNet
from flax_resblock.runs.optimizers import optimizer_of, record_of, state_of
from flax_resblock.runs.run import Run
from flax_resblock.runs.schedules import OneCycleLR
from flax_resblock.training.config import TrainConfig
from flax_resblock.training.data import Batch, DataSource, Stream, steps_per_epoch
from flax_resblock.training.devices import Placement, on_host
from flax_resblock.training.errors import Stopped, TrainingError
from flax_resblock.training.evaluation import evaluate_state, with_head
from flax_resblock.training.pace import Pace, Rates, new_run
from flax_resblock.training.progress import TrainingProgress
from flax_resblock.training.reports import History, Judged, Saver, Step
from flax_resblock.training.step import Leaves, Metrics, Mixed, TrainState, make_train_step, split


def new_model(config: TrainConfig) -> ResNet:
    """The configured network with fresh weights from ``config.seed``, in training mode.

    Raises:
      InputError: ``dtype="float64"`` while jax's x64 mode is off.
    """
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise InputError('dtype="float64" needs jax\'s x64 mode: set JAX_ENABLE_X64=1.')
    param_dtype = jnp.promote_types(config.dtype, jnp.float32)
    return ResNet(
        config.model, rngs=nnx.Rngs(config.seed), dtype=config.dtype, param_dtype=param_dtype
    )


def fit(
    model: Model,
    dataset: DataSource,
    config: TrainConfig,
    *,
    test: DataSource | None = None,
    run: Run | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_judged: Callable[[Judged], None] | None = None,
    saver: Saver | None = None,
    stop: Callable[[], bool] | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> History:
    """Trains a network in place.

    Args:
      model: The network that ``config.model`` describes, from :func:`new_model` or
        ``flax_resblock.from_torch``. It receives the new values at the end, and stays as it was if
        the run fails; its mode (training or evaluation) does not matter and does not change.
      dataset: Images to learn from.
      config: The run.
      test: Images to classify after each epoch and at the end.
      run: A run to go on with, in PyTorch or here, from :func:`flax_resblock.load_run`: its
        optimizer with all buffers, its schedule (the rates that the param groups have, where it has
        none) and its counters, which also give the order of the images. It ends where ``config``
        says, what was done before included. None: the configured optimizer and schedule from the
        start.
      on_step: Called with each step once its numbers are known, while the next one is computed.
      on_judged: Called after each evaluation.
      saver: Receives copies of model and run after the steps that it wants, after the last one, and
        before a stop.
      stop: Asked after each step whether to end the run there; in a run of several processes one
        that says so ends all.
      mesh: The devices that share each batch, from :func:`flax_resblock.training.data_mesh`; None:
        jax's default device alone.
      progress: Whether to show a progress bar.
    Returns:
      Loss and accuracy of every step.
    Raises:
      InputError: Model, images, devices and configuration do not fit each other.
      TrainingError: The loss is not finite; the message names the step and the images.
      Stopped: ``stop`` said so; the model stays as it was.
    """
    network = _check(model, dataset, config)
    placement = Placement(mesh)
    placement.check(config.batch_size, config.accumulate)
    steps = steps_per_epoch(dataset, config.batch_size)
    run = run or new_run(config, steps)
    pace, record, end = Pace.of(run, steps), run.optimizer, config.end(steps)
    _check_run(run, network, pace, end)
    optimizer = optimizer_of(record)
    graphdef, state = split(network, optimizer, freeze=config.freeze, placement=placement)
    state = state._replace(
        opt_state=placement.copies(state_of(record, state.params)),
        ema=_averages(config, run, state, placement),
    )
    train_step = make_train_step(
        graphdef,
        optimizer,
        label_smoothing=config.label_smoothing,
        freeze=config.freeze,
        accumulate=config.accumulate,
        clip_norm=config.clip_norm,
        ema=config.ema,
        replicas=config.batch_norm == "replica" and placement.devices > 1,
        mesh=mesh,
    )
    leaves = Leaves(state)
    history = History()
    several = placement.shard[1] > 1
    with TrainingProgress(
        (end - pace.start) * config.batch_size, -(-end // steps), shown=progress
    ) as bar:

        def reported(pending: _Pending) -> bool:
            """Waits for the numbers of a step; whether any process wants to stop."""
            step = pending.known(steps)
            history.steps.append(step)
            bar.advance(config.batch_size, epoch=step.epoch, loss=step.loss, accuracy=step.accuracy)
            if on_step is not None:
                on_step(step)
            return pending.metrics.stop is not None and bool(np.asarray(pending.metrics.stop))

        def asked() -> bool:
            return stop is not None and stop()

        stream = Stream(
            dataset,
            config.batch_size,
            seed=config.seed,
            augmentation=config.augmentation,
            shard=placement.shard,
            pieces=config.accumulate,
            workers=config.workers,
        )
        pending: _Pending | None = None
        with closing(stream.from_step(pace.start)) as coming:
            for number, batch in zip(range(pace.start, end), coming, strict=False):
                rates, done = pace.rates(number), number + 1
                flag = (
                    placement.spread(
                        np.full(placement.devices // placement.shard[1], asked(), np.int32)
                    )
                    if several
                    else None
                )
                metrics = train_step.advance(
                    leaves, *_on_devices(batch, config.accumulate, placement, rates), stop=flag
                )
                stopped = pending is not None and reported(pending)  # while this step is computed
                if not several:
                    stopped = asked()
                pending = _Pending(number, rates, batch.indices, metrics)
                judging = test is not None and (done % steps == 0 or done == end)
                if not (
                    stopped
                    or judging
                    or done == end
                    or (saver is not None and saver.due(done, None))
                ):
                    continue
                reported(pending)
                pending = None
                judged = (
                    _judge(graphdef, leaves.state, test, config, placement, done, steps)
                    if judging and test is not None
                    else None
                )
                if judged is not None:
                    history.judged.append(judged)
                    if on_judged is not None:
                        on_judged(judged)
                if saver is not None and (stopped or done == end or saver.due(done, judged)):
                    saver.save(*_copies(graphdef, leaves.state, pace.after(done)))
                if stopped and done < end:
                    raise Stopped(done)
    state = leaves.state
    params, stats = on_host((state.params, state.stats)) if several else (state.params, state.stats)
    nnx.update(network, params, stats)
    _, history.run = _copies(graphdef, state, pace.after(end))
    return history


class _Pending(NamedTuple):
    """A step that is being computed."""

    number: int
    rates: Rates
    indices: np.ndarray
    metrics: Metrics

    def known(self, steps: int) -> Step:
        """The step, once it is done.

        Raises:
          TrainingError: Its loss is not finite.
        """
        rate = float(self.rates.learning_rates[0])
        step = Step(
            self.number,
            self.number // steps,
            float(self.metrics.loss),
            float(self.metrics.accuracy),
            rate,
        )
        if not math.isfinite(step.loss):
            raise TrainingError(
                f"the loss is {step.loss} at step {step.step} (epoch {step.epoch + 1}, "
                f"learning rate {rate:.3g}), on images "
                f"{some([str(index) for index in self.indices])}; the model keeps its values "
                f"from before the run. Try a smaller learning_rate or a longer "
                "warmup_epochs, and look at the weights and images for non-finite values.",
                step=step.step,
                indices=self.indices,
            )
        return step


def _on_devices(batch: Batch, pieces: int, placement: Placement, rates: Rates) -> tuple[Any, ...]:
    """What a step takes after the state: images, labels, rates, what is mixed."""

    def placed(array: np.ndarray) -> Any:
        if pieces == 1:
            return placement.spread(array)
        return placement.spread(array.reshape(pieces, -1, *array.shape[1:]), axis=1)

    mixed = (
        None
        if batch.labels_b is None
        else Mixed(placed(batch.labels_b), placed(np.asarray(batch.weight)))
    )
    return placed(batch.images), placed(batch.labels), rates, mixed


def _averages(
    config: TrainConfig, run: Run, state: TrainState, placement: Placement
) -> tuple[nnx.State, nnx.State] | None:
    """The averaged weights and statistics to go on with: the run's, or the weights as they are."""
    if not config.ema:
        return None

    def kept(values: nnx.State) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: run.ema.get(
                tuple(key.key for key in keys if hasattr(key, "key")), leaf
            ),
            values,
        )

    return placement.copies(
        (kept(state.params), kept(state.stats)) if run.ema else (state.params, state.stats)
    )


def _judge(
    graphdef: nnx.GraphDef[ResNet],
    state: TrainState,
    test: DataSource,
    config: TrainConfig,
    placement: Placement,
    done: int,
    steps: int,
) -> Judged:
    """What the test images say of the weights, and of their averages."""
    found: list[float] = []
    for params, stats in (
        (state.params, state.stats),
        *([state.ema] if state.ema is not None else []),
    ):
        evaluation = evaluate_state(
            graphdef, params, stats, test, placement=placement, workers=config.workers
        )
        found += [evaluation.accuracy, evaluation.loss]
    return Judged(done, -(-done // steps), *found)


def _copies(graphdef: nnx.GraphDef[ResNet], state: TrainState, run: Run) -> tuple[ResNet, Run]:
    """Model and run with values of their own: the next step takes the arrays of this one.

    Raises:
      TrainingError: A parameter is not finite.
    """
    params, stats, opt_state, ema = on_host(tuple(state))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise TrainingError(
            f"the parameters are not finite after step {(run.steps or 1) - 1}. Try a smaller "
            f"learning_rate or a longer warmup_epochs."
        )
    averaged = (
        {} if ema is None else {path: leaf for part in ema for path, leaf in _by_path(part).items()}
    )
    return nnx.merge(graphdef, params, stats), replace(
        run, optimizer=record_of(run.optimizer, opt_state), ema=averaged
    )


def _by_path(values: nnx.State) -> dict[tuple[Any, ...], np.ndarray]:
    """Arrays by attribute path; counters as int64, as checkpoints have them."""
    flat = {
        path: np.asarray(variable[...])
        for path, variable in dict(nnx.to_flat_state(values)).items()
    }
    return {
        path: array.astype(np.int64) if path[-1] == "num_batches_tracked" else array
        for path, array in flat.items()
    }


def _check(model: Model, dataset: DataSource, config: TrainConfig) -> ResNet:
    network = with_head(model)
    if network.config != config.model:
        raise InputError(
            f"the model is {network.config}, but config.model is {config.model}. Use "
            f"replace(config, model=model.config)."
        )
    channels = dataset.shape[-1]
    if (
        network.config.in_channels != channels
        or (network.config.num_classes or 0) < dataset.num_classes
    ):
        raise InputError(
            f"the model takes {network.config.in_channels} channels and knows "
            f"{network.config.num_classes} classes; {dataset.name} has images of {channels} "
            f"channels in {dataset.num_classes} classes."
        )
    return network


def _check_run(run: Run, network: ResNet, pace: Pace, end: int) -> None:
    """Refuses a run that does not fit the network, is already over, or whose schedule cannot go
    that far.
    """
    theirs = {path for group in run.optimizer.groups for path in group.paths}
    ours = set(dict(nnx.to_flat_state(nnx.state(network, nnx.Param))))
    if theirs != ours:
        only = sorted(".".join(map(str, path)) for path in theirs ^ ours)
        raise InputError(
            f"the run's optimizer is another model's: {some(only)} "
            f"{'is' if len(only) == 1 else 'are'} only on one side."
        )
    if not 0 <= pace.start < end:
        raise InputError(
            f"the run is over: it is at step {pace.start}, and {_length(end, pace.steps)} end "
            f"at {end}. Take more epochs to go on."
        )
    last = (
        run.schedule.schedule.length
        if run.schedule is not None and isinstance(run.schedule.schedule, OneCycleLR)
        else None
    )
    if last is not None and pace.position(end - 1) > last:
        raise InputError(
            f"the one-cycle schedule of this run ends at its step {last}, but "
            f"{_length(end, pace.steps)} would take it to {pace.position(end - 1)}. "
            "Take fewer epochs."
        )


def _length(end: int, steps: int) -> str:
    """How long a run is, in words."""
    return f"its {end // steps} epochs of {steps} steps" if end % steps == 0 else f"its {end} steps"
