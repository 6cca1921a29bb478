"""Errors that a person can act on. The command line prints them as one paragraph and exits with
status 2.
"""

from __future__ import annotations

import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
"""Unicode categories of what hides, reorders or breaks text: control characters, bidirectional
overrides, lone surrogates, line separators.
"""


class InputError(ValueError):
    """Something given to this library does not fit: a file, a name, a flag. The message says what,
    where, both sides, and what to do next.
    """


class CheckpointError(InputError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class OutputError(InputError):
    """An output that could not be written: a full or failing disk, a folder without permission.
    Nothing of it was left.
    """


class MissingDependencyError(InputError, ImportError):
    """An optional package is needed for what was asked; the message names the extra that installs
    it.
    """


def visible(text: str, keep: str = "") -> str:
    """Text from a file as it may be shown: characters that act on a terminal or reorder what is
    read appear as escapes, ``\\x1b`` or ``\\u202e``.

    Args:
      text: Whatever a file held.
      keep: Characters that stay as they are, such as ``"\\n"``.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c
        if c in keep or unicodedata.category(c) not in _HIDDEN
        else c.encode("unicode_escape").decode()
        for c in text
    )


def some(names: list[str], limit: int = 3) -> str:
    """``a, b, c and 61 more``; names as :func:`visible` shows them, long ones cut."""
    shown = ", ".join(
        visible(name if len(name) <= _LONG else f"{name[:_LONG]}...") for name in names[:limit]
    )
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


_LONG = 300
