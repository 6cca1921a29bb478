"""Where a training run begins: afresh, from the weights of a checkpoint, or where another run
stopped.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flax_resblock.cli.common import (
    ReadingFlags,
    RunFlags,
    output,
    print_found,
    print_notes,
    refuse_unhealthy,
    status,
)
from flax_resblock.config import ResNetConfig, architecture, name_of
from flax_resblock.convert import StateMap
from flax_resblock.convert.opening import HEADLESS, OpenedCheckpoint, ReadOptions, interpret
from flax_resblock.errors import InputError
from flax_resblock.runs.run import Run
from flax_resblock.runs.scheduler_state import ScheduleState, describe_schedule

if TYPE_CHECKING:
    from flax_resblock.nn.resnet import Model
    from flax_resblock.training import TrainConfig
    from flax_resblock.training.data import DataSource, Splits
    from flax_resblock.training.pace import Pace


OF_NEW_RUNS = (
    "learning_rate",
    "momentum",
    "nesterov",
    "betas",
    "weight_decay",
    "decay",
    "warmup_epochs",
    "warmup_steps",
)
"""Settings that a run which goes on brings along in its optimizer and schedule."""


class Start(NamedTuple):
    """Where a run begins: model, run to go on with, configuration, data."""

    model: Model
    run: Run | None
    config: TrainConfig
    splits: Splits[DataSource]


def fresh_config(
    preset: TrainConfig, reading: ReadingFlags, optimizer: str | None, given: dict[str, Any]
) -> TrainConfig:
    """The configuration of a run that begins afresh, before its data are known."""
    from flax_resblock.training.config import with_settings

    settings = {**given, **({} if optimizer is None else {"optimizer": optimizer})}
    if reading.architecture is not None:
        settings["model"] = architecture(reading.architecture)
    config = with_settings(preset, settings)
    return (
        config
        if reading.num_classes is None
        else replace(config, model=replace(config.model, num_classes=reading.num_classes))
    )


def afresh(
    preset: TrainConfig,
    reading: ReadingFlags,
    optimizer: str | None,
    given: dict[str, Any],
    strict: bool,
) -> Start:
    """A run from random weights; the network gets the channels and the classes of the data."""
    from flax_resblock.training import new_model

    config = fresh_config(preset, reading, optimizer, given)
    _wide(config.dtype == "float64")
    splits = opened(config, strict, fit_channels=reading.architecture is not None)
    classes = _classes(reading.num_classes, splits)
    model = replace(config.model, in_channels=splits.train.shape[-1], num_classes=classes)
    if model != config.model:
        output.print(
            f"  note  the network gets {model.in_channels} channels and {classes} classes, as "
            f"{splits.train.name} has",
            style="yellow",
            markup=False,
        )
    config = replace(config, model=model)
    return Start(new_model(config), None, config, splits)


def _classes(asked: int | None, splits: Splits[DataSource]) -> int:
    """Size of the logits: what was asked for, where the data fit into it, else what the data
    have.
    """
    there = splits.train.num_classes
    if asked is not None and asked < there:
        raise InputError(
            f"--num-classes {asked} is less than the {there} classes that {splits.train.name} "
            f"has. Leave it out, or choose other data."
        )
    return asked or there


def start(
    reading: ReadingFlags,
    training: RunFlags,
    given: dict[str, Any],
    preset: TrainConfig,
    resume: Path,
    schedule: str | None,
    allow_nonfinite: bool,
    strict: bool,
) -> Start:
    """Model, run, configuration and data of a run that goes on."""
    from flax_resblock.training.config import with_settings

    with status.status(f"reading {resume}"):
        source = reading.open(resume, run=not training.weights_only)
        refuse_unhealthy(source, allow_nonfinite)
        run = None if training.weights_only else training.of(source)
    output.print(f"[bold]{name_of(source.config)}[/]  {resume}", soft_wrap=True)
    print_notes(source.notes)
    config = replace(preset, model=source.config)
    if run is None:
        config = with_settings(config, given)
        splits = opened(config, strict)
    else:
        print_found(run)
        config, run, splits = _going_on(run, config, given, schedule, strict)
    with status.status("building the network"):
        return Start(model_of(source, config.dtype), run, config, splits)


def initialised(
    path: Path,
    reading: ReadingFlags,
    optimizer: str | None,
    given: dict[str, Any],
    preset: TrainConfig,
    allow_nonfinite: bool,
    strict: bool,
) -> Start:
    """Weights of a checkpoint, with a head for the classes of the data set; configuration and
    data.
    """
    from flax_resblock.training.config import with_settings

    settings = {**given, **({} if optimizer is None else {"optimizer": optimizer})}
    parts_later = {
        name: value for name, value in settings.items() if name != "freeze"
    }  # which parts there are, the checkpoint tells
    splits = opened(with_settings(preset, parts_later), strict, fit_channels=False)
    classes = _classes(reading.num_classes, splits)
    with status.status(f"reading {path}"):
        source = replace(reading, num_classes=None).open(path, afresh=True)
        refuse_unhealthy(source, allow_nonfinite)
        config = source.config
        if not isinstance(config, ResNetConfig):
            raise InputError(f"{path} is a bare block; training needs a network.")
        if config.num_classes != classes:
            was = "no head" if config.num_classes is None else f"{config.num_classes} classes"
            head = tuple(
                entry.torch_key
                for entry in source.state_map.entries
                if entry.flax_path[0] == "head"
            )
            config = replace(config, num_classes=classes)
            made = StateMap(config, source.state_map.naming)
            fresh = tuple(entry.torch_key for entry in made.entries if entry.flax_path[0] == "head")
            kept = {key: value for key, value in source.tensors.items() if key not in head}
            notes = tuple(note for note in source.notes if note != HEADLESS)
            record = replace(source.record, tensors=kept, notes=notes)
            allowed = (*reading.allow_missing, *fresh)
            source = interpret(record, ReadOptions(config, made.naming.name, allow_missing=allowed))
            output.print(
                f"  note  {path} has {was}: the head starts afresh, with {classes}",
                style="yellow",
                markup=False,
                soft_wrap=True,
            )
    output.print(f"[bold]{name_of(config)}[/]  {path}", soft_wrap=True)
    print_notes(source.notes)
    changed = with_settings(replace(preset, model=config), settings)
    return Start(
        model_of(source, changed.dtype), None, changed, _fitted(splits, changed.model.in_channels)
    )


def opened(
    config: TrainConfig, strict: bool = False, *, fit_channels: bool = True
) -> Splits[DataSource]:
    """The data; grey images for a network that takes colours become colours."""
    from flax_resblock.training.data import open_data

    with status.status(f"opening {config.data}") as shown:
        splits = open_data(
            config.data, strict=strict, image_size=config.image_size, on_progress=shown.update
        )
    for part in splits:
        print_notes(part.notes)
    return _fitted(splits, config.model.in_channels) if fit_channels else splits


def _fitted(splits: Splits[DataSource], channels: int) -> Splits[DataSource]:
    from flax_resblock.training.data import Splits

    return Splits(*(_with_channels(part, channels) for part in splits))


def _with_channels(dataset: DataSource, channels: int) -> DataSource:
    """Grey images for a network that takes colours: the same plane three times."""
    from flax_resblock.training.data import Dataset

    if not isinstance(dataset, Dataset) or dataset.shape[-1] != 1 or channels != 3:
        return dataset
    output.print(
        f"  note  {dataset.name}: grey images, repeated for the network's 3 channels",
        style="yellow",
        markup=False,
    )
    return replace(
        dataset,
        images=np.repeat(dataset.images, 3, axis=-1),
        mean=dataset.mean * 3,
        std=dataset.std * 3,
    )


def _wide(wanted: bool) -> None:
    """Turns on jax's 64-bit mode where the run needs it."""
    if wanted:
        import jax

        jax.config.update("jax_enable_x64", True)


