"""Interrupts, which compiled code may swallow. Imports nothing heavy."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

_interrupted = False


def on_interrupt(*_: object) -> None:
    """Handles SIGINT: raises KeyboardInterrupt, and remembers that it did."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def still_wanted() -> None:
    """Raises KeyboardInterrupt again, which compiled code of jax may have swallowed."""
    if _interrupted:
        raise KeyboardInterrupt


class Stop:
    """Remembers SIGINT and SIGTERM, so that a run can end between two steps; a second signal
    interrupts at once. A context manager; ``announce`` is called at the first signal."""

    def __init__(self, announce: Callable[[], object]) -> None:
        self.signal: int | None = None
        self._announce = announce
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _: object) -> None:
        if self.signal is not None:
            on_interrupt()
        self.signal = number
        self._announce()

    def asked(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    @property
    def status(self) -> int:
        """The exit status that shells expect after such a signal."""
        return 128 + (self.signal or signal.SIGTERM)
