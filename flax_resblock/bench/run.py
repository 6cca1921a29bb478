"""Runs the contestants of a case turn by turn."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import flax_resblock
from flax_resblock.bench.cases import CONTESTANTS, BenchCase, Contestant
from flax_resblock.bench.process import Worker, environment_of_workers
from flax_resblock.bench.worker import Task, config_of
from flax_resblock.errors import InputError
from flax_resblock.nn.resnet import build

FEWEST_REPEATS = 3
ROUND_SECONDS, MOST_REPEATS = 1.2, 60
"""Of a turn: about how long it takes, and its most repetitions."""


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of one value itself."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, third


@dataclass
class Timed:
    """The times of one contestant.

    Attributes:
      rounds: Seconds of a repetition, the median of every round.
      ratios: Each round's seconds divided by the first contestant's in the same round.
      first: Seconds until the first result: compilation and all that belongs to it.
      failed: The reason if there are no numbers, or not all.
    """

    contestant: str
    rounds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    first: float = 0.0
    failed: str = ""

    def took(self, answer: dict[str, Any]) -> None:
        """Takes what a worker answers to its turn."""
        self.rounds.append(statistics.median(answer["seconds"]))

    def content(self) -> dict[str, Any]:
        """As JSON, with the medians."""
        found = asdict(self)
        if self.rounds:
            found["seconds_quartiles"] = quartiles(self.rounds)
            found["ratio_quartiles"] = quartiles(self.ratios)
        return found


@dataclass
class Result(Timed):
    """The measurements of one contestant on a CPU.

    Attributes:
      cached: As ``first``, in a process that finds its programs in the compilation cache; None
        without a cache.
      value: Loss, or mean size of the outputs, after the first repetition.
      imported, peak: Bytes held once everything is imported, and at most; of a process that finds
        its programs in the cache where there is one.
      faults: Page faults of a repetition.
    """

    cached: float | None = None
    value: float = 0.0
    imported: int = 0
    peak: int = 0
    faults: int = 0

    def took(self, answer: dict[str, Any]) -> None:
        super().took(answer)
        self.peak, self.faults = answer["memory"], answer["faults"]


Ask = Callable[[str, int], dict[str, Any] | None]
"""Asks a worker for a number of repetitions; None where it fails, and is no longer there."""


def take_turns(
    workers: Mapping[str, Worker],
    ask: Ask,
    results: Mapping[str, Timed],
    rounds: int,
    on_progress: Callable[[str, int], None],
    *,
    seconds: float = ROUND_SECONDS,
    most: int = MOST_REPEATS,
) -> None:
    """Gives every worker its turns of about so many seconds."""
    repeats: dict[str, int] = {}
    for name in list(workers):  # warms up
        answer = ask(name, FEWEST_REPEATS)
        if answer is not None:
            fitting = round(seconds / min(answer["seconds"]))
            repeats[name] = max(FEWEST_REPEATS, min(most, fitting))
    for number in range(rounds):
        took: list[Timed] = []
        for name in list(workers):
            on_progress(f"round {number + 1} of {rounds}: {name}", number)
            answer = ask(name, repeats[name])
            if answer is not None:
                results[name].took(answer)
                took.append(results[name])
        for result in took:
            result.ratios.append(result.rounds[-1] / took[0].rounds[-1])


def measure(
    case: BenchCase,
    *,
    rounds: int,
    threads: int,
    allocator: Mapping[str, str],
    on_progress: Callable[[str, int], None] = lambda text, done: None,
) -> list[Result]:
    """Times every contestant of a case.

    Each works in a process of its own, alone: the others wait for their turn. A round gives every
    contestant one turn of several repetitions.

    Args:
      threads: That a process may use; where the system can, it is kept on as many cores.
      allocator: What the environment tells the allocator of both frameworks, ``{"GLIBC_TUNABLES":
        ...}``; empty: its defaults.
    Raises:
      InputError: Every contestant failed before its first result.
    """
    with tempfile.TemporaryDirectory(prefix="flax-resblock-bench") as folder, ExitStack() as stack:
        weights = Path(folder) / "weights.safetensors"
        on_progress("preparing weights", 0)
        write_weights(case, weights)
        environment = environment_of_workers(
            Path(folder),
            OMP_NUM_THREADS=str(threads),
            JAX_PLATFORMS="cpu",
            JAX_COMPILATION_CACHE_DIR=str(Path(folder) / "cache"),
        )
        environment.pop("GLIBC_TUNABLES", None)
        environment |= allocator
        results: dict[str, Result] = {}
        workers: dict[str, Worker] = {}
        for contestant in CONTESTANTS[case.what]:
            result = results[contestant.name] = Result(contestant.name)
            task = Task(case, contestant.how, threads, weights)
            on_progress(f"{contestant.name}: compiling", 0)
            try:
                workers[contestant.name] = _started(contestant, task, environment, result, stack)
            except RuntimeError as error:
                result.failed = str(error)
        if not workers:
            reasons = "; ".join(f"{name}: {result.failed}" for name, result in results.items())
            raise InputError(f"{case.title}: every contestant failed: {reasons}")

        def ask(name: str, repetitions: int) -> dict[str, Any] | None:
            try:
                return workers[name].ask(repetitions)
            except RuntimeError as error:
                results[name].failed = str(error)
                del workers[name]
                return None

        take_turns(workers, ask, results, rounds, on_progress)
        return list(results.values())


def write_weights(case: BenchCase, path: Path) -> None:
    """Writes the fresh weights that every contestant of a case begins with."""
    from flax import nnx

    flax_resblock.save(build(config_of(case), rngs=nnx.Rngs(0)), path)


def _started(
    contestant: Contestant,
    task: Task,
    environment: dict[str, str],
    result: Result,
    stack: ExitStack,
) -> Worker:
    """A worker that is ready; of jax, the second one, which finds its programs compiled."""

    def start() -> tuple[Worker, dict[str, Any]]:
        module = f"flax_resblock.bench.{contestant.side}_worker"
        worker = Worker(module, task.text(), environment)
        stack.callback(worker.close)
        return worker, worker.answer()

    worker, ready = start()
    result.first, (result.value, *_) = ready["first"], ready["values"]
    if contestant.side == "jax" and task.case.what != "conversion":
        worker.close()
        worker, ready = start()
        result.cached = ready["first"]
    result.imported = ready["imported"]
    return worker
