"""Where a training run begins: at random weights, at a checkpoint's, or where a run stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flax_resblock.cli import common
from flax_resblock.cli.train_data import (
    at_own_size,
    classes_note,
    filled_batches,
    opened,
    refuse_unnamed_data,
    with_channels,
)
from flax_resblock.config import ResNetConfig, architecture, name_of
from flax_resblock.convert import StateMap
from flax_resblock.convert.opening import HEADLESS, OpenedCheckpoint, ReadOptions, interpret
from flax_resblock.errors import InputError
from flax_resblock.runs.run import Run
from flax_resblock.runs.scheduler_state import ScheduleState, describe_schedule
from flax_resblock.training.config import RESNET8_DIGITS, TrainConfig, with_settings
from flax_resblock.training.data import DataSource, Splits, steps_per_epoch

if TYPE_CHECKING:
    from flax import nnx

    from flax_resblock.nn.resnet import Model
    from flax_resblock.training.pace import Pace

OF_NEW_RUNS = (
    *("learning_rate", "momentum", "nesterov", "betas", "weight_decay", "decay"),
    *("warmup_epochs", "warmup_steps", "warmup_factor"),
)
"""Settings that a continued run has in its optimizer and schedule."""


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for: the preset and the settings that change it, how to read a
    checkpoint and the run in it, whether damaged images are refused and an unhealthy checkpoint is
    accepted, and how many devices of this host share a batch; None is all of them."""

    preset: TrainConfig
    reading: common.ReadingFlags
    training: common.RunFlags
    settings: dict[str, Any]
    strict: bool
    allow_nonfinite: bool
    devices: int | None = None

    @property
    def settings_of_new_run(self) -> dict[str, Any]:
        """The settings with the optimizer, which a continued run brings along."""
        optimizer = self.training.optimizer
        return self.settings | ({} if optimizer is None else {"optimizer": optimizer})

    def read(self, path: Path, *, run: bool = False, afresh: bool = False) -> OpenedCheckpoint:
        """Opens a checkpoint and refuses unhealthy values; ``afresh`` allows absent weights."""
        with common.status.status(f"reading {path}"):
            source = self.reading.open(path, run=run, afresh=afresh)
            common.refuse_unhealthy(source, self.allow_nonfinite)
        return source


class Start(NamedTuple):
    """Model, run, configuration and data of a run that begins, and one's own code, if any."""

    model: nnx.Module
    run: Run | None
    config: TrainConfig
    splits: Splits[DataSource]
    code: Path | None = None


def fresh_config(wanted: Wanted) -> TrainConfig:
    """The configuration of a run from random weights, before its data are known."""
    settings = wanted.settings_of_new_run
    if wanted.reading.architecture is not None:
        settings["model"] = architecture(wanted.reading.architecture)
    config, classes = with_settings(wanted.preset, settings), wanted.reading.num_classes
    if classes is None or config.model is None:
        return config
    return replace(config, model=replace(config.model, num_classes=classes))


def afresh(wanted: Wanted) -> Start:
    """Starts from random weights, with the channels and classes of the data."""
    from flax_resblock.training import new_model

    config = fresh_config(wanted)
    network = config.model or RESNET8_DIGITS
    enable_x64(config.dtype == "float64")
    fixed = network.in_channels if wanted.reading.architecture is not None else None
    config, splits = at_own_size(config, opened(config, wanted.strict, fixed), network)
    classes = _num_classes(wanted.reading.num_classes, splits)
    model = replace(network, in_channels=splits.train.shape[-1], num_classes=classes)
    had = network.in_channels, network.num_classes
    now = model.in_channels, classes
    if note := classes_note(had, now, wanted.reading.num_classes, splits):
        common.print_note(note)
    config = filled_batches(
        replace(config, model=model), splits.train, wanted.devices, wanted.settings
    )
    return Start(new_model(config), None, config, splits)