def model_of(source: OpenedCheckpoint, dtype: str) -> Model:
    from flax_resblock.io import to_model

    wide = any(value.dtype.name == "float64" for value in source.tensors.values())
    _wide(wide or dtype == "float64")
    return to_model(source, **({} if wide else {"dtype": dtype}))


def _going_on(
    run: Run, config: TrainConfig, given: dict[str, Any], schedule: str | None, strict: bool
) -> tuple[TrainConfig, Run, Splits[DataSource]]:
    """Configuration and schedule of a run that goes on: what was given, else what the run says of
    itself, else the preset.
    """
    from flax_resblock.training.config import with_settings
    from flax_resblock.training.data import steps_per_epoch
    from flax_resblock.training.pace import Pace, at, schedule_of, settings_of

    if schedule is None:
        fixed = [name for name in OF_NEW_RUNS if name in given]
        if fixed:
            flag = f"--{fixed[0].replace('_', '-')}"
            raise InputError(
                f"{flag} has no place in a run that goes on, which has its own optimizer and "
                f"schedule. Leave it out, take the weights alone (--weights-only), "
                "or take another learning rate with --schedule."
            )
        if run.problem:
            raise InputError(
                f"{run.problem} Say --schedule constant to go on at the rate that the "
                f"optimizer has, or --schedule warmup-cosine."
            )
    config = with_settings(with_settings(config, run.settings), given)
    splits = opened(config, strict)
    steps = steps_per_epoch(splits.train, config.batch_size)
    pace = Pace.of(run, steps)
    if schedule == "constant" or (schedule is None and run.schedule is None):
        run = replace(run, schedule=None)
        rates = ", ".join(f"{float(group.options['lr']):.4g}" for group in run.optimizer.groups)
        output.print(f"  learning rate  {rates}, constant", markup=False)
    elif schedule == "warmup-cosine":
        run = _rescaled(run, given.get("learning_rate"))
        run = at(replace(run, schedule=ScheduleState(schedule_of(config, steps), 0)), pace.start)
        pace = Pace.of(run, steps)
    if not {"epochs", "steps"} & given.keys() and config.steps is None:
        config = replace(config, epochs=_epochs_of(run, pace, config))
    if run.schedule is not None:
        output.print(f"  learning rate  {describe_schedule(run.schedule)}", markup=False)
    _compare_counters(run, pace)
    run = replace(run, settings=settings_of(config))
    output.print(
        f"  goes on at step {pace.start}, epoch {pace.start // steps + 1} of "
        f"{-(-config.end(steps) // steps)}, {steps} steps per epoch",
        markup=False,
    )
    return config, run, splits


