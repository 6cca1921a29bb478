"""The folder of a run::

    config.json          the resolved configuration
    metrics.jsonl        one line per step
    evaluations.jsonl    one line per evaluation
    tensorboard/         the same as event files
    checkpoints/step-*   Orbax folders: weights, statistics, averages, optimizer, schedule,
                         counters, settings, and a SHA-256 of every tensor
    best                 a link to the checkpoint with the highest test accuracy
    net.py               a copy of the code of a network of your own
    summary.json         written at the end of the run
    curves.png           written at the end of the run

A run that is killed at any moment leaves only complete checkpoints; what was being written
vanishes with the next save.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from flax_resblock import checkpoint
from flax_resblock.checkpoint import RUN_FOLDER
from flax_resblock.errors import InputError
from flax_resblock.io import save
from flax_resblock.runs.run import Run
from flax_resblock.training.config import TrainConfig
from flax_resblock.training.curves import draw_curves
from flax_resblock.training.records import STEPS, Records, best, evaluations, recorded
from flax_resblock.training.reports import EvaluationReport, StepReport

SUMMARY = "summary.json"
"""Marks a run as complete."""
BEST = "best"
_CURVES = "curves.png"


class RunFolder:
    """Saves a run. A context manager; nothing is created before the first step.

    Args:
      every: Steps between two checkpoints; 0 saves only at the end.
      keep: How many of the newest checkpoints to keep; the best one stays beside them.
      code: The Python file of a network of your own, which is copied beside the checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        *,
        every: int = 0,
        keep: int = 3,
        code: Path | None = None,
    ) -> None:
        self.folder, self.config, self.every, self.keep = folder, config, every, keep
        self.code = code
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

    def record(self, step: StepReport) -> None:
        """Records a step; raises InputError if it, or the checkpoint before, cannot be written."""
        if self._records is None:
            self._records = self._begin(step.step)
        self._records.step(step)
        if self._pending is not None and self._pending.done():
            self.wait()

    def evaluated(self, evaluation: EvaluationReport) -> None:
        """Records an evaluation; call it before the checkpoint of the same step is saved."""
        if self._records is not None:
            self._records.evaluation(evaluation)

    def _begin(self, first: int) -> Records:
        """Creates the folder, or reopens that of a run whose last steps are taken again."""
        try:
            (self.folder / RUN_FOLDER).mkdir(parents=True, exist_ok=True)
            _write_json(self.folder / "config.json", asdict(self.config))
            if self.code is not None and not (self.folder / self.code.name).exists():
                with checkpoint.replacing(self.folder / self.code.name) as temporary:
                    temporary.write_bytes(self.code.read_bytes())
            records = Records(self.folder, first)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written ({error.strerror}). Choose another folder "
                f"for the run, or make room."
            ) from error
        self._best = best(self.folder)  # an evaluation that is made again no longer counts
        return records

    def due(self, step: int, evaluation: EvaluationReport | None) -> bool:
        """Whether to write a checkpoint after ``step`` steps: every so often, or for a new best."""
        if evaluation is not None and best(self.folder) != self._best:
            return True
        return bool(self.every) and step % self.every == 0

    def save(self, model: nnx.Module, run: Run) -> None:
        """Writes a checkpoint in the background; raises InputError if the one before could not be
        written. The values must not change any more.
        """
        self.wait()
        self._best = best(self.folder)
        step = self._best.step if self._best else None
        self._pending = self._writer.submit(self._save, model, run, step)

    def wait(self) -> None:
        """Waits until the last checkpoint is written; raises InputError if it could not be."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _path(self, step: int) -> Path:
        return self.folder / RUN_FOLDER / f"step-{step:08d}"

    def _save(self, model: nnx.Module, run: Run, best_step: int | None) -> None:
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
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            whole = sorted(path.parent.glob("step-*"))
            raise InputError(
                f"the checkpoint {path} could not be written ({reason[:300]}). The last whole one "
                f"is {whole[-1] if whole else 'none yet'}. Make room, and go on from it "
                f"(`load_run`)."
            ) from error

    def _point_at(self, path: Path) -> None:
        """Makes ``best`` a link to a checkpoint, atomically."""
        scratch = self.folder / f".{BEST}.{os.getpid()}"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(path.relative_to(self.folder))
        scratch.replace(self.folder / BEST)

    def finish(self, seconds: float) -> None:
        """Draws the curves of the finished run, which took ``seconds``, and writes its summary."""
        self.wait()
        steps, tests = recorded(self.folder / STEPS), evaluations(self.folder)
        with checkpoint.replacing(self.folder / _CURVES, force=True) as temporary:
            draw_curves(steps, tests, temporary)
        found, last = best(self.folder), tests[-1] if tests else None
        summary = {
            "steps": len(steps),
            "last_step": steps[-1]["step"],
            "loss": steps[-1]["loss"],
            "mean_loss_of_last_10": float(np.mean([step["loss"] for step in steps[-10:]])),
            "test_accuracy": last and last.accuracy,
            "test_loss": last and last.loss,
            "ema_accuracy": last and last.ema_accuracy,
            "test_accuracy_by_epoch": [one.accuracy for one in tests],
            "best_step": found and found.step,
            "best_accuracy": found and found.accuracy,
            "seconds": round(seconds, 1),
            "config": asdict(self.config),
        }
        _write_json(self.folder / SUMMARY, summary)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with checkpoint.replacing(path, force=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
