"""The part that the processes of both frameworks share: they prepare, report that they are ready,
and then time as many repetitions as they are asked for.

Lines of JSON in both directions: ``{"first": seconds, "imported": bytes}`` once ready; then, for
each number that is read, ``{"seconds": [...], "value": v, "peak": bytes, "faults": n}``."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.bench.cases import BenchCase
from flax_resblock.config import BlockConfig, Config, architecture

LEARNING_RATE, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
"""The hyperparameters of SGD on both sides."""


@dataclass(frozen=True)
class Task:
    """A worker's instructions.

    Attributes:
      case: What to do.
      how: See :class:`flax_resblock.bench.cases.Contestant`.
      threads: That it may use.
      weights: A ``.safetensors`` file with torchvision's names.
      device: ``"cpu"`` or ``"gpu"``.
      lock: A file that is locked while somebody uses the device alone; None: nobody does.
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


def serve(
    threads: int, prepare: Callable[[], Callable[[], Any]], value: Callable[[Any], float]
) -> None:
    """Prepares, and then repeats until the input ends.

    Args:
      threads: That the process may use; where the system can, it is kept on as many cores.
      prepare: Gives what is timed; it returns once the result is there.
      value: A number that shows what was computed: the loss, or the sum of the outputs.
    """
    if hasattr(os, "sched_setaffinity"):  # before the frameworks start their threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    imported, start = resident(), time.perf_counter()
    run = prepare()
    result = run()
    first = time.perf_counter() - start
    answer = {"first": first, "imported": imported, "value": value(result)}
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        run()  # after the turns of others the caches hold what is theirs
        seconds, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(int(line)):
            start = time.perf_counter()
            result = run()
            seconds.append(time.perf_counter() - start)
        faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // len(seconds)
        answer = {"seconds": seconds, "value": value(result), "peak": resident()}
        print(json.dumps(answer | {"faults": faults}), flush=True)