def _rescaled(run: Run, learning_rate: float | None) -> Run:
    """The run with another base rate of its first param group; the other groups keep their ratio to
    it.
    """
    groups = run.optimizer.groups
    bases = [float(group.options.get("initial_lr", group.options["lr"])) for group in groups]
    factor = 1.0 if learning_rate is None or not bases[0] else learning_rate / bases[0]
    options = [
        {**group.options, "lr": base * factor, "initial_lr": base * factor}
        for group, base in zip(groups, bases, strict=True)
    ]
    made = tuple(
        replace(group, options=option) for group, option in zip(groups, options, strict=True)
    )
    return replace(run, optimizer=replace(run.optimizer, groups=made))


def _epochs_of(run: Run, pace: Pace, config: TrainConfig) -> int:
    """Epochs of the whole run: until its schedule ends, else as its own settings say, else as many
    more as the preset has.
    """
    done = pace.start // pace.steps
    if run.schedule is not None and run.schedule.schedule.length is not None:
        left = run.schedule.schedule.length - pace.position(pace.start)
        if left > 0:
            return max(
                done + left if run.schedule.per_epoch else round((pace.start + left) / pace.steps),
                done + 1,
            )
    if "epochs" in run.settings:
        return run.settings["epochs"]
    output.print(
        f"  note  the checkpoint does not say how long the run is: {config.epochs} more epochs "
        f"(--epochs)",
        style="yellow",
        markup=False,
    )
    return done + config.epochs


def _compare_counters(run: Run, pace: Pace) -> None:
    """Tells where steps and epochs of the run do not go together with the steps per epoch here."""
    if run.steps and run.epochs and run.steps != pace.start:
        output.print(
            f"  note  the run took {run.steps} steps in {run.epochs} epochs, and here an epoch "
            f"has {pace.steps}: it had other images, or needs its own "
            "--batch-size. It goes on by its epochs.",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
