"""The training loop and the evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resblock.convert.run import Run
from flax_resblock.errors import InputError, some
from flax_resblock.optimizers import optimizer_of, record_of, state_of
from flax_resblock.resnet import Model, ResNet
from flax_resblock.schedules import OneCycleLR
from train.config import TrainConfig
from train.data import Dataset, Source, Stream, evaluation_batches, steps_per_epoch
from train.errors import Stopped, TrainingError
from train.pace import Pace, new_run
from train.progress import TrainingProgress
from train.step import Mixed, TrainState, make_eval_step, make_train_step, split

EVAL_BATCH = 512


class Step(NamedTuple):
    """One step: its number from 0 over the whole run, its epoch, mean loss and accuracy of its batch before the update, and the learning rate of
    the first param group."""

    step: int
    epoch: int
    loss: float
    accuracy: float
    learning_rate: float


class Saver(Protocol):
    """Keeps a run, as :class:`train.run_folder.RunFolder` does."""

    def due(self, step: int, /) -> bool:
        """Whether to keep the state after ``step`` steps."""
        ...

    def save(self, model: ResNet, run: Run, /) -> None:
        """Keeps it; the values are the saver's own."""
        ...


class Evaluation(NamedTuple):
    """Accuracy in [0, 1], the predicted classes ``(N,)`` int64 and the logits ``(N, num_classes)``."""

    accuracy: float
    predictions: np.ndarray
    logits: np.ndarray


@dataclass
class History:
    """What a run reported.

    Attributes:
      steps: Every step, in order.
      test_accuracy: Accuracy on the test images after each epoch, in [0, 1]; empty where none were given.
      run: Optimizer, schedule and counters after the last step; :func:`flax_resblock.save` writes them beside the model.
    """

    steps: list[Step] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    run: Run | None = None


def new_model(config: TrainConfig) -> ResNet:
    """The configured network with fresh weights from ``config.seed``, in training mode.

    Raises:
      InputError: ``dtype="float64"`` while jax's x64 mode is off.
    """
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise InputError('dtype="float64" needs jax\'s x64 mode: set JAX_ENABLE_X64=1.')
    param_dtype = jnp.promote_types(config.dtype, jnp.float32)
    return ResNet(config.model, rngs=nnx.Rngs(config.seed), dtype=config.dtype, param_dtype=param_dtype)


