"""What must fit together before a run begins."""

from __future__ import annotations

import warnings
from typing import Any

from flax import nnx

from flax_resblock.convert.state_map import TensorMap
from flax_resblock.errors import InputError, some
from flax_resblock.nn.resnet import ResNet
from flax_resblock.runs.plateau import ReduceLROnPlateau
from flax_resblock.runs.run import Run
from flax_resblock.training.config import TrainConfig
from flax_resblock.training.data import DataSource
from flax_resblock.training.evaluation import classes_of
from flax_resblock.training.pace import Pace


def check_model(model: nnx.Module, dataset: DataSource, config: TrainConfig) -> None:
    """Raises InputError unless the network fits the images and the configuration."""
    if isinstance(model, ResNet) and model.config.num_classes is not None:
        _check_resnet(model, dataset, config)
    classes = classes_of(model, dataset.shape)
    trained = classes_of(model, dataset.shape, training=True)  # with auxiliary outputs, too
    if trained != classes:
        raise InputError(
            f"{type(model).__name__} returns {trained} numbers for an image in training mode and "
            f"{classes} in evaluation mode, which cannot both be logits. Write the loss and the "
            f"loop yourself (nnx.Optimizer, or train/plain_optax.py)."
        )
    if classes < dataset.num_classes:
        raise InputError(
            f"{type(model).__name__} knows {classes} classes, and {dataset.name} has images in "
            f"{dataset.num_classes}. Choose other data, or give the network more logits."
        )
    parts = dict.fromkeys(str(path[0]) for path, _ in _parameters(model))
    if not set(config.freeze) < set(parts):
        raise InputError(
            f"freeze={list(config.freeze)} must be some of {', '.join(parts)}, but not all."
        )


def _check_resnet(model: ResNet, dataset: DataSource, config: TrainConfig) -> None:
    if model.config != config.model:
        raise InputError(
            f"the model is {model.config}, but config.model is {config.model}. Use "
            f"replace(config, model=model.config)."
        )
    channels, classes = model.config.in_channels, model.config.num_classes or 0
    if channels != dataset.shape[-1] or classes < dataset.num_classes:
        raise InputError(
            f"the model takes {channels} channels and knows {classes} classes; {dataset.name} has "
            f"images of {dataset.shape[-1]} channels in {dataset.num_classes} classes."
        )


def _parameters(model: nnx.Module) -> Any:
    return nnx.to_flat_state(nnx.state(model, nnx.Param))


def check_run(
    run: Run, model: nnx.Module, tensors: TensorMap, pace: Pace, end: int, *, tested: bool
) -> None:
    """Raises InputError unless the run fits the network and can be continued until step ``end``.

    Args:
      run, pace: The run, and where it continues.
      model, tensors: The network; those of its tensors that training does not change may be absent
        from the optimizer.
    """
    still = {one.flax_path for one in tensors.parameters if not one.trained}
    theirs = {path for group in run.optimizer.groups for path in group.paths} - still
    ours = {path for path, _ in _parameters(model)} - still
    if theirs != ours:
        only = sorted(".".join(map(str, path)) for path in theirs ^ ours)
        raise InputError(
            f"the run's optimizer is another model's: {some(only)} "
            f"{'is' if len(only) == 1 else 'are'} only on one side."
        )
    steps = pace.steps
    length = f"its {end} steps" if end % steps else f"its {end // steps} epochs of {steps} steps"
    if not 0 <= pace.start < end:
        raise InputError(
            f"the run is over: it is at step {pace.start}, and {length} end at {end}. Take more "
            f"epochs to go on."
        )
    if run.problem and run.schedule is None:
        raise InputError(
            f"{run.problem} To go on at the rates that the optimizer has, pass run="
            "dataclasses.replace(run, problem=None)."
        )
    schedule = run.schedule and run.schedule.schedule
    if isinstance(schedule, ReduceLROnPlateau) and not tested:
        raise InputError(
            "the ReduceLROnPlateau of this run is stepped by what is measured on the test images "
            "after each epoch. Give some: test=... in Python."
        )
    last = None if run.schedule is None else run.schedule.schedule.end
    if run.schedule is not None and last is not None and pace.position(end - 1) > last:
        name = type(run.schedule.schedule).__name__
        raise InputError(
            f"the {name} of this run ends at its step {last}, but {length} would take it to "
            f"{pace.position(end - 1)}. Take fewer epochs."
        )


def warn_of_other_settings(run: Run, config: TrainConfig) -> None:
    """Warns where the steps of a run were made in another way than the configuration's will be."""
    names = [
        name
        for name in ("label_smoothing", "clip_norm", "ema")
        if name in run.settings and (run.settings[name] or None) != (getattr(config, name) or None)
    ]
    if names:
        theirs = ", ".join(f"{name}={run.settings[name]!r}" for name in names)
        ours = ", ".join(f"{name}={getattr(config, name)!r}" for name in names)
        warnings.warn(
            f"the run was trained with {theirs}, and goes on with {ours} of this configuration. "
            f"To go on as before, give it `{theirs}`.",
            stacklevel=3,
        )
