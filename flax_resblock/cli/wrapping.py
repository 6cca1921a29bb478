"""Lines broken between words at the edge of a terminal, with their continuations indented."""

from __future__ import annotations

import re
import shutil
import textwrap
from typing import TextIO

_LABEL = re.compile(r"\s*(?:\S+ {2,}(?=\S))?")
"""Leading spaces, and a label that two spaces or more set apart: ``  note  ``."""
_DEEPEST = 24
"""Columns of the deepest indentation; a longer label is not indented below."""


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, broken between words, without words cut in two, for a terminal of
    ``width`` columns. Continuations begin below what follows the line's label, as in ``  note
    ...``, or two columns inside the line."""
    lines = []
    for line in text.split("\n"):
        label = _LABEL.match(line)
        column = len(label[0]) if label else 0
        inside = len(line) - len(line.lstrip())
        if not inside < column <= _DEEPEST:
            column = inside + 2
        lines += textwrap.wrap(
            line,
            max(width, 2 * _DEEPEST),
            subsequent_indent=" " * column,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
            replace_whitespace=False,
        ) or [""]
    return lines


def for_stream(text: str, stream: TextIO) -> str:
    """The text, wrapped for a terminal; files and pipes get whole lines, which are searched."""
    if not stream.isatty():
        return text
    return "\n".join(wrapped(text, shutil.get_terminal_size().columns))
