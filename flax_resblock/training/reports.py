"""What a run reports, step by step, and the interface of what saves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from flax import nnx

    from flax_resblock.runs.run import Run


class StepReport(NamedTuple):
    """One training step.

    Attributes:
      step: Its number, from 0 over the whole run.
      epoch: Its epoch, from 0.
      loss, accuracy: Means over its batch before the update.
      learning_rate: Of the first param group.
    """

    step: int
    epoch: int
    loss: float
    accuracy: float
    learning_rate: float


class EvaluationReport(NamedTuple):
    """One evaluation on the test images.

    Attributes:
      step, epoch: How many were done.
      accuracy: In [0, 1].
      loss: Mean cross-entropy.
      ema_accuracy, ema_loss: The same of the averaged weights; None if no averages are kept.
    """

    step: int
    epoch: int
    accuracy: float
    loss: float
    ema_accuracy: float | None = None
    ema_loss: float | None = None

    @property
    def best(self) -> tuple[float, float]:
        """Accuracy and loss by which checkpoints are ranked, of the averaged weights if kept."""
        if self.ema_accuracy is None or self.ema_loss is None:
            return self.accuracy, self.loss
        return self.ema_accuracy, self.ema_loss


class Saver(Protocol):
    """Saves a run, as :class:`flax_resblock.training.run_folder.RunFolder` does."""

    def due(self, step: int, evaluation: EvaluationReport | None, /) -> bool:
        """Whether to save the state after ``step`` steps, which was perhaps just evaluated."""
        ...

    def save(self, model: nnx.Module, run: Run, /) -> None:
        """Saves it. The values belong to the saver."""
        ...


@dataclass
class History:
    """What a run reported.

    Attributes:
      steps: Every step, in order.
      evaluations: One after each epoch and one at the end; empty without test images.
      run: Optimizer, schedule and counters after the last step; :func:`flax_resblock.save` writes
        them beside the model.
    """

    steps: list[StepReport] = field(default_factory=list)
    evaluations: list[EvaluationReport] = field(default_factory=list)
    run: Run | None = None

    @property
    def test_accuracy(self) -> list[float]:
        """Accuracy on the test images after each epoch, in [0, 1]."""
        return [evaluation.accuracy for evaluation in self.evaluations]
