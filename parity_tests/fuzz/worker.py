"""One process that opens mutated files, one after the other, and says what became of each. Numbers
come in, lines of JSON go out.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from parity_tests.fuzz import guard as guards
from parity_tests.fuzz import targets
from parity_tests.fuzz.mutations import mutated
from parity_tests.fuzz.samples import Files, samples

COMMAND_EVERY = 60
"""Two in so many checkpoints are also given to the command itself, `inspect` and `convert` in
turn.
"""
NO_CHECKPOINTS = ("idx", "cifar binary", "cifar pickle", "npz", "config json")


class Worker:
    """Opens files in a folder of its own, watched."""

    def __init__(self, sandbox: Path) -> None:
        self.folder, self.out = sandbox / "in", sandbox / "out"
        for folder in (self.folder, self.out):
            folder.mkdir()
        self.guard = guards.Guard(sandbox)
        self.samples = samples()
        for (
            category,
            files,
        ) in (
            self.samples.items()
        ):  # everything is imported, and every buffer made, before anything is measured
            outcome = targets.open_one(category, targets.put(self.folder, files))
            assert outcome == "exact" or category == "config json", (category, outcome)
        targets.put(self.folder, self.samples["pth zip"])
        for convert in (False, True):
            targets.command(self.folder, self.out, convert=convert)

    def one(self, category: str, seed: int) -> dict[str, object]:
        """Opens the file of this seed: what came of it, seconds, bytes of memory beyond what was
        taken before.
        """
        return self.open(
            category,
            mutated(category, self.samples[category], seed),
            seed,
            by_command=category not in NO_CHECKPOINTS and seed % COMMAND_EVERY < 2,
        )

    def open(
        self, category: str, files: Files, seed: int = 1, *, by_command: bool = False
    ) -> dict[str, object]:
        """Opens these files."""
        folder = targets.put(self.folder, files)
        before, start = guards.forget_peak(), time.monotonic()
        with self.guard.watching() as found:
            try:
                outcome = targets.open_one(category, folder)
                if by_command:
                    targets.command(folder, self.out, convert=bool(seed % 2))
            except BaseException as error:  # whatever it is, it is what this looks for
                outcome, place = "VIOLATION", traceback.extract_tb(error.__traceback__)[-1]
                found.append(
                    f"{type(error).__name__}: {str(error)[:300]} "
                    f"({Path(place.filename).name}:{place.lineno})"
                )
        memory = guards.peak() - before
        if memory > 2 * targets.MOST:
            found.append(f"memory: {memory:,} bytes, the limit is {2 * targets.MOST:,}")
        return {
            "outcome": "VIOLATION" if found else outcome,
            "seconds": time.monotonic() - start,
            "memory": memory,
            "found": found,
        }


def main() -> None:
    """Reads ``CATEGORY<TAB>SEED`` lines until the input ends."""
    logging.disable(logging.ERROR)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="fuzz") as sandbox:
        os.chdir(sandbox)
        worker = Worker(Path(sandbox))
        guards.bound_process(12)
        print("ready", file=answers)
        for line in sys.stdin:
            category, _, seed = line.rstrip("\n").partition("\t")
            print(json.dumps(worker.one(category, int(seed))), file=answers)


if __name__ == "__main__":
    main()
