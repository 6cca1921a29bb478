"""What can end a training run."""

from __future__ import annotations

from flax_resblock.errors import InputError


class Stopped(Exception):  # noqa: N818 - no error
    """A run ended before its time because it was asked to.

    Attributes:
      step: Steps done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after {step} steps")
        self.step = step


class TrainingError(InputError):
    """A run that cannot go on. The message names the step and what to change."""
