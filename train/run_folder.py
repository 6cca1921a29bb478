"""The folder of a run: its configuration, every step's loss, its checkpoints, a summary.

    config.json             the resolved configuration
    metrics.jsonl           one line per step
    checkpoints/step-...    Orbax folders: weights, statistics, optimizer, schedule, counters, and a SHA-256 of every tensor
    summary.json            at the end of the run

A run that is killed at any moment leaves whole checkpoints only; what was being written vanishes with the next save.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from flax_resblock import checkpoint
from flax_resblock.checkpoint import RUN_FOLDER
from flax_resblock.convert.run import Run
from flax_resblock.resnet import ResNet
from flax_resblock.transfer import save
from train.config import TrainConfig
from train.loop import Step

SUMMARY = "summary.json"
"""Says that the run is complete."""


class RunFolder:
    """Writes a run down. A context manager; nothing is created before the first step.

    Args:
      folder: Where.
      config: The run's configuration.
      every: Steps between two checkpoints; 0: one at the end.
      keep: How many checkpoints to keep, the newest.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, every: int = 0, keep: int = 3) -> None:
        self.folder, self.config, self.every, self.keep = folder, config, every, keep
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        self._metrics: TextIO | None = None
        self.saved: Path | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(wait=True)
        if self._metrics is not None:
            self._metrics.close()

    def record(self, step: Step) -> None:
        """A step was taken."""
        if self._metrics is None:
            self._metrics = self._begin(step.step)
        self._metrics.write(json.dumps(step._asdict()) + "\n")

    def _begin(self, first: int) -> TextIO:
        """Creates the folder, or goes on in one whose last steps are taken again."""
        (self.folder / RUN_FOLDER).mkdir(parents=True, exist_ok=True)
        with checkpoint.replacing(self.folder / "config.json", force=True) as temporary:
            temporary.write_text(json.dumps(asdict(self.config), indent=1) + "\n", encoding="utf-8")
        metrics = self.folder / "metrics.jsonl"
        kept = [line for line in _lines(metrics) if json.loads(line)["step"] < first]
        with checkpoint.replacing(metrics, force=True) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        return metrics.open("a", encoding="utf-8", buffering=1)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written when ``step`` steps are done."""
        return bool(self.every) and step % self.every == 0

    def save(self, model: ResNet, run: Run) -> None:
        """Writes a checkpoint in the background; waits for the one before. The values must not change any more.

        Raises:
          InputError: The one before could not be written.
        """
        self.wait()
        self._pending = self._writer.submit(self._save, model, run)

    def wait(self) -> None:
        """Waits until the last checkpoint is written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _save(self, model: ResNet, run: Run) -> None:
        path = self.folder / RUN_FOLDER / f"step-{run.steps:08d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(model, path, run=run, force=True)
        self.saved = path
        for old in sorted((self.folder / RUN_FOLDER).glob("step-*"))[: -self.keep]:
            checkpoint.remove(old)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is over."""
        self.wait()
        with checkpoint.replacing(self.folder / SUMMARY, force=True) as temporary:
            temporary.write_text(json.dumps({**summary, "config": asdict(self.config)}, indent=1) + "\n", encoding="utf-8")


def _lines(file: Path) -> list[str]:
    """The whole lines of a file; the last one may have been cut off by a kill."""
    if not file.is_file():
        return []
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    return whole
