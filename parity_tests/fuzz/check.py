"""The property that every mutated file must have, and what counts as a violation of it."""

from __future__ import annotations

import faulthandler
import itertools
import json
import logging
import os
import shutil
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity_tests.fuzz import guard, targets
from parity_tests.fuzz.jax_files import JAX_MUTATIONS, jax_samples
from parity_tests.fuzz.mutations import MUTATIONS
from parity_tests.fuzz.samples import Files, samples

SAMPLES = {**samples(), **jax_samples()}
ALL_MUTATIONS = {**MUTATIONS, **JAX_MUTATIONS}
HANG = 10.0
"""Seconds after which a file counts as one that hangs whoever opens it."""
COMMAND_EVERY = 30
"""One in so many checkpoints is also given to the command itself, `inspect` or `convert`."""
WEIGHTS = {"orbax": 1, "pth zip": 8, "safetensors": 8, "pth legacy": 4, "optimizer": 2}
"""How often a category comes up; 3 unless it is here. Orbax takes ten times as long as others."""


class Checker:
    """Opens files in a folder of its own, watched by the guard.

    Attributes:
      folder: The files that were opened last, as they were.
      outcomes: How many files were ``"exact"``, ``"refused"`` or a ``"VIOLATION"``, by category.
      failures: What was found, one line for each violation."""

    def __init__(self, sandbox: Path, canaries: list[str]) -> None:
        logging.disable(logging.ERROR)
        self.sandbox, self.folder, self.out = sandbox, sandbox / "in", sandbox / "out"
        for folder in (self.folder, self.out):
            folder.mkdir()
        self.guard = guard.Guard(sandbox)
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: list[str] = []
        self.slowest, self.most_memory = 0.0, 0
        # Everything is imported, and every buffer made, before anything is measured.
        for category, files in SAMPLES.items():
            outcome = targets.open_one(category, targets.put(self.folder, files))
            assert outcome == "exact" or category == "config json", (category, outcome)
        targets.put(self.folder, SAMPLES["pth zip"])
        for convert in (False, True):
            targets.command(self.folder, self.out, convert=convert)
        guard.bound_process(12)
        if canaries:
            turns = itertools.cycle(targets.CANARIES[name] for name in canaries)
            opener = lambda category, folder: next(turns)(category, folder)  # noqa: E731
            targets.OPENERS.update(dict.fromkeys(ALL_MUTATIONS, opener))

    def check(self, category: str, files: Files, by_command: bool | None = None) -> str:
        """Opens these files, and returns what came of it.

        Args:
          category: Of the files.
          files: Their content by name.
          by_command: Also give them to `convert`, or (False) to `inspect`.
        """
        folder = targets.put(self.folder, files)
        before, start, outcome = guard.forget_peak(), time.monotonic(), "VIOLATION"
        faulthandler.dump_traceback_later(HANG, exit=True)
        with self.guard.watching() as found:
            try:
                outcome = targets.open_one(category, folder)
                if by_command is not None:
                    targets.command(folder, self.out, convert=by_command)
            except BaseException as error:  # whatever it is, it is what this looks for
                place = traceback.extract_tb(error.__traceback__)[-1]
                found.append(
                    f"{type(error).__name__}: {str(error)[:300]} "
                    f"({Path(place.filename).name}:{place.lineno})"
                )
        faulthandler.cancel_dump_traceback_later()
        memory = guard.peak() - before
        if memory > 2 * targets.MOST:
            found.append(f"memory: {memory:,} bytes, the limit is {2 * targets.MOST:,}")
        if found:
            outcome = "VIOLATION"
            self.failures.append(f"{category}: {'; '.join(found)}")
            kept = self.sandbox / f"violation-{len(self.failures)}"
            shutil.copytree(self.folder, kept, dirs_exist_ok=True)
        self.outcomes[category][outcome] += 1
        self.slowest = max(self.slowest, time.monotonic() - start)
        self.most_memory = max(self.most_memory, memory)
        return outcome

    def report(self) -> None:
        """Writes the counts into the sandbox."""
        counts = {name: getattr(self, name) for name in ("outcomes", "failures", "slowest")}
        text = json.dumps({**counts, "most_memory": self.most_memory})
        (self.sandbox / "report.new").write_text(text)
        os.replace(self.sandbox / "report.new", self.sandbox / "report.json")


def property_of(checker: Checker, categories: list[str]) -> Callable[[bytes], object]:
    """Checks the mutated files that hypothesis makes of the bytes it is given."""
    weighted = [name for name in categories for _ in range(WEIGHTS.get(name, 3))]

    @settings(deadline=None, database=None, suppress_health_check=tuple(HealthCheck))
    @given(st.sampled_from(weighted), st.randoms(use_true_random=False))
    def opens_exactly_or_is_refused(category: str, rng: Random) -> None:
        files = ALL_MUTATIONS[category](SAMPLES[category], rng)
        commands = category not in targets.NO_CHECKPOINTS and rng.randrange(COMMAND_EVERY) == 0
        checker.check(category, files, rng.random() < 0.5 if commands else None)

    handle: Any = opens_exactly_or_is_refused
    return handle.hypothesis.fuzz_one_input