def initialised(wanted: Wanted, path: Path) -> Start:
    """Starts from the weights of a checkpoint, with a head for the classes of the data."""
    settings = wanted.settings_of_new_run
    refuse_unnamed_data(path, wanted.preset, settings)
    # the parts that can be frozen are known once the checkpoint is read
    unfrozen = {name: value for name, value in settings.items() if name != "freeze"}
    data = opened(with_settings(wanted.preset, unfrozen), wanted.strict, None)
    classes = _num_classes(wanted.reading.num_classes, data)
    reading = replace(wanted.reading, num_classes=None)
    source = replace(wanted, reading=reading).read(path, afresh=True)
    network = _network_of(source, path)
    if network.num_classes != classes:
        was = network.num_classes
        source = _with_new_head(source, network, classes, wanted.reading.allow_missing)
        network = _network_of(source, path)
        had = "no head" if was is None else f"{was} classes"
        common.print_note(f"{path} has {had}: the head is new, for {classes} classes")
    common.print_title(name_of(source.config), str(path))
    common.print_notes(source.all_notes)
    config = with_settings(replace(wanted.preset, model=network), settings)
    splits = Splits(*(with_channels(part, network.in_channels) for part in data))
    config = filled_batches(config, splits.train, wanted.devices, settings)
    return Start(model_of(source, config.dtype), None, config, splits)


def _network_of(source: OpenedCheckpoint, path: Path) -> ResNetConfig:
    if not isinstance(source.config, ResNetConfig):
        raise InputError(f"{path} is a bare block; training needs a network.")
    return source.config


def _with_new_head(
    source: OpenedCheckpoint, config: ResNetConfig, classes: int, missing: tuple[str, ...]
) -> OpenedCheckpoint:
    """The checkpoint read again with a head of another size, whose weights are missing."""
    made = StateMap(replace(config, num_classes=classes), source.state_map.naming)
    old, new = (
        tuple(entry.torch_key for entry in state_map.entries if entry.flax_path[0] == "head")
        for state_map in (source.state_map, made)
    )
    kept = {key: value for key, value in source.tensors.items() if key not in old}
    notes = tuple(note for note in source.all_notes if note != HEADLESS)
    options = ReadOptions(made.config, made.naming, allow_missing=(*missing, *new))
    return interpret(replace(source.record, tensors=kept, notes=notes), options)


def resumed(wanted: Wanted, path: Path, schedule: str | None) -> Start:
    """Continues the run in a checkpoint."""
    source = wanted.read(path, run=not wanted.training.weights_only)
    network = _network_of(source, path)
    run = None if wanted.training.weights_only else wanted.training.of(source)
    common.print_title(name_of(source.config), str(path))
    common.print_notes(source.all_notes)
    its = replace(wanted, preset=replace(wanted.preset, model=network))
    config, run, splits = goes_on(run, its, schedule, network.in_channels, path)
    with common.status.status("building the network"):
        return Start(model_of(source, config.dtype), run, config, splits)


def goes_on(
    run: Run | None, wanted: Wanted, schedule: str | None, channels: int | None, path: Path | None
) -> tuple[TrainConfig, Run | None, Splits[DataSource]]:
    """Configuration, run and data of what continues a checkpoint: its run, or (where that is None)
    its weights alone. ``channels`` are the network's, if known; without ``path``, its weights are
    random."""
    if path is not None:
        stored = {} if run is None else run.settings
        refuse_unnamed_data(path, wanted.preset, wanted.settings, stored)
    if run is None:
        config = with_settings(wanted.preset, wanted.settings_of_new_run)
        splits = opened(config, wanted.strict, channels)
        config = filled_batches(config, splits.train, wanted.devices, wanted.settings)
        return config, None, splits
    common.print_found(run)
    return _continued(run, wanted, schedule, channels)


def _num_classes(asked: int | None, splits: Splits[DataSource]) -> int:
    """The number of classes that was asked for if the data fit in, else that of the data."""
    there = splits.train.num_classes
    if asked is not None and asked < there:
        raise InputError(
            f"--num-classes {asked} is less than the {there} classes that {splits.train.name} "
            f"has. Leave it out, or choose other data."
        )
    return asked or there


