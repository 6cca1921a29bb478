"""``flax-resblock train``."""

from __future__ import annotations

import signal
import sys
import threading
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from flax_resblock.architecture import name_of
from flax_resblock.checkpoint import RUN_FOLDER
from flax_resblock.cli.common import ReadingFlags, RunFlags, on_interrupt, output, print_found, print_notes, refuse_unhealthy, status
from flax_resblock.convert.run import Run
from flax_resblock.convert.schedule import ScheduleState, describe
from flax_resblock.convert.source import Source
from flax_resblock.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from flax_resblock.resnet import Model
    from train import History, TrainConfig
    from train.data import Dataset
    from train.pace import Pace


Preset = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET", help="Run by name: digits-resnet8.")]


@dataclass(frozen=True)
class SettingFlags:
    """Settings of the run that differ from the preset's, or from those of the run that goes on."""

    epochs: int | None = None
    """Passes over the training images, those before a resumption included."""
    batch_size: int | None = None
    """Images per step."""
    learning_rate: float | None = None
    """Peak learning rate."""
    momentum: float | None = None
    """Momentum of SGD."""
    weight_decay: float | None = None
    """Weight decay of convolution and linear kernels."""
    warmup_epochs: float | None = None
    """Length of the linear warm-up."""
    label_smoothing: float | None = None
    """Label smoothing, from 0 to below 1."""
    seed: int | None = None
    """Seed of the weights and of the order of the images."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """Dtype of the computation."""

    @property
    def given(self) -> dict[str, Any]:
        """Those that were given."""
        return {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None}


OF_NEW_RUNS = ("learning_rate", "momentum", "weight_decay", "warmup_epochs")
"""Settings that a run which goes on brings along in its optimizer and schedule."""


def train(
    reading: ReadingFlags,
    training: RunFlags,
    settings: SettingFlags,
    preset: Preset = "digits-resnet8",
    resume: Path | None = None,
    out: Path | None = None,
    schedule: Literal["constant", "warmup-cosine"] | None = None,
    save_every: int | None = None,
    keep: int = 3,
    allow_nonfinite: bool = False,
) -> int:
    """Trains a network in JAX: from scratch, or from where a run stopped, in PyTorch or here, with its optimizer, schedule and counters.

    --resume takes a training checkpoint of a plain PyTorch loop, torchvision's references, timm or Lightning, a Hugging Face Trainer folder, what this
    command or `convert --with-optimizer` wrote, or the word auto: go on with what is in OUT, or begin. OUT gets checkpoints, every step's loss and a
    summary; convert OUT run.pth --with-optimizer takes the run back to PyTorch. SIGINT and SIGTERM save and end with status 130 or 143; a run that was
    killed goes on from its last checkpoint, bit for bit.

    Args:
      reading: How to read the checkpoint.
      training: What to do with the training run in it. train carries it anyway, unless --weights-only is given.
      settings: What differs from the preset.
      preset: The run.
      resume: Checkpoint to go on from, or auto.
      out: Folder for the results; runs/PRESET by default. It must not exist yet, unless the run in it goes on.
      schedule: Another learning rate than that of the checkpoint: constant, or linear warm-up and cosine over the whole run.
      save_every: Steps between two checkpoints; by default one per epoch.
      keep: Checkpoints to keep, the newest.
      allow_nonfinite: Go on from NaN, infinities and negative variances.
    """
    try:
        from train import PRESETS, Stopped, TrainingError, evaluate, fit
        from train.data import digits, steps_per_epoch
        from train.run_folder import SUMMARY, RunFolder
    except ImportError as error:
        raise MissingDependencyError(f"training needs {error.name}, which is not installed: pip install 'flax-resblock[train]'.") from error
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r} is unknown; known: {', '.join(PRESETS)}.")
    if keep < 1 or (save_every is not None and save_every < 1):
        raise InputError(f"--keep {keep} and --save-every {save_every} must be at least 1.")
    out = out or Path("runs") / preset
    resume = _resumed(resume, out)
    if resume == out and (out / SUMMARY).is_file() and settings.epochs is None:
        output.print(f"the run in {out} is complete; --epochs takes it further", markup=False, soft_wrap=True)
        return 0
    splits = digits()
    started = time.perf_counter()
    model, run, config = _start(reading, training, settings, PRESETS[preset], resume, schedule, splits.train, allow_nonfinite)
    every = save_every or steps_per_epoch(splits.train, config.batch_size)
    with RunFolder(out, config, every=every, keep=keep) as folder, Stop() as stop:
        try:
            history = fit(model, splits.train, config, test=splits.test, run=run, on_step=folder.record, saver=folder, stop=stop.asked)
        except Stopped as stopped:
            folder.wait()
            print(f"flax-resblock: stopped after step {stopped.step}; {folder.saved} is written. Go on with --resume auto --out {out}.", file=sys.stderr)
            return 128 + (stop.signal or 0)
        except TrainingError as error:
            folder.wait()
            raise TrainingError(f"{error} The last good checkpoint: {folder.saved or 'none yet'}.") from error
        accuracy = evaluate(model, splits.test.normalised(), splits.test.labels).accuracy
        folder.finish(_summary(history, accuracy, time.perf_counter() - started))
    done = len(history.steps)
    output.print(f"{done} step{'s' if done != 1 else ''}, last loss {history.steps[-1].loss:.4f}, test accuracy {accuracy:.2%}")
    output.print(f"wrote {out}; back to PyTorch: flax-resblock convert {out} run.pth --with-optimizer", markup=False, soft_wrap=True)
    return 0


class Stop:
    """Remembers SIGINT and SIGTERM while a run goes on, so that it can end between two steps; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._caught) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _: object) -> None:
        if self.signal is not None:
            on_interrupt()
        self.signal = number
        status.print("stopping after this step; the run is saved first")

    def asked(self) -> bool:
        """Whether one came."""
        return self.signal is not None


