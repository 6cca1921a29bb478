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

from flax_resblock.convert.image_facts import ImageFacts, carry_images
from flax_resblock.errors import InputError, some
from flax_resblock.nn.resnet import ResNet
from flax_resblock.runs.optimizers import optimizer_of, parameter_path, record_of, state_of
from flax_resblock.runs.run import Run
from flax_resblock.runs.tensors import tensors_of
from flax_resblock.training.checks import check_model, check_run, warn_of_other_settings
from flax_resblock.training.config import TrainConfig
from flax_resblock.training.data import Batch, DataSource, Stream, steps_per_epoch
from flax_resblock.training.data.facts import image_facts
from flax_resblock.training.devices import Placement, on_host
from flax_resblock.training.errors import Stopped, TrainingError
from flax_resblock.training.evaluation import evaluate_state
from flax_resblock.training.loss import Mixed
from flax_resblock.training.pace import Pace, Rates, new_run
from flax_resblock.training.progress import TrainingProgress
from flax_resblock.training.randomness import random_state
from flax_resblock.training.reports import EvaluationReport, History, Saver, StepReport
from flax_resblock.training.state import Leaves, TrainState, by_path, split
from flax_resblock.training.step import Metrics, make_train_step


def new_model(config: TrainConfig) -> ResNet:
    """Creates the configured network with fresh weights from ``config.seed``, in training mode.

    Raises:
      InputError: No configured network, or ``dtype="float64"`` without jax's x64 mode.
    """
    if config.model is None:
        raise InputError("config.model is None: create the network yourself.")
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise InputError('dtype="float64" needs jax\'s x64 mode: set JAX_ENABLE_X64=1.')
    param_dtype = jnp.promote_types(config.dtype, jnp.float32)
    rngs = nnx.Rngs(config.seed)
    return ResNet(config.model, rngs=rngs, dtype=config.dtype, param_dtype=param_dtype)


