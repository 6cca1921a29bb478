"""The part that the processes of both frameworks share: they prepare, report that they are ready,
and then time as many repetitions as they are asked for.

Lines of JSON in both directions. Once ready: ``{"first": seconds, "imported": bytes, "values":
[...], "device": name}``. Then, for each number that is read, ``{"seconds": [...], "memory": bytes,
"faults": n}``; for ``"profile"`` what :mod:`flax_resblock.bench.kernels` finds."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from flax_resblock.bench.cases import BenchCase
from flax_resblock.config import BlockConfig, Config, architecture

LEARNING_RATE, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
"""The hyperparameters of SGD on both sides."""
REPETITIONS_COMPARED = 5
"""The first so many losses of a training on an accelerator are compared: the later ones depend on
the gradients and on the update."""
PROFILED = 3
"""Repetitions under the profiler."""


@dataclass(frozen=True)
class Task:
    """A worker's instructions.

    Attributes:
      how: See :class:`flax_resblock.bench.cases.Contestant`.
      threads: That it may use, where the system can on as many cores; 0 for any number.
      weights: A ``.safetensors`` file with torchvision's names.
      device: ``"cpu"`` or ``"gpu"``.
      lock: Of an accelerator: a file that is locked while somebody uses the device alone. There
        repetitions are started without waiting for the one before.
    """

    case: BenchCase
    how: str
    threads: int
    weights: Path
    device: str = "cpu"
    lock: str | None = None

    @classmethod
    def of(cls, text: str) -> Task:
        """From :meth:`text`."""
        content = json.loads(text)
        given = {"case": BenchCase(**content["case"]), "weights": Path(content["weights"])}
        return cls(**(content | given))

    def text(self) -> str:
        """As JSON."""
        return json.dumps(vars(self) | {"case": vars(self.case), "weights": str(self.weights)})


def config_of(case: BenchCase) -> Config:
    """The network or block."""
    if case.architecture == "block":
        return BlockConfig(in_channels=64, out_channels=64)
    if case.what == "conversion":
        return architecture(case.architecture)
    stem = "cifar" if case.image_size <= 64 else "imagenet"
    return architecture(case.architecture, num_classes=case.classes, stem=stem)


def batch_of(case: BenchCase) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(N, H, W, C)`` float32 and labels ``(N,)`` int32, the same in every process."""
    rng = np.random.default_rng(0)
    shape = case.batch, case.image_size, case.image_size, config_of(case).in_channels
    images = rng.normal(0.2, 1.0, shape)
    return images.astype(np.float32), rng.integers(0, case.classes, case.batch).astype(np.int32)


def resident() -> int:
    """The largest amount of memory that this process has held so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ``ru_maxrss`` begins with what the process held that started this one
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class TimedProgram:
    """What a worker times.

    Attributes:
      run: Starts a repetition; on an accelerator it does not wait for it.
      wait: Waits until all that was started is done.
      value: A number that shows what a repetition computed: the loss, or the size of the outputs.
      memory: The most bytes that were in use.
      profile: What kernels a function spends its time in, see :mod:`flax_resblock.bench.kernels`.
    """

    device: str
    run: Callable[[], Any]
    wait: Callable[[], None]
    value: Callable[[Any], float]
    memory: Callable[[], int] = resident
    profile: Callable[[Callable[[], None]], list[dict[str, Any]]] = lambda repeat: []


class Alone:
    """Lets one process at a time use the device, while compilers compare their kernels there."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self.waited = 0.0
        """Seconds spent waiting."""

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


def serve(task: Task, make: Callable[[Task, Alone], TimedProgram]) -> None:
    """Prepares, and then repeats until the input ends.

    Args:
      make: Prepares the program. It may compile before it calls ``begin``, and must not use an
        accelerator for long before.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what compilers print goes to stderr

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    if task.threads and hasattr(os, "sched_setaffinity"):  # before frameworks start their threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    imported, alone, start = resident(), Alone(task.lock), time.perf_counter()
    program = make(task, alone)

    def timed(times: int) -> float:
        """Seconds of one of several repetitions that are started together."""
        start = time.perf_counter()
        for _ in range(times):
            program.run()
        program.wait()
        return (time.perf_counter() - start) / times

    def repeated() -> None:
        timed(PROFILED)

    alone.begin()
    result = program.run()
    program.wait()
    first, values = time.perf_counter() - start - alone.waited, [program.value(result)]
    if task.lock is not None:
        values += [program.value(program.run()) for _ in range(REPETITIONS_COMPARED - 1)]
        program.wait()
    alone.end()
    answer(first=first, imported=imported, values=values, device=program.device)
    for line in sys.stdin:
        question = json.loads(line)
        timed(1)  # after the turns of others the caches hold what is theirs
        if question == "profile":
            wall = PROFILED * timed(PROFILED)
            kernels = program.profile(repeated)
            answer(kernels=kernels, repetitions=PROFILED, wall=wall)
            continue
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = [timed(1) for _ in range(question)] if task.lock is None else [timed(question)]
        faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // question
        answer(seconds=seconds, memory=program.memory(), faults=faults)