def _resumed(resume: Path | None, out: Path) -> Path | None:
    """The checkpoint to go on from; refuses a folder that would be overwritten."""
    exists = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if resume == Path("auto"):
        if exists and not (out / RUN_FOLDER).is_dir():
            raise InputError(f"{out} is no folder of a run, as it has no {RUN_FOLDER}/ in it. Choose another with --out.")
        return out if any((out / RUN_FOLDER).glob("step-*")) else None
    if exists and not (resume is not None and resume.exists() and out.samefile(resume)):
        raise InputError(f"{out} exists. A run is never overwritten: go on with it (--resume auto), choose another folder with --out, or remove it.")
    return resume


def _start(
    reading: ReadingFlags,
    training: RunFlags,
    settings: SettingFlags,
    preset: TrainConfig,
    resume: Path | None,
    schedule: str | None,
    dataset: Dataset,
    allow_nonfinite: bool,
) -> tuple[Model, Run | None, TrainConfig]:
    """Model, run and configuration, afresh or from a checkpoint."""
    from train import new_model

    if resume is None:
        config = _changed(preset, settings.given)
        _wide(config.dtype == "float64")
        return new_model(config), None, config
    with status.status(f"reading {resume}"):
        source = reading.open(resume, run=not training.weights_only)
        refuse_unhealthy(source, allow_nonfinite)
        run = None if training.weights_only else training.of(source)
    output.print(f"[bold]{name_of(source.config)}[/]  {resume}", soft_wrap=True)
    print_notes(source.notes)
    config = replace(preset, model=source.config)
    if run is None:
        config = _changed(config, settings.given)
    else:
        print_found(run)
        config, run = _going_on(run, config, settings.given, dataset, schedule)
    with status.status("building the network"):
        return _model_of(source, config.dtype), run, config


def _changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """The configuration with other settings; a run of few epochs gets a warm-up of half of them at most, where none was asked for."""
    if "epochs" in changes and "warmup_epochs" not in changes:
        changes = {**changes, "warmup_epochs": min(config.warmup_epochs, changes["epochs"] / 2)}
    return replace(config, **changes)


def _wide(wanted: bool) -> None:
    """Turns on jax's 64-bit mode where the run needs it."""
    if wanted:
        import jax

        jax.config.update("jax_enable_x64", True)


def _model_of(source: Source, dtype: str) -> Model:
    from flax_resblock.transfer import to_model

    wide = any(value.dtype.name == "float64" for value in source.tensors.values())
    _wide(wide or dtype == "float64")
    return to_model(source, **({} if wide else {"dtype": dtype}))


