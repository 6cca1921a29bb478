"""Errors of training runs and configurations."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from flax_resblock.errors import InputError


class Stopped(Exception):  # noqa: N818 - no error
    """A run was stopped on request before its end, after ``step`` steps."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after {step} steps")
        self.step = step


class TrainingError(InputError):
    """A run cannot continue. The message names the step and what to change.

    Attributes:
      step: The step, from 0, if known.
      indices: Indices in the dataset of the images of that step, ``(N,)`` int64, if known.
    """

    def __init__(
        self, message: str, *, step: int | None = None, indices: np.ndarray | None = None
    ) -> None:
        super().__init__(message)
        self.step = step
        self.indices = indices


def check_fields(config: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raises InputError for the first rule (name of a field, whether its value is valid, what it
    must be) that does not hold. A rule may rely on those before it, as they are drawn one by one.
    """
    for name, valid, meaning in rules:
        if not valid:
            raise InputError(f"{name}={getattr(config, name)!r} must be {meaning}.")
