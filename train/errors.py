"""What can end a training run."""

from __future__ import annotations

from flax_resblock.errors import InputError


class TrainingError(InputError):
    """A run that cannot go on. The message names the step and what to change."""
