"""``flax-resblock train``."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from flax_resblock.checkpoint import RUN_FOLDER
from flax_resblock.cli.common import ReadingFlags, RunFlags, on_interrupt, output, status
from flax_resblock.cli.train_start import SettingFlags, initialised, start
from flax_resblock.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from train import History


Preset = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="PRESET", help="Run by name: digits-resnet8, fashion-resnet20, cifar10-resnet20, cifar10-resnet56, imagenet-resnet50."),
]


def train(
    reading: ReadingFlags,
    training: RunFlags,
    settings: SettingFlags,
    preset: Preset = "digits-resnet8",
    resume: Path | None = None,
    init: Path | None = None,
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
      init: Checkpoint whose weights the run begins with; where it has another number of classes, or no head, the head starts afresh.
      out: Folder for the results; runs/PRESET by default. It must not exist yet, unless the run in it goes on.
      schedule: Another learning rate than that of the checkpoint: constant, or linear warm-up and cosine over the whole run.
      save_every: Steps between two checkpoints; by default one per epoch.
      keep: Checkpoints to keep, the newest.
      allow_nonfinite: Go on from NaN, infinities and negative variances.
    """
    try:
        from train import PRESETS, Stopped, TrainingError, fit
        from train.data import steps_per_epoch
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
    started = time.perf_counter()
    if init is not None and resume is None:
        model, config, splits = initialised(init, reading, settings, PRESETS[preset], allow_nonfinite)
        run = None
    else:
        model, run, config, splits = start(reading, training, settings, PRESETS[preset], resume, schedule, allow_nonfinite)
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
        accuracy = history.test_accuracy[-1]  # after the last epoch, with which every run ends
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
