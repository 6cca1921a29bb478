"""Runs workers, watches them, and counts; see the package."""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from parity_tests.fuzz import guided
from parity_tests.fuzz.mutations import MUTATIONS, mutated
from parity_tests.fuzz.samples import samples

HANG = 10.0
"""Seconds after which a file counts as one that hangs whoever opens it."""
WEIGHTS = {"orbax": 1, "pth zip": 8, "safetensors": 8, "pth legacy": 4, "optimizer": 2}
"""How often a category comes up; 3 unless it is here. Orbax takes ten times as long as the
others.
"""
KEPT = Path("fuzz_failures")


@dataclass
class Tally:
    """What became of the files."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    most_memory: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, category: str, seed: int, answer: dict) -> None:
        with self.lock:
            self.outcomes[category][answer["outcome"]] += 1
            self.slowest, self.most_memory = (
                max(self.slowest, answer["seconds"]),
                max(self.most_memory, answer["memory"]),
            )
            if answer["found"]:
                self.failures.append(f"{category}, seed {seed}: {'; '.join(answer['found'])}")
                keep(category, seed)

    @property
    def total(self) -> int:
        return sum(sum(counts.values()) for counts in self.outcomes.values())


def keep(category: str, seed: int) -> None:
    """Writes the files of a failure down, to become a regression test."""
    for name, data in mutated(category, samples()[category], seed).items():
        path = KEPT / f"{category.replace(' ', '-')}-{seed}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class Watched:
    """A worker process, started again when it dies."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "160",
        }
        path = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (path, os.environ.get("PYTHONPATH")))
        )
        command = [sys.executable, "-m", "parity_tests.fuzz.worker"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._complaints, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def _complaints(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors = [*self.errors[-20:], line]

    def answer(self, seconds: float) -> str | None:
        """The next line; empty when the process has died, None when it does not come in time."""
        try:
            return self.lines.get(timeout=seconds)
        except queue.Empty:
            return None

    def ask(self, category: str, seed: int) -> dict:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{category}\t{seed}\n")
            self.process.stdin.flush()
            line = self.answer(HANG)
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        if line is None:
            self.process.kill()
        code = self.process.wait()
        found = (
            f"HANG: no answer within {HANG:g} s"
            if line is None
            else f"CRASH: the process died with status {code}: {''.join(self.errors[-3:])[:400]}"
        )
        return {
            "outcome": "HANG" if line is None else "CRASH",
            "seconds": HANG if line is None else 0.0,
            "memory": 0,
            "found": [found],
        }

    def close(self) -> None:
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def started() -> Watched:
    worker = Watched()
    if worker.answer(180) != "ready\n":
        worker.process.kill()
        raise RuntimeError(f"the worker does not start: {''.join(worker.errors)}")
    return worker


def work(order: list[str], seeds: range, end: float, tally: Tally) -> None:
    """Sends files to one worker until the time is over."""
    worker = started()
    for seed in seeds:
        if time.monotonic() > end:
            break
        category = order[seed % len(order)]
        answer = worker.ask(category, seed)
        tally.add(category, seed, answer)
        if answer["outcome"] in ("HANG", "CRASH"):
            worker = started()
    worker.close()


def fuzz(seconds: float, categories: list[str], *, seed: int = 0, workers: int = 2) -> Tally:
    """Opens mutated files for so many seconds, in so many processes."""
    order = [
        category
        for step in range(max(WEIGHTS.values()))
        for category in categories
        if step < WEIGHTS.get(category, 3)
    ]
    tally, end = Tally(), time.monotonic() + seconds
    threads = [
        threading.Thread(
            target=work,
            args=(order, range(seed * 10**8 + i, (seed + 1) * 10**8, workers), end, tally),
        )
        for i in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def print_counts(tally: Tally, seconds: float) -> None:
    names = ("exact", "refused", "VIOLATION", "HANG", "CRASH")
    print(f"{'category':<26}" + "".join(f"{name:>11}" for name in ("inputs", *names)))
    for category, counts in tally.outcomes.items():
        print(
            f"{category:<26}{sum(counts.values()):>11,}"
            + "".join(f"{counts[name]:>11,}" for name in names)
        )
    sums = [sum(counts[name] for counts in tally.outcomes.values()) for name in names]
    print(f"{'all':<26}{tally.total:>11,}" + "".join(f"{count:>11,}" for count in sums))
    print(
        f"{seconds:.0f} s; the slowest took {tally.slowest:.2f} s; the most memory beyond the "
        f"start was {tally.most_memory / 1e6:.0f} MB"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests.fuzz",
        description="Opens mutated files and counts what becomes of them.",
    )
    parser.add_argument("seconds", nargs="?", type=float, default=300)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--category", choices=list(MUTATIONS), action="append")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--engine", choices=("structured", "atheris"), default="structured")
    options = parser.parse_args(arguments)
    if options.engine == "atheris":
        try:
            return guided.run(options.seconds)
        except ImportError as error:
            print(
                f"atheris cannot be imported ({error}): pip install 'flax-resblock[dev]', on "
                f"Linux. Going on with the structured search.",
                file=sys.stderr,
            )
    start = time.monotonic()
    print(f"seed {options.seed}", flush=True)
    tally = fuzz(
        options.seconds,
        options.category or list(MUTATIONS),
        seed=options.seed,
        workers=options.workers,
    )
    print_counts(tally, time.monotonic() - start)
    for failure in tally.failures[:20]:
        print(failure)
    if tally.failures:
        print(f"{len(tally.failures)} files got what no file may get; they are kept in {KEPT}/")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
