"""``flax-resblock train``."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from flax_resblock import checkpoint
from flax_resblock.checkpoint import RUN_FOLDER
from flax_resblock.cli.common import ReadingFlags, RunFlags, output, status
from flax_resblock.cli.evaluate import classify
from flax_resblock.cli.interrupts import on_interrupt
from flax_resblock.cli.train_flags import ScaleFlags, SettingFlags
from flax_resblock.cli.train_start import Start, afresh, fresh_config, initialised, start
from flax_resblock.errors import CheckpointError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from flax_resblock.training import TrainConfig


Preset = Annotated[
    str,
    tyro.conf.arg(
        metavar="NAME",
        help=(
            "Run by name: digits-resnet8, fashion-resnet20, cifar10-resnet20, cifar10-resnet56, "
            "imagenet-resnet50."
        ),
    ),
]


def train(
    reading: ReadingFlags,
    training: RunFlags,
    settings: SettingFlags,
    scale: ScaleFlags,
    preset: Preset = "digits-resnet8",
    resume: Path | None = None,
    init: Path | None = None,
    eval_only: Path | None = None,
    out: Path | None = None,
    schedule: Literal["constant", "warmup-cosine"] | None = None,
    save_every: int | None = None,
    keep: int = 3,
    print_config: bool = False,
    strict: bool = False,
    allow_nonfinite: bool = False,
) -> int:
    """Trains a network in JAX: from scratch, or from where a run stopped, in PyTorch or here, with
    its optimizer, schedule and counters.

    --resume takes a training checkpoint of a plain PyTorch loop, torchvision's references, timm or
    Lightning, a Hugging Face Trainer folder, what this command or `convert --with-optimizer` wrote,
    or the word auto: go on with what is in OUT, or begin. OUT gets checkpoints, every step's loss
    as JSON lines and TensorBoard events, curves and a summary; convert OUT run.pth --with-optimizer
    takes the run back to PyTorch. SIGINT and SIGTERM save and end with status 130 or 143; a run
    that was killed goes on from its last checkpoint, bit for bit.

    Args:
      reading: How to read the checkpoint. Without one, --architecture and --num-classes say what to
        train.
      training: What to do with the training run in it. train carries it anyway, unless
        --weights-only is given.
      settings: What differs from the preset.
      scale: Devices and processes.
      preset: The run.
      resume: Checkpoint to go on from, or auto.
      init: Checkpoint whose weights the run begins with; where it has another number of classes, or
        no head, the head starts afresh.
      eval_only: Checkpoint to classify the test images with, instead of training: accuracy and
        confusion matrix; with --out also as files.
      out: Folder for the results; runs/PRESET by default. It must not exist yet, unless the run in
        it goes on.
      schedule: Another learning rate than that of the checkpoint: constant, or linear warm-up and
        cosine over the whole run.
      save_every: Steps between two checkpoints; by default one per epoch.
      keep: Checkpoints to keep, the newest; the best one stays beside them.
      print_config: Print the resolved configuration as JSON, and do nothing else.
      strict: Refuse an image folder with damaged images, instead of leaving them out.
      allow_nonfinite: Go on from NaN, infinities and negative variances.
    """
    try:
        from flax_resblock.training import PRESETS, cluster
        from flax_resblock.training.run_folder import SUMMARY
    except ImportError as error:
        raise MissingDependencyError(
            f"training needs {error.name}, which is not installed: pip install "
            f"'flax-resblock[train]'."
        ) from error
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r} is unknown; known: {', '.join(PRESETS)}.")
    if keep < 1 or (save_every is not None and save_every < 1):
        raise InputError(f"--keep {keep} and --save-every {save_every} must be at least 1.")
    if sum(given is not None for given in (resume, init, eval_only)) > 1:
        raise InputError(
            "--resume, --init and --eval-only each say where the weights come from. Give one "
            "of them."
        )
    several = cluster.connect(
        cluster.Cluster(scale.coordinator, scale.num_processes, scale.process_id)
    )
    try:
        with only_first_speaks(several) as first:
            config, optimizer, given = PRESETS[preset], training.optimizer, settings.given
            if eval_only is not None:
                return classify(
                    eval_only, reading, config, given, scale.devices, out if first else None, strict
                )
            if print_config and resume is None and init is None:
                return _printed(fresh_config(config, reading, optimizer, given))
            out = out or Path("runs") / preset
            resume = _resumed(resume, out)
            if (
                resume == out
                and (out / SUMMARY).is_file()
                and not {"epochs", "steps"} & given.keys()
            ):
                output.print(
                    f"the run in {out} is complete; --epochs takes it further",
                    markup=False,
                    soft_wrap=True,
                )
                return 0
            if resume is not None:
                try:
                    begin = start(
                        reading, training, given, config, resume, schedule, allow_nonfinite, strict
                    )
                except CheckpointError as error:
                    raise CheckpointError(
                        f"{error}{_damage(out) if resume == out else ''}"
                    ) from error
            elif init is not None:
                begin = initialised(
                    init, reading, optimizer, given, config, allow_nonfinite, strict
                )
            else:
                begin = afresh(config, reading, optimizer, given, strict)
            if print_config:
                return _printed(begin.config)
            if resume == out and not (out / SUMMARY).is_file() and _complete(begin):
                return _summed_up(begin, out, first)
            return _run(begin, out, save_every, keep, scale.devices, first)
    except Exception as error:
        if several:
            _end_all(error)
        raise
    finally:
        cluster.leave()


def _complete(begin: Start) -> bool:
    """Whether the last step is done."""
    from flax_resblock.training.data import steps_per_epoch
    from flax_resblock.training.pace import Pace

    steps = steps_per_epoch(begin.splits.train, begin.config.batch_size)
    return begin.run is not None and Pace.of(begin.run, steps).start == begin.config.end(steps)


def _summed_up(begin: Start, out: Path, first: bool) -> int:
    """Ends a run that was killed between its last checkpoint and its summary."""
    from flax_resblock.training.run_folder import RunFolder

    if first:
        with RunFolder(out, begin.config) as folder:
            folder.finish(0.0)
    output.print(
        f"the run in {out} was complete but for its summary, which is written now",
        markup=False,
        soft_wrap=True,
    )
    return 0


def _end_all(error: Exception) -> None:
    """Ends a process of several that failed, and so the others: jax's own way out would wait for
    them, while they wait for this one.
    """
    from flax_resblock.training import cluster

    if (
        type(error).__name__ == "JaxRuntimeError"
    ):  # a collective failed, as another process is gone; whoever watches it says which, if it can
        time.sleep(2)
        cluster.lost("a process")
    if isinstance(error, InputError):
        print(f"flax-resblock: {error}", file=sys.stderr, flush=True)
        time.sleep(1)  # what is wrong in all of them is said by all of them
        os._exit(2)


def _run(
    begin: Start, out: Path, save_every: int | None, keep: int, devices: int | None, first: bool
) -> int:
    """Trains; process 0 of several writes everything down."""
    from flax_resblock.training import Stopped, TrainingError, data_mesh, fit
    from flax_resblock.training.data import steps_per_epoch
    from flax_resblock.training.run_folder import RunFolder

    started = time.perf_counter()
    config, splits = begin.config, begin.splits
    every = save_every or steps_per_epoch(splits.train, config.batch_size)
    with RunFolder(out, config, every=every, keep=keep) as folder, Stop() as stop:
        writing: dict[str, Any] = (
            {"on_step": folder.record, "on_judged": folder.judged, "saver": folder} if first else {}
        )
        try:
            history = fit(
                begin.model,
                splits.train,
                config,
                test=splits.test,
                run=begin.run,
                stop=stop.asked,
                mesh=data_mesh(devices),
                progress=first,
                **writing,
            )
        except Stopped as stopped:
            folder.wait()
            if first:
                print(
                    f"flax-resblock: stopped after step {stopped.step}; {folder.saved} is "
                    f"written. Go on with --resume auto --out {out}.",
                    file=sys.stderr,
                )
            return 128 + (stop.signal or signal.SIGTERM)
        except TrainingError as error:
            folder.wait()
            where = ""
            if first and error.indices is not None and out.is_dir():
                diverged = out / "diverged.json"
                diverged.write_text(
                    json.dumps({"step": error.step, "images": error.indices.tolist()}) + "\n",
                    encoding="utf-8",
                )
                where = f" All images of that step: {diverged}."
            raise TrainingError(
                f"{error}{where} The last good checkpoint: {folder.saved or 'none yet'}."
            ) from error
        if first:
            folder.finish(time.perf_counter() - started)
    done, judged = len(history.steps), history.judged[-1]  # every run ends with an evaluation
    averaged = (
        ""
        if judged.ema_accuracy is None
        else f", of the averaged weights {judged.ema_accuracy:.2%}"
    )
    output.print(
        f"{done} step{'s' if done != 1 else ''}, last loss {history.steps[-1].loss:.4f}, test "
        f"accuracy {judged.accuracy:.2%}{averaged}"
    )
    output.print(
        f"wrote {out}; back to PyTorch: flax-resblock convert {out} run.pth --with-optimizer",
        markup=False,
        soft_wrap=True,
    )
    return 0


def _printed(config: TrainConfig) -> int:
    print(json.dumps(asdict(config), indent=1))
    return 0


@contextmanager
def only_first_speaks(several: bool) -> Iterator[bool]:
    """Whether this is the process that prints and writes; the others are silent but for errors."""
    import jax

    first = not several or jax.process_index() == 0
    before = output.quiet, status.quiet
    output.quiet, status.quiet = before if first else (True, True)
    try:
        yield first
    finally:
        output.quiet, status.quiet = before


class Stop:
    """Remembers SIGINT and SIGTERM while a run goes on, so that it can end between two steps; a
    second one interrupts at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._caught)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
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
            raise InputError(
                f"{out} is no folder of a run, as it has no {RUN_FOLDER}/ in it. Choose "
                f"another with --out."
            )
        return out if any((out / RUN_FOLDER).glob("step-*")) else None
    if exists and not (resume is not None and resume.exists() and out.samefile(resume)):
        raise InputError(
            f"{out} exists. A run is never overwritten: go on with it (--resume auto), choose "
            f"another folder with --out, or remove it."
        )
    return resume


def _damage(out: Path) -> str:
    """Where the newest checkpoint of a run cannot be read, what to do about it; empty where it
    can.
    """
    found = sorted((out / RUN_FOLDER).glob("step-*"))
    try:
        checkpoint.read(out)
    except CheckpointError:
        return (
            f" Remove {found[-1]}, and --resume auto goes on from {found[-2].name}."
            if len(found) > 1
            else " It is the only one of this run; begin again."
        )
    return ""
