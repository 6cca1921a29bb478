"""Interrupts from the keyboard, which compiled code may swallow. Imports nothing, so that the
command line starts at once.
"""

from __future__ import annotations

_interrupted = False


def on_interrupt(*_: object) -> None:
    """Handler of SIGINT: raises KeyboardInterrupt, and remembers that it did."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def still_wanted() -> None:
    """Raises KeyboardInterrupt again if one was raised before: compiled code of jax that calls back
    into Python can swallow it.
    """
    if _interrupted:
        raise KeyboardInterrupt
