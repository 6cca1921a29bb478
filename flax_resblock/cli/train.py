"""``flax-resblock train``."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from flax_resblock import checkpoint
from flax_resblock.checkpoint import RUN_FOLDER
from flax_resblock.cli.common import AllowNonfinite, ReadingFlags, RunFlags, output, say, status
from flax_resblock.cli.evaluate import classify
from flax_resblock.cli.interrupts import Stop
from flax_resblock.cli.processes import end_all, only_first_speaks
from flax_resblock.cli.settings import SettingFlags, given
from flax_resblock.cli.train_data import print_data
from flax_resblock.cli.train_own import OwnCode, begun, own_code
from flax_resblock.cli.train_start import Start, Wanted, afresh, fresh_config, initialised, resumed
from flax_resblock.errors import CheckpointError, InputError
from flax_resblock.training import cluster
from flax_resblock.training.data import steps_per_epoch
from flax_resblock.training.presets import DEFAULT_PRESET, PRESETS

Preset = Annotated[
    str, tyro.conf.arg(metavar="NAME", help=f"Configuration by name: {', '.join(PRESETS)}.")
]


def train(
    settings: SettingFlags,
    training: RunFlags,
    reading: ReadingFlags,
    processes: cluster.Cluster,
    model: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:NAME")] = None,
    preset: Preset = DEFAULT_PRESET,
    resume: Path | None = None,
    init: Path | None = None,
    eval_only: Path | None = None,
    out: Path | None = None,
    schedule: Literal["constant", "warmup-cosine"] | None = None,
    devices: int | None = None,
    save_every: int | None = None,
    keep: int = 3,
    print_config: bool = False,
    strict: bool = False,
    allow_nonfinite: AllowNonfinite = False,
) -> int:
    """Trains a network in JAX, from random weights, from the weights of a checkpoint, or where a
    PyTorch or JAX run stopped.

    For example:

      flax-resblock train --out runs/digits

      flax-resblock train --out runs/digits --resume auto

      flax-resblock train --resume run.pth --data pictures --out runs/continued

      flax-resblock train --init resnet18.pth --num-classes 10 --freeze stem,stage1 --data pictures

      flax-resblock train --model out/net.py:Net --init out --data pictures

      flax-resblock train --model out/net.py:Net --resume run.pth --data pictures

    --resume takes a training checkpoint of a plain PyTorch loop, of torchvision's references, timm
    or Lightning, a Hugging Face Trainer folder, or what this command and `convert --with-optimizer`
    write; its optimizer, schedule and counters continue. OUT receives checkpoints, the loss of
    every step as JSON lines and TensorBoard events, curves and a summary. `flax-resblock convert
    OUT run.pth --with-optimizer` takes the run back to PyTorch. SIGINT and SIGTERM save the run and
    exit with status 130 or 143; a killed run continues from its last checkpoint, bit for bit.

    Args:
      reading: How to read the checkpoint, where its weights do not show it. Without a checkpoint,
        --architecture and --num-classes choose the network.
      training: What to do with the training run in the checkpoint. It continues unless
        --weights-only is given.
      settings: What differs from the preset, or from the settings of the run that continues. The
        defaults shown are those of the preset digits-resnet8.
      processes: How the processes of a run find each other. On TPU pods, Slurm, Open MPI and
        Kubernetes they do so by themselves; start the same command on every host.
      model: A network of your own in Flax: the class in a file that `flax-resblock port` wrote, or
        any nnx module that is created by NAME(rngs=...), from images (N, H, W, C) to logits. This
        runs its code. A ported network takes --init and --resume from what `port` wrote, from
        checkpoints of its PyTorch module, and from earlier runs.
      preset: The configuration.
      resume: Checkpoint to continue from, or auto to continue the run in OUT if there is one.
      init: Checkpoint whose weights the run begins with. If it has no head or another number of
        classes, the head is new.
      eval_only: Checkpoint to evaluate on the test images instead of training; with --out, accuracy
        and confusion matrix are also written to files.
      out: Folder for the results, by default runs/PRESET. It must not exist, unless its run
        continues.
      schedule: Replaces the learning-rate schedule of the checkpoint: constant, or linear warm-up
        and cosine over the whole run.
      devices: Number of devices of this host that share each batch, by default all.
      save_every: Steps between two checkpoints, by default one epoch.
      keep: How many of the newest checkpoints to keep; the best one stays beside them.
      print_config: Print the resolved configuration as JSON and exit.
      strict: Refuse an image folder with damaged images instead of leaving them out.
    """
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r} is unknown; known: {', '.join(PRESETS)}.")
    if keep < 1 or (save_every is not None and save_every < 1):
        raise InputError(f"--keep {keep} and --save-every {save_every} must be at least 1.")
    if sum(source is not None for source in (resume, init, eval_only)) > 1:
        raise InputError(
            "--resume, --init and --eval-only each say where the weights come from. Give one "
            "of them."
        )
    wanted = Wanted(
        PRESETS[preset], reading, training, given(settings), strict, allow_nonfinite, devices
    )
    several = cluster.connect(processes)
    try:
        with only_first_speaks(several) as first:
            code = None if model is None else own_code(model, reading)
            if eval_only is not None:
                return classify(eval_only, wanted, devices, out if first else None, code)
            if print_config and resume is None and init is None:
                config = fresh_config(wanted)
                return _printed(config if code is None else replace(config, model=None))
            out = out or Path("runs") / preset
            resume = _checkpoint_to_resume(resume, out)
            in_place = resume == out
            if in_place and _is_complete(out) and not {"epochs", "steps"} & wanted.settings.keys():
                say(f"the run in {out} is complete; --epochs takes it further")
                return 0
            begin = _begun(wanted, resume, init, schedule, out, code)
            if print_config:
                return _printed(begin.config)
            if in_place and not _is_complete(out) and _at_its_end(begin):
                return _summed_up(begin, out, first)
            return _run(begin, out, save_every, keep, devices, first)
    except Exception as error:
        if several:
            end_all(error)
        raise
    finally:
        cluster.leave()


def _begun(
    wanted: Wanted,
    resume: Path | None,
    init: Path | None,
    schedule: str | None,
    out: Path,
    code: OwnCode | None,
) -> Start:
    try:
        if code is not None:
            return begun(code, wanted, resume, init, schedule)
        if init is not None:
            return initialised(wanted, init)
        if resume is None:
            return afresh(wanted)
        return resumed(wanted, resume, schedule)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_damage(out) if resume == out else ''}") from error


def _is_complete(out: Path) -> bool:
    from flax_resblock.training.run_folder import SUMMARY

    return (out / SUMMARY).is_file()


def _at_its_end(begin: Start) -> bool:
    from flax_resblock.training.pace import Pace

    steps = steps_per_epoch(begin.splits.train, begin.config.batch_size)
    return begin.run is not None and Pace.of(begin.run, steps).start == begin.config.end(steps)


def _summed_up(begin: Start, out: Path, first: bool) -> int:
    """Completes a run that was killed between its last checkpoint and its summary."""
    from flax_resblock.training.run_folder import RunFolder

    if first:
        with RunFolder(out, begin.config) as folder:
            folder.finish(0.0)
    say(f"the run in {out} was complete but for its summary, which is written now")
    return 0


def _run(
    begin: Start, out: Path, save_every: int | None, keep: int, devices: int | None, first: bool
) -> int:
    """Trains; only the first process writes files."""
    from flax_resblock.runs.tensors import has_torch_names
    from flax_resblock.training import Stopped, TrainingError, data_mesh, fit
    from flax_resblock.training.run_folder import RunFolder

    print_data(begin)
    started = time.perf_counter()
    config, splits = begin.config, begin.splits
    every = save_every or steps_per_epoch(splits.train, config.batch_size)
    stop = Stop(lambda: status.print("stopping after this step; the run is saved first"))
    with RunFolder(out, config, every=every, keep=keep, code=begin.code) as folder, stop:
        writing: dict[str, Any] = {
            "on_step": folder.record,
            "on_evaluation": folder.evaluated,
            "saver": folder,
        }
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
                **(writing if first else {}),
            )
        except Stopped as stopped:
            folder.wait()
            if first:
                print(
                    f"flax-resblock: stopped after step {stopped.step}; {folder.saved} is "
                    f"written. Go on with --resume auto --out {out}.",
                    file=sys.stderr,
                )
            return stop.status
        except TrainingError as error:
            folder.wait()
            where = ""
            if first and error.indices is not None and out.is_dir():
                diverged = out / "diverged.json"
                content = {"step": error.step, "images": error.indices.tolist()}
                diverged.write_text(json.dumps(content) + "\n", encoding="utf-8")
                where = f" All images of that step: {diverged}."
            raise TrainingError(
                f"{error}{where} The last good checkpoint: {folder.saved or 'none yet'}."
            ) from error
        if first:
            folder.finish(time.perf_counter() - started)
    done, last = len(history.steps), history.evaluations[-1]  # every run ends with an evaluation
    averaged = last.ema_accuracy
    whole = history.steps[-1].step + 1
    in_all = f" ({whole} in all)" if whole != done else ""
    output.print(
        f"{done} step{'s' if done != 1 else ''}{in_all}, last loss {history.steps[-1].loss:.4f}, "
        f"test accuracy {last.accuracy:.2%}"
        + ("" if averaged is None else f", of the averaged weights {averaged:.2%}")
    )
    back = f"; back to PyTorch: flax-resblock convert {out} back.pth --with-optimizer"
    say(f"wrote {out}{back if has_torch_names(begin.model) else ''}")
    return 0


def _printed(config: Any) -> int:
    print(json.dumps(asdict(config), indent=1))
    return 0


def _checkpoint_to_resume(resume: Path | None, out: Path) -> Path | None:
    """The checkpoint to continue from; refuses a folder that would be overwritten."""
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
    """What to do if the newest checkpoint of a run cannot be read; empty if it can."""
    found = sorted((out / RUN_FOLDER).glob("step-*"))
    try:
        checkpoint.read(out)
    except CheckpointError:
        if len(found) > 1:
            return f" Remove {found[-1]}, and --resume auto goes on from {found[-2].name}."
        return " It is the only one of this run; begin again."
    return ""
