"""The folder of a run: its configuration, every step's loss, its checkpoints, a summary.

    config.json             the resolved configuration metrics.jsonl           one line per step
    evaluations.jsonl       one line per evaluation tensorboard/            the same as event files
    checkpoints/step-...    Orbax folders: weights, statistics, averages, optimizer, schedule,
    counters, settings, and a SHA-256 of every tensor best                    a link to the
    checkpoint with the highest test accuracy summary.json            at the end of the run
    curves.png              at the end of the run

A run that is killed at any moment leaves whole checkpoints only; what was being written vanishes
with the next save."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from flax_resblock import checkpoint
from flax_resblock.checkpoint import RUN_FOLDER
from flax_resblock.errors import InputError
from flax_resblock.io import save
from flax_resblock.nn.resnet import ResNet
from flax_resblock.runs.run import Run
from flax_resblock.training.config import TrainConfig
from flax_resblock.training.curves import draw_curves
from flax_resblock.training.records import JUDGED, STEPS, Records, best, recorded
from flax_resblock.training.reports import Judged, Step

SUMMARY = "summary.json"
"""Says that the run is complete."""
BEST = "best"
_CURVES = "curves.png"


class RunFolder:
    """Writes a run down. A context manager; nothing is created before the first step.

    Args:
      folder: Where.
      config: The run's configuration.
      every: Steps between two checkpoints; 0: one at the end.
      keep: How many checkpoints to keep, the newest; the best one stays beside them.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, every: int = 0, keep: int = 3) -> None:
        self.folder, self.config, self.every, self.keep = folder, config, every, keep
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        self._records: Records | None = None
        self._best = best(folder)
        self.saved: Path | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(wait=True)
        if self._records is not None:
            self._records.close()

    def record(self, step: Step) -> None:
        """A step was taken.

        Raises:
          InputError: The folder, or a checkpoint that was being written, cannot be written.
        """
        if self._records is None:
            self._records = self._begin(step.step)
        self._records.step(step)
        if self._pending is not None and self._pending.done():
            self.wait()

    def judged(self, judged: Judged) -> None:
        """The test images were classified; comes before the checkpoint of the same step."""
        if self._records is not None:
            self._records.judged(judged)

    def _begin(self, first: int) -> Records:
        """Creates the folder, or goes on in one whose last steps are taken again."""
        try:
            (self.folder / RUN_FOLDER).mkdir(parents=True, exist_ok=True)
            with checkpoint.replacing(self.folder / "config.json", force=True) as temporary:
                temporary.write_text(
                    json.dumps(asdict(self.config), indent=1) + "\n", encoding="utf-8"
                )
            records = Records(self.folder, first)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written ({error.strerror}). Choose another folder "
                f"with --out, or make room."
            ) from error
        self._best = best(self.folder)  # an evaluation that is made again no longer counts
        return records

    def due(self, step: int, judged: Judged | None) -> bool:
        """Whether a checkpoint is to be written when ``step`` steps are done: every so often, and
        when it is the best so far.
        """
        if judged is not None and best(self.folder) != self._best:
            return True
        return bool(self.every) and step % self.every == 0

    def save(self, model: ResNet, run: Run) -> None:
        """Writes a checkpoint in the background; waits for the one before. The values must not
        change any more.

        Raises:
          InputError: The one before could not be written.
        """
        self.wait()
        self._best = best(self.folder)
        self._pending = self._writer.submit(
            self._save, model, run, self._best.step if self._best else None
        )

    def wait(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
          InputError: It could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _path(self, step: int) -> Path:
        return self.folder / RUN_FOLDER / f"step-{step:08d}"

    def _save(self, model: ResNet, run: Run, best_step: int | None) -> None:
        path = self._path(run.steps or 0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(model, path, run=run, force=True)
            self.saved = path
            if best_step == run.steps:
                self._point_at(path)
            kept = {path, *([self._path(best_step)] if best_step is not None else [])}
            for old in sorted(path.parent.glob("step-*"))[: -self.keep]:
                if old not in kept:
                    checkpoint.remove(old)
        except Exception as error:  # InputError, or whatever Orbax and the disk raise
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            whole = sorted(path.parent.glob("step-*"))
            raise InputError(
                f"the checkpoint {path} could not be written ({reason[:300]}). The last whole "
                f"one is {whole[-1] if whole else 'none yet'}. Make room, "
                "and go on with --resume auto."
            ) from error

    def _point_at(self, path: Path) -> None:
        """Makes ``best`` a link to a checkpoint, in one step."""
        scratch = self.folder / f".{BEST}.{os.getpid()}"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(path.relative_to(self.folder))
        scratch.replace(self.folder / BEST)

    def finish(self, seconds: float) -> None:
        """The run is over: draws its curves and sums it up, from what was written down.

        Args:
          seconds: That it took.
        """
        self.wait()
        steps, judged = (
            recorded(self.folder / STEPS),
            [Judged(**line) for line in recorded(self.folder / JUDGED)],
        )
        with checkpoint.replacing(self.folder / _CURVES, force=True) as temporary:
            draw_curves(steps, judged, temporary)
        found, last = best(self.folder), judged[-1] if judged else None
        summary = {
            "steps": len(steps),
            "last_step": steps[-1]["step"],
            "loss": steps[-1]["loss"],
            "mean_loss_of_last_10": float(np.mean([step["loss"] for step in steps[-10:]])),
            "test_accuracy": last and last.accuracy,
            "test_loss": last and last.loss,
            "ema_accuracy": last and last.ema_accuracy,
            "test_accuracy_by_epoch": [one.accuracy for one in judged],
            "best_step": found and found.step,
            "best_accuracy": found and found.accuracy,
            "seconds": round(seconds, 1),
            "config": asdict(self.config),
        }
        with checkpoint.replacing(self.folder / SUMMARY, force=True) as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
