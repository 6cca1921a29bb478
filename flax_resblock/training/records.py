"""What a run writes as it goes: JSON lines for steps and evaluations, and TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from flax_resblock import checkpoint
from flax_resblock.errors import InputError, optional
from flax_resblock.training.reports import EvaluationReport, StepReport

STEPS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
_EVENTS = "tensorboard"


class Records:
    """Writes the steps and evaluations of a run into its folder.

    Entries of steps that will be taken again are removed.

    Args:
      first: Number of the first step that will come.
    Raises:
      InputError: The folder cannot be written to.
      MissingDependencyError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, first: int) -> None:
        words = "the event files of a run need tensorboardX: pip install 'flax-resblock[train]'."
        events = optional("tensorboardX", words)
        self._steps = _reopened(folder / STEPS, lambda line: line["step"] < first)
        self._evaluations = _reopened(folder / EVALUATIONS, lambda line: line["step"] <= first)
        self._events = events.SummaryWriter(str(folder / _EVENTS), purge_step=first or None)

    def step(self, step: StepReport) -> None:
        """Records a step."""
        self._write(self._steps, step, "train", ("loss", "accuracy", "learning_rate"))

    def evaluation(self, evaluation: EvaluationReport) -> None:
        """Records an evaluation."""
        names = ("accuracy", "loss", "ema_accuracy", "ema_loss")
        self._write(self._evaluations, evaluation, "test", names)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._steps, self._evaluations, self._events):
            with suppress(OSError):  # a full disk, which the failed write has already reported
                file.close()

    def _write(
        self, file: TextIO, entry: StepReport | EvaluationReport, tag: str, names: tuple[str, ...]
    ) -> None:
        try:
            file.write(json.dumps(entry._asdict()) + "\n")
        except OSError as error:
            raise InputError(
                f"{file.name} cannot be written ({error.strerror}). Make room, and go on from "
                f"the last checkpoint (`load_run`); the checkpoints are whole."
            ) from error
        for name in names:
            if (value := getattr(entry, name)) is not None:
                self._events.add_scalar(f"{tag}/{name}", value, entry.step)


def recorded(file: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines. A last line that a kill cut off is left out."""
    if not file.is_file():
        return []
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


def evaluations(folder: Path) -> list[EvaluationReport]:
    """The evaluations recorded in the folder of a run."""
    return [EvaluationReport(**line) for line in recorded(folder / EVALUATIONS)]


class Best(NamedTuple):
    """The evaluation with the highest accuracy, and among equals the lowest loss."""

    step: int
    accuracy: float
    loss: float


def best(folder: Path) -> Best | None:
    """The best evaluation of a run so far; None before the first."""
    found = [Best(one.step, *one.best) for one in evaluations(folder)]
    return max(found, key=lambda one: (one.accuracy, -one.loss), default=None)


def _reopened(file: Path, kept: Callable[[dict[str, Any]], bool]) -> TextIO:
    lines = [json.dumps(line) + "\n" for line in recorded(file) if kept(line)]
    with checkpoint.replacing(file, force=True) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return file.open("a", encoding="utf-8", buffering=1)
