"""Runs the parts of a plan on an accelerator, within a time, whatever becomes of a contestant."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_resblock.bench.cases import Contestant
from flax_resblock.bench.chips import flops, peak_of
from flax_resblock.bench.kernels import summary
from flax_resblock.bench.plan import TOLERANCES, BenchPart
from flax_resblock.bench.process import Worker, environment_of_workers
from flax_resblock.bench.run import Timed, take_turns, write_weights
from flax_resblock.bench.worker import Task

MODULES = {"jax": "flax_resblock.bench.jax_device", "torch": "flax_resblock.bench.torch_device"}
TURN_SECONDS, MOST_REPEATS = 0.6, 200
COMPILE_SECONDS = 150.0
"""Limit of a contestant's preparation; of one that compiles late, twice as much."""
TURN_LIMIT = 60.0
LEAST_SECONDS = 15.0
"""A part is not begun with less time than this."""


@dataclass
class DeviceResult(Timed):
    """The measurements of one contestant on an accelerator.

    Attributes:
      flags: Its options of XLA.
      values: The losses of the first steps, or the mean size of the outputs.
      apart: See :func:`difference`, to the first contestant's.
      memory: Most bytes of the device in use.
      profile: See :func:`flax_resblock.bench.kernels.summary`; None if none was asked for.
    """

    flags: str = ""
    values: list[float] = field(default_factory=list)
    apart: float = 0.0
    memory: int = 0
    device: str = ""
    profile: dict[str, Any] | None = None

    def took(self, answer: dict[str, Any]) -> None:
        super().took(answer)
        self.memory = answer["memory"]


def difference(values: Sequence[float], base: Sequence[float]) -> float:
    """The largest difference, relative to the largest of the base; NaN if there is one."""
    return float(np.abs(np.subtract(values, base)).max() / np.abs(base).max())


@dataclass
class PartResult:
    """The measurements of a part: FLOPs of a repetition, and the seconds that all took."""

    part: BenchPart
    results: list[DeviceResult]
    flops: int
    seconds: float

    @property
    def different(self) -> list[str]:
        """The contestants that did other work than the first."""
        tolerance = TOLERANCES[self.part.case.precision]
        return [r.contestant for r in self.results if r.values and not r.apart <= tolerance]

    def share_of_peak(self, result: DeviceResult) -> float | None:
        """The FLOPs of the network over those that the chip can compute in the time."""
        peak = peak_of(result.device, self.part.case.precision)
        if peak is None or not result.rounds:
            return None
        return self.flops / statistics.median(result.rounds) / peak

    def content(self) -> dict[str, Any]:
        """As JSON."""
        found = []
        for result in self.results:
            row = result.content()
            if result.rounds:
                row["images_per_second"] = self.part.case.batch / row["seconds_quartiles"][1]
                row["share_of_peak"] = self.share_of_peak(result)
            found.append(row)
        case = self.part.case
        return {
            "part": self.part.name,
            "case": vars(case),
            "title": case.title,
            "flops": self.flops,
            "seconds": self.seconds,
            "different": self.different,
            "results": found,
        }