def enable_x64(wanted: bool) -> None:
    """Turns jax's x64 mode on."""
    if wanted:
        import jax

        jax.config.update("jax_enable_x64", True)


def model_of(source: OpenedCheckpoint, dtype: str) -> Model:
    """The model in a checkpoint; one in float64 stays in float64, whatever ``dtype`` is."""
    from flax_resblock.io import to_model

    wide = any(value.dtype.name == "float64" for value in source.tensors.values())
    enable_x64(wide or dtype == "float64")
    return to_model(source, **({} if wide else {"dtype": dtype}))


def _continued(
    run: Run, wanted: Wanted, schedule: str | None, channels: int | None
) -> tuple[TrainConfig, Run, Splits[DataSource]]:
    """Configuration and schedule of a run that goes on: as given, as stored, as in the preset."""
    from flax_resblock.training.pace import Pace, at, rescaled, schedule_of, settings_of

    given = wanted.settings
    if schedule is None:
        if fixed := [name for name in OF_NEW_RUNS if name in given]:
            raise InputError(
                f"--{fixed[0].replace('_', '-')} has no place in a run that goes on, which has its "
                f"own optimizer and schedule. Leave it out, take the weights alone "
                "(--weights-only), or take another learning rate with --schedule."
            )
        if run.problem:
            raise InputError(
                f"{run.problem} Say --schedule constant to go on at the rate that the "
                f"optimizer has, or --schedule warmup-cosine."
            )
    config = with_settings(with_settings(wanted.preset, run.settings), given)
    splits = opened(config, wanted.strict, channels)
    config = filled_batches(config, splits.train, wanted.devices, given, run.settings)
    steps = steps_per_epoch(splits.train, config.batch_size)
    pace = Pace.of(run, steps)
    if schedule == "constant" or (schedule is None and run.schedule is None):
        run = replace(run, schedule=None, problem=None)
        rates = ", ".join(f"{float(group.options['lr']):.4g}" for group in run.optimizer.groups)
        common.say(f"  learning rate  {rates}, constant")
    elif schedule == "warmup-cosine":
        run = rescaled(run, given.get("learning_rate"))
        run = at(replace(run, schedule=ScheduleState(schedule_of(config, steps), 0)), pace.start)
        pace = Pace.of(run, steps)
    if not {"epochs", "steps"} & given.keys() and config.steps is None:
        config = replace(config, epochs=_epochs_of(run, pace, config))
    if run.schedule is not None:
        common.say(f"  learning rate  {describe_schedule(run.schedule)}")
    if run.steps and run.epochs and run.steps != pace.start:
        common.print_note(
            f"the run took {run.steps} steps in {run.epochs} epochs, and here an epoch has "
            f"{pace.steps}: it had other images, or needs its own --batch-size. It goes on by its "
            "epochs."
        )
    common.say(
        f"  goes on at step {pace.start}, epoch {pace.start // steps + 1} of "
        f"{-(-config.end(steps) // steps)}, {steps} step{'s' if steps != 1 else ''} per epoch"
    )
    return config, replace(run, settings=settings_of(config)), splits


def _epochs_of(run: Run, pace: Pace, config: TrainConfig) -> int:
    """Epochs of the whole run, by its schedule, its settings or the preset."""
    done = pace.start // pace.steps
    if run.schedule is not None and run.schedule.schedule.length is not None:
        left = run.schedule.schedule.length - pace.position(pace.start)
        if left > 0:
            left = -(-left // run.schedule.unit.ticks)
            per_epoch = run.schedule.unit.per_epoch
            end = done + left if per_epoch else round((pace.start + left) / pace.steps)
            return max(end, done + 1)
    if "epochs" in run.settings:
        return run.settings["epochs"]
    common.print_note(
        f"the checkpoint does not say how long the run is: {config.epochs} more epochs (--epochs)"
    )
    return done + config.epochs
