"""The part that the processes of both frameworks share when they work on an accelerator.

Lines of JSON in both directions. Once ready: ``{"first": seconds, "values": [...], "device":
name}``. Then, for each number that is read, ``{"seconds": s, "value": v, "memory": bytes}``, with
the seconds of one repetition; for ``"profile"`` what :mod:`flax_resblock.bench.kernels` finds."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from flax_resblock.bench.worker import Task

REPETITIONS_COMPARED = 5
"""The first so many losses of a training are compared: the later ones depend on the gradients and
on the update."""
PROFILED = 3
"""Repetitions under the profiler."""


@dataclass(frozen=True)
class Program:
    """What a worker times.

    Attributes:
      device: Its name.
      run: Starts a repetition and does not wait for it.
      wait: Waits until all that was started is done.
      value: The loss, or the mean size of the outputs, of a repetition.
      memory: The most bytes of the device that were in use.
      profile: What kernels a function spends its time in, see :mod:`flax_resblock.bench.kernels`.
    """

    device: str
    run: Callable[[], Any]
    wait: Callable[[], None]
    value: Callable[[Any], float]
    memory: Callable[[], int]
    profile: Callable[[Callable[[], None]], list[dict[str, Any]]]


class Alone:
    """Lets one process at a time use the device, while compilers compare their kernels there."""

    def __init__(self, path: str | None) -> None:
        self._path, self._file = path, None
        self.waited = 0.0
        """Seconds spent waiting."""

    _file: IO[str] | None

    def begin(self) -> None:
        """Waits until no other process is alone on the device."""
        if self._path is not None and self._file is None:
            start = time.perf_counter()
            self._file = open(self._path, "w")  # noqa: SIM115  # open while it is locked
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self.waited += time.perf_counter() - start

    def end(self) -> None:
        """Lets the next one."""
        if self._file is not None:
            self._file.close()
        self._file = self._path = None


def serve(task: Task, make: Callable[[Task, Alone], Program]) -> None:
    """Prepares, and then repeats until the input ends.

    Args:
      task: What to do.
      make: Prepares the program. It may compile before it calls ``begin``, and must not use the
        device for long before.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what compilers print goes to stderr

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    alone, start = Alone(task.lock), time.perf_counter()
    program = make(task, alone)
    alone.begin()
    values = [program.value(program.run())]
    first = time.perf_counter() - start - alone.waited
    values += [program.value(program.run()) for _ in range(REPETITIONS_COMPARED - 1)]
    program.wait()
    alone.end()
    answer({"first": first, "values": values, "device": program.device})

    def repeat(times: int) -> Any:
        result = None
        for _ in range(times):
            result = program.run()
        program.wait()
        return result

    def repeated() -> None:
        repeat(PROFILED)

    for line in sys.stdin:
        question = json.loads(line)
        if question == "profile":
            repeat(1)
            start = time.perf_counter()
            repeat(PROFILED)
            wall = time.perf_counter() - start
            kernels = program.profile(repeated)
            answer({"kernels": kernels, "repetitions": PROFILED, "wall": wall})
            continue
        repeat(1)  # after the turns of others the caches hold what is theirs
        start = time.perf_counter()
        result = repeat(question)
        seconds = (time.perf_counter() - start) / question
        answer({"seconds": seconds, "value": program.value(result), "memory": program.memory()})