def run_parts(
    parts: Sequence[BenchPart],
    *,
    device: str,
    rounds: int,
    seconds: float,
    profile: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Iterator[PartResult]:
    """Measures one part after the other, as long as there is time.

    The contestants of a part are prepared at the same time, each in a process of its own, and then
    take turns on the device. What fails, or takes too long, is a row that says so.

    Args:
      parts: See :func:`flax_resblock.bench.plan.parts_of`.
      device: ``"gpu"`` or ``"cpu"``.
      seconds: After which nothing is begun, and what runs is ended.
      profile: Whether to look at the kernels of every contestant as well.
    """
    end = time.monotonic() + seconds
    jax.config.update("jax_platforms", "cpu")  # this process leaves the device to the others
    with tempfile.TemporaryDirectory(prefix="flax-resblock-bench") as folder:
        for number, part in enumerate(parts):
            if end - time.monotonic() < LEAST_SECONDS:
                return
            on_progress(f"{part.name}: starting")
            with ExitStack() as stack:
                place = Path(folder) / str(number)
                place.mkdir()
                turns = _Turns(part, device, place, Path(folder), end, stack, on_progress)
                yield turns.measure(rounds, profile)


class _Turns:
    """One part."""

    def __init__(
        self,
        part: BenchPart,
        device: str,
        place: Path,
        caches: Path,
        end: float,
        stack: ExitStack,
        on_progress: Callable[[str], None],
    ) -> None:
        self.part, self.end, self.stack = part, end, stack
        self.begun, self.on_progress = time.monotonic(), on_progress
        self.results = {c.name: DeviceResult(c.name, flags=c.flags) for c in part.contestants}
        self.workers: dict[str, Worker] = {}
        self.task = Task(part.case, "", 0, place / "weights.safetensors", device, str(place / "l"))
        write_weights(part.case, self.task.weights)
        self.environment = environment_of_workers(
            caches,
            XLA_PYTHON_CLIENT_PREALLOCATE="false",  # several processes share the device's memory
            TF_CPP_MIN_LOG_LEVEL="3",
            JAX_COMPILATION_CACHE_DIR=os.environ.get("JAX_COMPILATION_CACHE_DIR")
            or str(caches / "xla"),
            **({"JAX_PLATFORMS": "cpu"} if device == "cpu" else {}),
        )

    def _start(self, contestant: Contestant) -> None:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {contestant.flags}".strip()
        task = Task(**{**vars(self.task), "how": contestant.how}).text()
        environment = self.environment | {"XLA_FLAGS": flags}
        if contestant.side == "torch":
            environment["JAX_PLATFORMS"] = "cpu"  # its helpers import jax
        worker = Worker(MODULES[contestant.side], task, environment)
        self.stack.callback(worker.close)
        self.workers[contestant.name] = worker

    def _await(self, contestant: Contestant, limit: float) -> None:
        self.on_progress(f"{self.part.name}: {contestant.name} compiles")
        ready = self._asked(contestant.name, None, limit)
        if ready is not None:
            result = self.results[contestant.name]
            result.first, result.values = ready["first"], ready["values"]
            result.device = ready["device"]

    def _asked(self, name: str, question: Any, limit: float) -> dict[str, Any] | None:
        """The answer; None if there is none, and then the contestant is out."""
        limit = min(limit, self.end - time.monotonic())
        worker = self.workers[name]
        try:
            return worker.answer(limit) if question is None else worker.ask(question, limit)
        except RuntimeError as error:
            self.results[name].failed = str(error)
            self.workers.pop(name).close()
            return None

    def measure(self, rounds: int, profile: bool) -> PartResult:
        """Prepares all, gives them their turns, and compares what they computed."""
        together = [c for c in self.part.contestants if not c.late]
        # what is not ready by then is left out, so that the others get their turns
        turns = TURN_SECONDS * (rounds + 2) * len(self.part.contestants)
        until = min(time.monotonic() + COMPILE_SECONDS, self.end - turns)
        for contestant in together:
            self._start(contestant)
        for contestant in together:
            self._await(contestant, until - time.monotonic())
        for contestant in self.part.contestants:
            if contestant.late:
                self._start(contestant)
                limit = min(2 * COMPILE_SECONDS, self.end - turns - time.monotonic())
                self._await(contestant, limit)
        take_turns(
            self.workers,
            lambda name, repetitions: self._asked(name, repetitions, TURN_LIMIT),
            self.results,
            rounds,
            lambda text, number: self.on_progress(f"{self.part.name}: {text}"),
            seconds=TURN_SECONDS,
            most=MOST_REPEATS,
        )
        if profile:
            self._profile()
        results = list(self.results.values())
        known = [result for result in results if result.values]
        for result in known:
            result.apart = difference(result.values, known[0].values)
        seconds = time.monotonic() - self.begun
        return PartResult(self.part, results, flops(self.part.case), seconds)

    def _profile(self) -> None:
        for name in list(self.workers):
            self.on_progress(f"{self.part.name}: profile of {name}")
            answer = self._asked(name, "profile", TURN_LIMIT)
            if answer is not None:
                self.results[name].profile = summary(**answer)
