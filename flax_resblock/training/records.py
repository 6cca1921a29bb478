"""What a run writes down as it goes: one JSON line per step and per evaluation, and TensorBoard's
event files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from flax_resblock import checkpoint
from flax_resblock.errors import InputError, MissingDependencyError
from flax_resblock.training.reports import Judged, Step

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

STEPS, JUDGED = "metrics.jsonl", "evaluations.jsonl"
_EVENTS = "tensorboard"


class Records:
    """Writes steps and evaluations into the folder of a run; those of steps that are taken again
    are replaced.

    Args:
      folder: Exists.
      first: Number of the first step that will come.
    Raises:
      InputError: The folder cannot be written to.
      MissingDependencyError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, first: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError(
                "the event files of a run need tensorboardX: pip install 'flax-resblock[train]'."
            ) from error
        self.folder = folder
        self._steps = _reopened(folder / STEPS, lambda line: line["step"] < first)
        self._judged = _reopened(folder / JUDGED, lambda line: line["step"] <= first)
        self._events: SummaryWriter = SummaryWriter(str(folder / _EVENTS), purge_step=first or None)

    def step(self, step: Step) -> None:
        """A step was taken."""
        self._line(self._steps, step)
        for name in ("loss", "accuracy", "learning_rate"):
            self._events.add_scalar(f"train/{name}", getattr(step, name), step.step)

    def judged(self, judged: Judged) -> None:
        """The test images were classified."""
        self._line(self._judged, judged)
        for name in ("accuracy", "loss", "ema_accuracy", "ema_loss"):
            value = getattr(judged, name)
            if value is not None:
                self._events.add_scalar(f"test/{name}", value, judged.step)

    def close(self) -> None:
        """Nothing more will come."""
        for file in (self._steps, self._judged, self._events):
            try:
                file.close()
            except OSError:  # a full disk; the error of the write that found out has been raised
                continue

    def _line(self, file: TextIO, entry: Step | Judged) -> None:
        try:
            file.write(json.dumps(entry._asdict()) + "\n")
        except OSError as error:
            raise InputError(
                f"{file.name} cannot be written ({error.strerror}). Make room, and go on with "
                f"--resume auto; the checkpoints are whole."
            ) from error


def recorded(file: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines; the last one may have been cut off by a kill."""
    if not file.is_file():
        return []
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


class Best(NamedTuple):
    """The evaluation with the highest accuracy; of equals the one with the lowest loss."""

    step: int
    accuracy: float
    loss: float


def best(folder: Path) -> Best | None:
    """The best evaluation of a run so far; None before the first."""
    found = [
        Best(judged.step, *judged.best)
        for judged in (Judged(**line) for line in recorded(folder / JUDGED))
    ]
    return max(found, key=lambda one: (one.accuracy, -one.loss), default=None)


def _reopened(file: Path, kept: Any) -> TextIO:
    lines = [json.dumps(line) + "\n" for line in recorded(file) if kept(line)]
    with checkpoint.replacing(file, force=True) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return file.open("a", encoding="utf-8", buffering=1)