def fit(
    model: Model,
    dataset: Source,
    config: TrainConfig,
    *,
    test: Source | None = None,
    run: Run | None = None,
    on_step: Callable[[Step], None] | None = None,
    saver: Saver | None = None,
    stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> History:
    """Trains a network in place.

    Args:
      model: The network that ``config.model`` describes, from :func:`new_model` or ``flax_resblock.from_torch``. It receives the new values at the end, and
        stays as it was if the run fails; its mode (training or evaluation) does not matter and does not change.
      dataset: Images to learn from.
      config: The run.
      test: Images to classify after each epoch.
      run: A run to go on with, in PyTorch or here, from :func:`flax_resblock.load_run`: its optimizer with all buffers, its schedule (the rates that the param
        groups have, where it has none) and its counters, which also give the order of the images. It ends after ``config.epochs`` epochs, those before
        included. None: the configured SGD and schedule from the start.
      on_step: Called after each step.
      saver: Receives copies of model and run after the steps that it wants, after the last one, and before a stop.
      stop: Asked after each step whether to end the run there.
      progress: Whether to show a progress bar.
    Returns:
      Loss and accuracy of every step.
    Raises:
      InputError: Model, images and configuration do not fit each other.
      TrainingError: The loss is not finite; the message names the step.
      Stopped: ``stop`` said so; the model stays as it was.
    """
    network = _check(model, dataset, config)
    steps = steps_per_epoch(dataset, config.batch_size)
    run = run or new_run(config, steps)
    pace, record, end = Pace.of(run, steps), run.optimizer, config.epochs * steps
    _check_run(run, network, pace, end)
    optimizer = optimizer_of(record)
    graphdef, state = split(network, optimizer, freeze=config.freeze)
    state = state._replace(opt_state=state_of(record, state.params))
    train_step = make_train_step(graphdef, optimizer, label_smoothing=config.label_smoothing, freeze=config.freeze)
    history = History()
    with TrainingProgress((end - pace.start) * config.batch_size, config.epochs, shown=progress) as bar:
        stream = Stream(dataset, config.batch_size, seed=config.seed, augmentation=config.augmentation, workers=config.workers)
        with closing(stream.from_step(pace.start)) as coming:
            for number, batch in zip(range(pace.start, end), coming, strict=False):
                epoch = number // steps
                rates = pace.rates(number)
                mixed = None if batch.labels_b is None else Mixed(batch.labels_b, batch.weight)
                state, metrics = train_step(state, batch.images, batch.labels, rates, mixed)
                rate = float(rates.learning_rates[0])
                step = Step(number, epoch, float(metrics.loss), float(metrics.accuracy), rate)
                if not math.isfinite(step.loss):
                    raise TrainingError(
                        f"the loss is {step.loss} at step {number} (epoch {epoch + 1}, learning rate {rate:.3g}); the model keeps its values from before the "
                        "run. Try a smaller learning_rate or a longer warmup_epochs, and look at the weights and images for non-finite values."
                    )
                history.steps.append(step)
                bar.advance(config.batch_size, epoch=epoch, loss=step.loss, accuracy=step.accuracy)
                if on_step is not None:
                    on_step(step)
                stopped, done = stop is not None and stop(), number + 1
                if saver is not None and (stopped or done == end or saver.due(done)):
                    saver.save(*_copies(graphdef, state, pace.after(done)))
                if test is not None and done % steps == 0:
                    history.test_accuracy.append(_evaluate(graphdef, state.params, state.stats, test).accuracy)
                if stopped and done < end:
                    raise Stopped(done)
    nnx.update(network, state.params, state.stats)
    after = pace.after(end)
    history.run = replace(after, optimizer=record_of(after.optimizer, state.opt_state))
    return history


def _copies(graphdef: nnx.GraphDef[ResNet], state: TrainState, run: Run) -> tuple[ResNet, Run]:
    """Model and run with values of their own: the next step takes the arrays of this one."""
    params, stats, opt_state = jax.tree.map(lambda leaf: np.array(leaf, copy=True), tuple(state))
    return nnx.merge(graphdef, params, stats), replace(run, optimizer=record_of(run.optimizer, opt_state))


def evaluate(model: Model, images: np.ndarray, labels: np.ndarray, *, batch_size: int = EVAL_BATCH) -> Evaluation:
    """Classifies every image exactly once, in evaluation mode; the model does not change.

    Args:
      model: A network with a head.
      images: ``(N, H, W, C)``, normalised (:meth:`Dataset.normalised`), at least one.
      labels: ``(N,)``, integers.
      batch_size: Images at a time; the last batch is filled up with zeros, whose logits are dropped, so that one shape is compiled.
    Raises:
      InputError: A model without logits, no images, or not one label per image.
    """
    if not len(images) or len(images) != len(labels):
        raise InputError(f"evaluation takes one label per image and at least one image; got {len(images)} images and {len(labels)} labels.")
    network = _with_head(model)
    classes = max(network.config.num_classes or 0, int(labels.max()) + 1)
    channels = images.shape[-1]
    source = Dataset(name="images", images=images, labels=labels, num_classes=classes, mean=(0.0,) * channels, std=(1.0,) * channels)
    graphdef, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    return _evaluate(graphdef, params, stats, source, batch_size)


def _evaluate(graphdef: nnx.GraphDef[ResNet], params: nnx.State, stats: nnx.State, source: Source, batch_size: int = EVAL_BATCH) -> Evaluation:
    eval_step = make_eval_step(graphdef)
    pieces = []
    with closing(evaluation_batches(source, min(batch_size, len(source)))) as coming:
        for batch in coming:
            pieces.append(np.asarray(eval_step(params, stats, batch.images))[batch.valid])
    logits = np.concatenate(pieces)
    predictions = logits.argmax(axis=1)
    return Evaluation(float(np.mean(predictions == source.labels)), predictions, logits)


def _with_head(model: Model) -> ResNet:
    if not isinstance(model, ResNet) or model.config.num_classes is None:
        raise InputError("training and evaluation need a ResNet with a head; a bare block, or a network with num_classes=None, has no logits.")
    return model


def _check(model: Model, dataset: Source, config: TrainConfig) -> ResNet:
    network = _with_head(model)
    if network.config != config.model:
        raise InputError(f"the model is {network.config}, but config.model is {config.model}. Use replace(config, model=model.config).")
    channels = dataset.shape[-1]
    if (network.config.in_channels, network.config.num_classes) != (channels, dataset.num_classes):
        raise InputError(
            f"the model takes {network.config.in_channels} channels and knows {network.config.num_classes} classes; {dataset.name} has images of {channels} "
            f"channels in {dataset.num_classes} classes."
        )
    return network


def _check_run(run: Run, network: ResNet, pace: Pace, end: int) -> None:
    """Refuses a run that does not fit the network, is already over, or whose schedule cannot go that far."""
    theirs = {path for group in run.optimizer.groups for path in group.paths}
    ours = set(dict(nnx.to_flat_state(nnx.state(network, nnx.Param))))
    if theirs != ours:
        only = sorted(".".join(map(str, path)) for path in theirs ^ ours)
        raise InputError(f"the run's optimizer is another model's: {some(only)} {'is' if len(only) == 1 else 'are'} only on one side.")
    if not 0 <= pace.start < end:
        raise InputError(
            f"the run is over: it is at step {pace.start}, and its {end // pace.steps} epochs of {pace.steps} steps end at {end}. Take more epochs to go on."
        )
    last = run.schedule.schedule.length if run.schedule is not None and isinstance(run.schedule.schedule, OneCycleLR) else None
    if last is not None and pace.position(end - 1) > last:
        raise InputError(
            f"the one-cycle schedule of this run ends at its step {last}, but epochs={end // pace.steps} would take it to {pace.position(end - 1)}. "
            "Take fewer epochs."
        )
