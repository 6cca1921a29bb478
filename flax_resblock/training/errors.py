"""What can end a training run."""

from __future__ import annotations

import numpy as np

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
    """A run that cannot go on. The message names the step and what to change.

    Attributes:
      step: The step, from 0, where it is known.
      indices: Places in the dataset of the images of that step, ``(N,)`` int64, where they are
        known.
    """

    def __init__(
        self, message: str, *, step: int | None = None, indices: np.ndarray | None = None
    ) -> None:
        super().__init__(message)
        self.step = step
        self.indices = indices