def fit(
    model: nnx.Module,
    dataset: DataSource,
    config: TrainConfig,
    *,
    test: DataSource | None = None,
    run: Run | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_evaluation: Callable[[EvaluationReport], None] | None = None,
    saver: Saver | None = None,
    stop: Callable[[], bool] | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> History:
    """Trains a network in place.

    Args:
      model: Any nnx module from images ``(N, H, W, C)`` to logits ``(N, num_classes)``: the network
        that ``config.model`` describes, from :func:`new_model` or ``flax_resblock.from_torch``; one
        that was ported, from ``flax_resblock.load_ported``; or one of your own. It receives the
        trained values at the end, and stays as it was if the run fails. Its mode does not matter
        and does not change. What dropout draws depends on ``config.seed`` and the step.
      dataset: The training images.
      config: The run.
      test: Test images, classified after each epoch and at the end.
      run: A PyTorch or JAX run to continue, from :func:`flax_resblock.load_run`: its optimizer with
        all buffers, its schedule (without one, the rates of its param groups stay), and its
        counters, which also give the order of the images. ``config`` says where the whole run ends.
        None starts the configured optimizer and schedule.
      on_step: Called with each step's report, while the next step is computed.
      on_evaluation: Called with each evaluation's report.
      saver: Receives copies of model and run after the steps that it asks for, after the last one,
        and before a stop.
      stop: Called after each step; True ends the run there. In a run of several processes, one that
        returns True ends all.
      mesh: The devices that share each batch, from :func:`flax_resblock.training.data_mesh`; None
        uses jax's default device.
      progress: Whether to show a progress bar.
    Returns:
      Loss and accuracy of every step, the evaluations, and the run to save.
    Raises:
      InputError: Model, images, devices and configuration do not fit each other.
      TrainingError: The loss is not finite; the message names the step and the images.
      Stopped: ``stop`` returned True; the model stays as it was.
    """
    check_model(model, dataset, config)
    tensors, random, facts = tensors_of(model), random_state(model), image_facts(dataset)
    placement = Placement(mesh)
    placement.check(config.batch_size, config.accumulate)
    steps = steps_per_epoch(dataset, config.batch_size)
    run = run or new_run(config, steps, tensors)
    pace, record, end = Pace.of(run, steps), run.optimizer, config.end(steps)
    check_run(run, model, tensors, pace, end, tested=test is not None)
    warn_of_other_settings(run, config)
    optimizer = optimizer_of(record)
    graphdef, state = split(model, optimizer, freeze=config.freeze, placement=placement)
    state = state._replace(
        opt_state=placement.copies(state_of(record, state.params, state.opt_state)),
        ema=_averages(config, run, state, placement),
    )
    train_step = make_train_step(
        graphdef,
        optimizer,
        label_smoothing=config.label_smoothing,
        aux_weight=config.aux_weight,
        freeze={(part,) for part in config.freeze}
        | {one.flax_path for one in tensors.parameters if not one.trained},
        accumulate=config.accumulate,
        clip_norm=config.clip_norm,
        ema=config.ema,
        replicas=config.batch_norm == "replica" and placement.devices > 1,
        mesh=mesh,
        random=random,
        seed=config.seed,
    )
    rest = () if random is None else (random,)
    stream = Stream(
        dataset,
        config.batch_size,
        seed=config.seed,
        augmentation=config.augmentation,
        shard=placement.shard,
        pieces=config.accumulate,
        workers=config.workers,
    )

    def placed(batch: Batch) -> Batch:
        return batch._replace(
            **{
                name: placement.spread(value, pieces=config.accumulate)
                for name, value in batch._asdict().items()
                if name != "indices" and value is not None
            }
        )

    def evaluated(test: DataSource, state: TrainState, done: int) -> EvaluationReport:
        how = {"placement": placement, "random": random, "workers": config.workers}
        found: list[float] = []
        for values in ((state.params, state.stats), state.ema):
            if values is not None:
                evaluation = evaluate_state(graphdef, *values, test, **how)
                found += [evaluation.accuracy, evaluation.loss]
        return EvaluationReport(done, -(-done // steps), *found)

    leaves, history = Leaves(state), History()
    several = placement.shard[1] > 1
    images, epochs = (end - pace.start) * config.batch_size, -(-end // steps)
    with (
        TrainingProgress(images, epochs, shown=progress) as bar,
        closing(stream.from_step(pace.start, place=placed)) as coming,
    ):

        def reported(computed: _ComputedStep) -> bool:
            """Waits for a step's numbers; returns whether any process wants to stop."""
            step = computed.report(steps)
            history.steps.append(step)
            bar.advance(config.batch_size, epoch=step.epoch, loss=step.loss, accuracy=step.accuracy)
            if on_step is not None:
                on_step(step)
            wanted = computed.metrics.stop
            return wanted is not None and bool(np.asarray(wanted))

        def asked() -> bool:
            return stop is not None and stop()

        computed: _ComputedStep | None = None
        for number, batch in zip(range(pace.start, end), coming, strict=False):
            rates, done = pace.rates(number), number + 1
            flag = placement.flag(asked()) if several else None
            metrics = train_step.advance(
                leaves,
                batch.images,
                batch.labels,
                rates,
                None if batch.labels_b is None else Mixed(batch.labels_b, batch.weight),
                stop=flag,
                number=None if random is None else np.uint32(number),
            )
            # the report of the step before, while this one is computed
            stopped = computed is not None and reported(computed)
            if not several:
                stopped = asked()
            computed = _ComputedStep(number, rates, batch.indices, metrics)
            tested = test is not None and (done % steps == 0 or done == end)
            saved = saver is not None and saver.due(done, None)
            if not (stopped or tested or saved or done == end):
                continue
            reported(computed)
            computed = evaluation = None
            if test is not None and tested:
                evaluation = evaluated(test, leaves.state, done)
                history.evaluations.append(evaluation)
                if on_evaluation is not None:
                    on_evaluation(evaluation)
                pace = pace.seeing(evaluation) if done % steps == 0 else pace
            if saver is not None and (stopped or done == end or saver.due(done, evaluation)):
                saver.save(*_copies(graphdef, leaves.state, rest, pace.after(done), facts))
            if stopped and done < end:
                raise Stopped(done)
    state = leaves.state
    params, stats = on_host((state.params, state.stats)) if several else (state.params, state.stats)
    nnx.update(model, params, stats)
    carry_images(model, facts)
    _, history.run = _copies(graphdef, state, rest, pace.after(end), facts)
    return history


class _ComputedStep(NamedTuple):
    """A step that the devices are computing."""

    number: int
    rates: Rates
    indices: np.ndarray
    metrics: Metrics

    def report(self, steps: int) -> StepReport:
        """Waits for the step and reports it; raises TrainingError if its loss is not finite."""
        rate, metrics = float(self.rates.learning_rates[0]), self.metrics
        step = StepReport(
            self.number, self.number // steps, float(metrics.loss), float(metrics.accuracy), rate
        )
        if not math.isfinite(step.loss):
            raise TrainingError(
                f"the loss is {step.loss} at step {step.step} (epoch {step.epoch + 1}, learning "
                f"rate {rate:.3g}), on images {some([str(index) for index in self.indices])}; the "
                "model keeps its values from before the run. Try a smaller learning_rate or a "
                "longer warmup_epochs, and look at the weights and images for non-finite values.",
                step=step.step,
                indices=self.indices,
            )
        return step


def _averages(
    config: TrainConfig, run: Run, state: TrainState, placement: Placement
) -> tuple[nnx.State, nnx.State] | None:
    """The averaged weights and statistics to continue with: the run's, else the current values."""
    if not config.ema:
        return None

    def kept(values: nnx.State) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: run.ema.get(parameter_path(keys), leaf), values
        )

    return placement.copies((kept(state.params), kept(state.stats)))


def _copies(
    graphdef: Any, state: TrainState, rest: tuple[nnx.State, ...], run: Run, facts: ImageFacts
) -> tuple[nnx.Module, Run]:
    """Copies of model and run, because the next step reuses the arrays of the state."""
    params, stats, opt_state, ema = on_host(tuple(state))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise TrainingError(
            f"the parameters are not finite after step {(run.steps or 1) - 1}. Try a smaller "
            f"learning_rate or a longer warmup_epochs."
        )
    averaged = {path: leaf for part in ema or () for path, leaf in by_path(part).items()}
    model = nnx.merge(graphdef, params, stats, *rest)
    carry_images(model, facts)
    return model, replace(run, optimizer=record_of(run.optimizer, opt_state), ema=averaged)
