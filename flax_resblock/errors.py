"""Errors whose message says what to do; the command line prints them and exits with 2."""

from __future__ import annotations

import importlib
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_HIDDEN = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
"""Unicode categories of what hides, reorders or breaks text."""
_LONG = 300


class InputError(ValueError):
    """An input does not fit: a file, a name or a flag. The message says what does not fit, where,
    what was expected and what was found, and what to do next."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class OutputError(InputError):
    """An output could not be written (full disk, no permission); nothing of it is left behind."""


class MissingDependencyError(InputError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class AssumptionWarning(UserWarning):
    """Something that the weights do not tell was assumed. The message lists every assumption, with
    what changes it; ``assume="known"`` silences it."""


class PortedWarning(UserWarning):
    """A module that no configuration describes was ported instead: written as Flax source and
    compared with it. The message says why, and how to get the source."""


def optional(package: str, words: str) -> Any:
    """An optional package, imported; raises MissingDependencyError with these words without it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(words) from error


def visible(text: str, keep: str = "") -> str:
    """Text from a file, safe to show: characters that control a terminal or reorder text appear as
    escapes, ``\\x1b`` or ``\\u202e``.

    Args:
      text: Whatever a file held.
      keep: Characters that stay as they are, such as ``"\\n"``.
    """
    if text.isascii() and text.isprintable():
        return text
    hidden = {c for c in text if c not in keep and unicodedata.category(c) in _HIDDEN}
    return "".join(c.encode("unicode_escape").decode() if c in hidden else c for c in text)


def reason(error: BaseException) -> str:
    """An error in its own words; that of a system call without its number, ``[Errno 2]``, and
    without the path, which the message around it names."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def first_line(error: Exception) -> str:
    """The beginning of another library's error message, fit for a message of ours."""
    lines = str(error).strip().splitlines()
    return visible(lines[0])[:200].rstrip(".") if lines else type(error).__name__


def raised(error: Exception) -> str:
    """The class of an error and the beginning of its message: ``ValueError: a is not b``."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


@contextmanager
def damaged(
    words: str,
    advice: str = "",
    kind: type[InputError] = CheckpointError,
    says: Callable[[Exception], str] = first_line,
    passing: type[Exception] = InputError,
) -> Iterator[None]:
    """Turns whatever is raised at a damaged file into one error, ``WORDS (ITS OWN). ADVICE``. Only
    an InputError stays what it is, and one that is ``passing``: a MemoryError may also come of a
    size that the file declares, so that it passes only where sizes were checked before."""
    try:
        yield
    except (InputError, passing):
        raise
    except Exception as error:
        raise kind(f"{words} ({says(error)}). {advice}".rstrip()) from error


def without_gpu(error: Exception, otherwise: str) -> str:
    """What to do about an error of code of yours that may ask for a GPU.

    Args:
      otherwise: What to do about another one.
    """
    if not any(name in str(error) for name in ("CUDA", "NVIDIA")):
        return otherwise
    return (
        "Your code asks for a GPU, and is run without one here: write x.to(other.device) in place "
        "of x.cuda(), and create tensors with device=other.device."
    )


def some(names: list[str], limit: int = 3) -> str:
    """``a, b, c and 61 more``; names as :func:`visible` shows them, long ones cut."""
    shown = ", ".join(
        visible(name if len(name) <= _LONG else f"{name[:_LONG]}...") for name in names[:limit]
    )
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
