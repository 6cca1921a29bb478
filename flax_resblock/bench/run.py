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

ROUND_SECONDS, FEWEST_REPEATS, MOST_REPEATS = 1.2, 3, 60


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of one value itself."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, third


@dataclass
class Result:
    """The measurements of one contestant.

    Attributes:
      contestant: Its name.
      rounds: Median seconds of every round.
      ratios: Each round's seconds divided by the first contestant's in the same round.
      first: Seconds until the first result: compilation and all that belongs to it.
      cached: The same in a process that finds its programs in the compilation cache; None without
        a cache.
      value: Loss, or mean size of the outputs, after the first repetition.
      imported, peak: Bytes held once everything is imported, and at most; of a process that finds
        its programs in the cache where there is one.
      faults: Page faults of a repetition.
      failed: The reason if there are no numbers.
    """

    contestant: str
    rounds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    first: float = 0.0
    cached: float | None = None
    value: float = 0.0
    imported: int = 0
    peak: int = 0
    faults: int = 0
    failed: str = ""

    def content(self) -> dict[str, Any]:
        """As JSON, with the medians."""
        found = asdict(self)
        if self.rounds:
            found["seconds_quartiles"] = quartiles(self.rounds)
            found["ratio_quartiles"] = quartiles(self.ratios)
        return found


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
      case: What to do.
      rounds: How many turns each gets.
      threads: That a process may use; where the system can, it is kept on as many cores.
      allocator: What the environment tells the allocator of both frameworks, ``{"GLIBC_TUNABLES":
        ...}``; empty: its defaults.
      on_progress: Called with a text and the number of turns done.
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
        _take_turns(workers, results, rounds, on_progress)
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
    result.first, result.value = ready["first"], ready["value"]
    if contestant.side == "jax" and task.case.what != "conversion":
        worker.close()
        worker, ready = start()
        result.cached = ready["first"]
    result.imported = ready["imported"]
    return worker


def _take_turns(
    workers: dict[str, Worker],
    results: dict[str, Result],
    rounds: int,
    on_progress: Callable[[str, int], None],
) -> None:
    repeats: dict[str, int] = {}
    for name, worker in workers.items():  # warms up
        worker.ask(2)
        fastest = min(worker.ask(2)["seconds"])
        repeats[name] = max(FEWEST_REPEATS, min(MOST_REPEATS, round(ROUND_SECONDS / fastest)))
    for number in range(rounds):
        for name, worker in workers.items():
            on_progress(f"round {number + 1} of {rounds}: {name}", number)
            answer, result = worker.ask(repeats[name]), results[name]
            result.rounds.append(statistics.median(answer["seconds"]))
            result.peak, result.faults = answer["peak"], answer["faults"]
        base = next(iter(workers))
        for name in workers:
            results[name].ratios.append(results[name].rounds[-1] / results[base].rounds[-1])
