"""Errors that a person can act on. The command line prints them as one paragraph and exits with status 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something given to this library does not fit: a file, a name, a flag. The message says what, where, both sides, and what to do next."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class MissingDependencyError(InputError, ImportError):
    """An optional package is needed for what was asked; the message names the extra that installs it."""


def some(names: list[str], limit: int = 3) -> str:
    """``a, b, c and 61 more``."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