def _going_on(run: Run, config: TrainConfig, given: dict[str, Any], dataset: Dataset, schedule: str | None) -> tuple[TrainConfig, Run]:
    """Configuration and schedule of a run that goes on: what was given, else what the run says of itself, else the preset."""
    from train.data import steps_per_epoch
    from train.pace import Pace, at, schedule_of, settings_of

    if schedule is None:
        fixed = [name for name in OF_NEW_RUNS if name in given]
        if fixed:
            flag = f"--{fixed[0].replace('_', '-')}"
            raise InputError(
                f"{flag} has no place in a run that goes on, which has its own optimizer and schedule. Leave it out, take the weights alone (--weights-only), "
                "or take another learning rate with --schedule."
            )
        if run.problem:
            raise InputError(f"{run.problem} Say --schedule constant to go on at the rate that the optimizer has, or --schedule warmup-cosine.")
    config = _changed(config, {**run.settings, **given})
    steps = steps_per_epoch(dataset, config.batch_size)
    pace = Pace.of(run, steps)
    if schedule == "constant" or (schedule is None and run.schedule is None):
        run = replace(run, schedule=None)
        rates = ", ".join(f"{float(group.options['lr']):.4g}" for group in run.optimizer.groups)
        output.print(f"  learning rate  {rates}, constant", markup=False)
    elif schedule == "warmup-cosine":
        run = _rescaled(run, given.get("learning_rate"))
        run = at(replace(run, schedule=ScheduleState(schedule_of(config, steps), 0)), pace.start)
        pace = Pace.of(run, steps)
    if "epochs" not in given:
        config = replace(config, epochs=_epochs_of(run, pace, config))
    if run.schedule is not None:
        output.print(f"  learning rate  {describe(run.schedule)}", markup=False)
    _compare_counters(run, pace)
    run = replace(run, settings=settings_of(config))
    output.print(f"  goes on at step {pace.start}, epoch {pace.start // steps + 1} of {config.epochs}, {steps} steps per epoch", markup=False)
    return config, run


def _rescaled(run: Run, learning_rate: float | None) -> Run:
    """The run with another base rate of its first param group; the other groups keep their ratio to it."""
    groups = run.optimizer.groups
    bases = [float(group.options.get("initial_lr", group.options["lr"])) for group in groups]
    factor = 1.0 if learning_rate is None or not bases[0] else learning_rate / bases[0]
    options = [{**group.options, "lr": base * factor, "initial_lr": base * factor} for group, base in zip(groups, bases, strict=True)]
    made = tuple(replace(group, options=option) for group, option in zip(groups, options, strict=True))
    return replace(run, optimizer=replace(run.optimizer, groups=made))


def _epochs_of(run: Run, pace: Pace, config: TrainConfig) -> int:
    """Epochs of the whole run: until its schedule ends, else as its own settings say, else as many more as the preset has."""
    done = pace.start // pace.steps
    if run.schedule is not None and run.schedule.schedule.length is not None:
        left = run.schedule.schedule.length - pace.position(pace.start)
        if left > 0:
            return max(done + left if run.schedule.per_epoch else round((pace.start + left) / pace.steps), done + 1)
    if "epochs" in run.settings:
        return run.settings["epochs"]
    output.print(f"  note  the checkpoint does not say how long the run is: {config.epochs} more epochs (--epochs)", style="yellow", markup=False)
    return done + config.epochs


def _compare_counters(run: Run, pace: Pace) -> None:
    """Tells where steps and epochs of the run do not go together with the steps per epoch here."""
    if run.steps and run.epochs and run.steps != pace.start:
        output.print(
            f"  note  the run took {run.steps} steps in {run.epochs} epochs, and here an epoch has {pace.steps}: it had other images, or needs its own "
            "--batch-size. It goes on by its epochs.",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def _summary(history: History, accuracy: float, seconds: float) -> dict[str, Any]:
    """What a finished run leaves behind as JSON."""
    return {
        "steps": len(history.steps),
        "last_step": history.steps[-1].step,
        "loss": history.steps[-1].loss,
        "mean_loss_of_last_10": float(np.mean([step.loss for step in history.steps[-10:]])),
        "test_accuracy": accuracy,
        "test_accuracy_by_epoch": history.test_accuracy,
        "seconds": round(seconds, 1),
    }
