"""The parts of the device check, each run by :mod:`device_check` in a process of its own.

    python benchmarks/device_parts.py NAME RESULT --device gpu

Every part yields rows. They are written to RESULT whenever there are new ones, so that a part that
is stopped leaves what it has found."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from device_facts import conversion, machine, memory, precision, repeatability, tests
from device_parity import CHUNKS, Row, Setting, battery, block, network, training

from flax_resblock.parity.devices import make_xla_deterministic

FAULTS = ("precision", "statistics")


class Part(NamedTuple):
    """One part.

    Attributes:
      run: Yields the rows.
      what: What it shows, for the page.
      seconds: Its time limit.
      where: ``"anywhere"``; ``"accelerator"`` where a CPU has nothing to show; ``"tf32"`` where
        both sides need a GPU.
    """

    run: Callable[[Setting], Iterator[Row]]
    what: str
    seconds: int
    where: str = "anywhere"


def _networks(arithmetic: str, where: str) -> dict[str, Part]:
    parts = {}
    for name in ("resnet50", "resnet18"):
        what = f"{name} at 224x224 in {arithmetic}: outputs, statistics and gradients"
        parts[f"{name}-{arithmetic}"] = Part(partial(network, name, arithmetic), what, 300, where)
    return parts


def _training(arithmetic: str, where: str) -> dict[str, Part]:
    what = f"twenty training steps in {arithmetic}, SGD and AdamW"
    return {f"training-{arithmetic}": Part(partial(training, arithmetic), what, 240, where)}


_EVERY_KIND = {
    f"battery-{chunk + 1}": Part(
        partial(battery, chunk), "every kind of block and small network", 300
    )
    for chunk in range(CHUNKS)
}

PARTS: Mapping[str, Part] = {
    "machine": Part(machine, "machine, versions and settings", 120),
    "precision": Part(precision, "what precision both sides really deliver", 120),
    "block": Part(block, "the residual block of the question", 240),
    **_networks("float32", "anywhere"),
    "conversion": Part(conversion, "weights to the device and back, bit for bit", 120),
    **_networks("bfloat16", "accelerator"),
    **_networks("tf32", "tf32"),
    **_training("float32", "anywhere"),
    **_EVERY_KIND,
    "repeatability": Part(repeatability, "the same bits in every run", 240),
    "tests": Part(tests, "the tests of the marker accelerator", 240, "accelerator"),
    **_training("bfloat16", "accelerator"),
    **_training("tf32", "tf32"),
    "memory": Part(memory, "peak memory of a training step", 180, "accelerator"),
}
"""In the order of their value."""

QUICK = ("machine", "precision", "block", "conversion")
"""The parts of ``--quick``."""


def run_part(name: str, setting: Setting, result: Path) -> None:
    """Runs one part and writes its rows to ``result`` as they come, see ``facts`` below.

    Raises:
      RuntimeError: After everything else, if a comparison raised an error; the part is not finished
        then.
    """
    rows: list[dict[str, Any]] = []

    def write(finished: bool) -> None:
        scratch = result.with_suffix(".partial")
        facts = {"rows": rows, "finished": finished, "cpu_seconds": round(sum(os.times()[:4]), 1)}
        facts["xla_flags"] = os.environ.get("XLA_FLAGS", "")
        scratch.write_text(json.dumps(facts))
        scratch.replace(result)

    for row in PARTS[name].run(setting):
        print(f"{row.subject}: {row.check}: {row.figure}", flush=True)
        rows.append(row._asdict())
        write(False)
    errors = [row["detail"]["error"] for row in rows if "error" in row["detail"]]
    if errors:
        raise RuntimeError("\n".join(errors))
    write(True)


def main() -> None:
    parser = argparse.ArgumentParser(description="One part of the device check.")
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("result", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--subjects", nargs="*", default=(), help="Compare these cases alone.")
    given = parser.parse_args()
    make_xla_deterministic()
    setting = Setting(given.device, given.quick, given.fault, tuple(given.subjects))
    run_part(given.name, setting, given.result)


if __name__ == "__main__":
    main()
