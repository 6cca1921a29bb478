"""What a run says of itself, step by step, and who may keep it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from flax_resblock.nn.resnet import ResNet
from flax_resblock.runs.run import Run


class Step(NamedTuple):
    """One step: its number from 0 over the whole run, its epoch, mean loss and accuracy of its
    batch before the update, and the learning rate of the first param group."""

    step: int
    epoch: int
    loss: float
    accuracy: float
    learning_rate: float


class Judged(NamedTuple):
    """What the test images said after ``step`` steps: accuracy in [0, 1] and mean cross-entropy,
    and the same of the averaged weights where they are kept.
    """

    step: int
    epoch: int
    accuracy: float
    loss: float
    ema_accuracy: float | None = None
    ema_loss: float | None = None

    @property
    def best(self) -> tuple[float, float]:
        """Accuracy and loss by which checkpoints are compared: of the averaged weights where they
        are kept.
        """
        return (
            (self.accuracy, self.loss)
            if self.ema_accuracy is None or self.ema_loss is None
            else (self.ema_accuracy, self.ema_loss)
        )


class Saver(Protocol):
    """Keeps a run, as :class:`flax_resblock.training.run_folder.RunFolder` does."""

    def due(self, step: int, judged: Judged | None, /) -> bool:
        """Whether to keep the state after ``step`` steps, of which ``judged`` was found out, where
        it was.
        """
        ...

    def save(self, model: ResNet, run: Run, /) -> None:
        """Keeps it; the values are the saver's own."""
        ...


@dataclass
class History:
    """What a run reported.

    Attributes:
      steps: Every step, in order.
      judged: What the test images said after each epoch and at the end; empty where none were
        given.
      run: Optimizer, schedule and counters after the last step; :func:`flax_resblock.save` writes
        them beside the model.
    """

    steps: list[Step] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    run: Run | None = None

    @property
    def test_accuracy(self) -> list[float]:
        """Accuracy on the test images after each epoch, in [0, 1]."""
        return [judged.accuracy for judged in self.judged]
