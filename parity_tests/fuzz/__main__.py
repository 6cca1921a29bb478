"""Runs the search in processes of its own, and counts; see the package."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEPT = Path("fuzz_failures")
BUFFER, SEEDS = 600, 200
"""Bytes that hypothesis makes a file of, and how many random ones the search begins with."""
GUIDES = ["flax_resblock.checkpoint", "flax_resblock.training.data"]
"""Packages whose coverage guides the search, where atheris is installed."""
OUTCOMES = ("exact", "refused", "VIOLATION", "HANG", "CRASH")


@dataclass
class Tally:
    """What became of the files.

    Attributes:
      outcomes: How many of each outcome, by category.
      failures: One line for each file that got what no file may get.
      slowest: Seconds of the slowest.
      most_memory: Bytes beyond what the process had before."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    most_memory: int = 0

    @property
    def total(self) -> int:
        return sum(sum(counts.values()) for counts in self.outcomes.values())

    def add(self, sandbox: Path, status: int, complaints: str) -> None:
        """Adds what a process reported, and how it ended; keeps the files that failed."""
        if (sandbox / "report.json").exists():
            report = json.loads((sandbox / "report.json").read_text())
            for category, counts in report["outcomes"].items():
                self.outcomes[category].update(counts)
            self.failures += report["failures"]
            self.slowest = max(self.slowest, report["slowest"])
            self.most_memory = max(self.most_memory, report["most_memory"])
        if status:
            outcome = "HANG" if "Timeout (" in complaints else "CRASH"
            self.outcomes["(process died)"][outcome] += 1
            self.failures.append(f"{outcome}: status {status}: {complaints[-400:]}")
        for folder in [*sandbox.glob("violation-*"), *([sandbox / "in"] if status else [])]:
            KEPT.mkdir(exist_ok=True)
            kept = tempfile.mkdtemp(prefix=f"{folder.name}-", dir=KEPT)
            shutil.copytree(folder, kept, dirs_exist_ok=True)

    def show(self, seconds: float) -> None:
        """Prints a table."""
        print(f"{'category':<26}" + "".join(f"{name:>11}" for name in ("inputs", *OUTCOMES)))
        sums = sum(self.outcomes.values(), Counter[str]())
        for category, counts in [*sorted(self.outcomes.items()), ("all", sums)]:
            numbers = [sum(counts.values()), *(counts[name] for name in OUTCOMES)]
            print(f"{category:<26}" + "".join(f"{number:>11,}" for number in numbers))
        print(
            f"{seconds:.0f} s; the slowest took {self.slowest:.2f} s; the most memory beyond the "
            f"start was {self.most_memory / 1e6:.0f} MB"
        )


def search(sandbox: Path, options: argparse.Namespace) -> None:
    """Opens files in this process until the time is over or there were enough; does not return."""
    rng = random.Random(options.seed)
    atheris: Any = None
    with suppress(ImportError):  # there is none for every system and version of Python
        atheris = importlib.import_module("atheris")
    with nullcontext() if atheris is None else atheris.instrument_imports(include=GUIDES):
        from parity_tests.fuzz.check import ALL_MUTATIONS, Checker, property_of
    checker = Checker(sandbox, options.canary)
    check = property_of(checker, options.category or list(ALL_MUTATIONS))
    end, reported, failures = time.monotonic() + options.seconds, 0.0, 0

    def one(data: bytes) -> None:
        nonlocal reported, failures
        check(data)
        now = time.monotonic()
        count = sum(sum(counts.values()) for counts in checker.outcomes.values())
        over = now > end or count >= options.files
        if over or now > reported + 0.2 or len(checker.failures) > failures:
            checker.report()
            reported, failures = now, len(checker.failures)
        if over:
            os._exit(0)

    (sandbox / "ready").touch()
    if atheris is not None:
        (sandbox / "corpus").mkdir()
        for number in range(SEEDS):
            (sandbox / "corpus" / str(number)).write_bytes(rng.randbytes(BUFFER))
        flags = [f"-seed={options.seed + 1}", f"-max_len={BUFFER}", "-len_control=0"]
        flags += ["-verbosity=0", "-timeout=60", "-rss_limit_mb=0"]
        atheris.Setup([sys.argv[0], *flags, str(sandbox / "corpus")], one)
        atheris.Fuzz()
    while True:
        one(rng.randbytes(BUFFER))


def work(number: int, options: argparse.Namespace, tally: Tally) -> None:
    """Starts processes, one after the other, until the time is over or there were enough."""
    start, files = time.monotonic(), 0
    wanted = -(-options.files // options.workers)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.getenv("PYTHONPATH"))))
    for attempt in range(100):
        left = options.seconds - (time.monotonic() - start if attempt else 0)
        if left <= 0 or files >= wanted:
            return
        with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
            command = [sys.executable, "-m", "parity_tests.fuzz", str(left), "--sandbox", folder]
            command += ["--files", str(wanted - files)]
            command += ["--seed", str(options.seed + 1000 * number + attempt)]
            command += [f"--category={category}" for category in options.category]
            command += [f"--canary={canary}" for canary in options.canary]
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", env=environment,
                cwd=folder, check=False,
            )  # fmt: skip
            if not Path(folder, "ready").exists():
                raise RuntimeError(f"the search does not start: {done.stderr[-2000:]}")
            before = tally.total
            tally.add(Path(folder), done.returncode, done.stderr)
            files += tally.total - before


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests.fuzz",
        description="Opens mutated files and counts what becomes of them.",
    )
    parser.add_argument("seconds", nargs="?", type=float, default=300)
    parser.add_argument("--files", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--category", action="append", default=[])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--canary",
        action="append",
        default=[],
        help="do this in place of opening files; it must be noticed",
    )
    parser.add_argument("--sandbox", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.sandbox is not None:
        search(options.sandbox, options)
    start, tally = time.monotonic(), Tally()
    print(f"seed {options.seed}", flush=True)
    with ThreadPoolExecutor(options.workers) as pool:
        for future in [
            pool.submit(work, number, options, tally) for number in range(options.workers)
        ]:
            future.result()
    tally.show(time.monotonic() - start)
    for failure in tally.failures[:20]:
        print(failure)
    if tally.failures:
        print(f"{len(tally.failures)} files got what no file may get; see {KEPT}/")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
