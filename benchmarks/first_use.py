"""What a first use costs, in fresh processes: networks created, first prediction, first step, the
commands. Each against PyTorch's or plain XLA's counterpart, in turn.

    python benchmarks/first_use.py [--before WORKTREE] [--rounds 2] [--only WORD] [--quick]
        [--processor] [--json docs/first_use.json]

``--before`` measures another revision in the same run, as far as it has what a row needs;
``--json`` keeps the figures and writes the table of docs/performance.md. Figures are medians of
elapsed seconds, or with ``--processor`` of processor seconds, which a busy machine changes less."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # where it is loaded by its path
from first_use_sides import (
    JAX_CREATES,
    PREDICTION,
    PROCESS,
    QUICK,
    STEP,
    TORCH_CREATES,
    TORCH_PREDICTS,
    Side,
)

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- table first use -->", "<!-- end first use -->"


@dataclass(frozen=True)
class Case:
    """One row of the table: this library's side, and what it is compared with, if anything.

    Attributes:
      network, size, batch: A name of an architecture; pixels; images.
      cached: Whether the process finds the programs of an earlier one.
      units: ``"s"``, ``"MB"`` for the peak of memory, or both: one row each.
      bound: The largest ratio that the quick form may show.
    """

    what: str
    own: Side
    yardstick: str
    other: Side | None
    network: str = "resnet18"
    size: int = 224
    batch: int = 1
    cached: bool = False
    units: tuple[str, ...] = ("s",)
    bound: float = float("inf")


_CONVERT = "convert", "resnet50.pth", "converted", "--force"
_INSPECT, _VERIFY = ("inspect", "resnet50.pth"), ("verify", "resnet18.pth")
_PREDICT = "predict", "resnet50.pth", "pictures/class0/0.png", "pictures/class1/1.png"
_TRAIN = "train", "--data", "pictures", "--val-fraction", "0.2", "--epochs", "1", "--out", "run"
_XLA = "plain XLA"


def cases() -> list[Case]:
    """Every row of the table."""
    rows = [
        Case(f"create {name}", JAX_CREATES, "PyTorch", TORCH_CREATES, name)
        for name in ("resnet18_cifar", "resnet50")
    ]
    two = {"network": "resnet50", "batch": 2}
    predict, small = Side.command(*_PREDICT), {"size": 32, "batch": 32}
    for cached, found in ((False, ""), (True, ", programs cached")):
        firsts: list[tuple[str, tuple[Side, Side | None], str, dict[str, Any]]] = [
            ("first prediction, resnet50, 2 images", PREDICTION, _XLA, two),
            ("the same, quick=True", QUICK, _XLA, two),
            ("`predict`, two pictures", (predict, None), "", {}),
            ("first training step, resnet18", STEP, _XLA, small),
        ]
        rows += [
            Case(f"{what}{found}", own, yardstick, other, cached=cached, **numbers)
            for what, (own, other), yardstick, numbers in firsts
        ]
    without = Side.command(*_CONVERT, "--no-certificate")
    larger = Side.command(*_TRAIN, "--image-size", "224")
    reading = Side("", "import torch; torch.load('resnet50.pth', mmap=True)")
    convert, pictures = Side.command(*_CONVERT), Side.command(*_TRAIN)
    inspect, verify = (Side.command(*words) for words in (_INSPECT, _VERIFY))
    both = ("s", "MB")
    rows += [
        Case("`convert resnet50.pth out`", convert, "no certificate", without, units=both),
        Case("`inspect resnet50.pth`", inspect, "torch.load", reading),
        Case("`verify resnet18.pth`", verify, "", None, units=both),
        Case("`train`, 45 pictures of 40x40", pictures, "the same at 224x224", larger),
    ]
    for name in ("resnet18", "resnet50"):
        what, sides = f"memory of inference, {name}, batch 32", (PREDICTION[0], "PyTorch")
        rows.append(Case(what, *sides, TORCH_PREDICTS, name, batch=32, units=("MB",)))
    return rows


def quick_cases() -> list[Case]:
    """A few rows of a small network, for a test."""
    small: dict[str, Any] = {"network": "resnet20", "size": 32, "batch": 2}
    return [
        Case("first prediction", PREDICTION[0], _XLA, PREDICTION[1], **small, bound=8),
        Case("first prediction, quick=True", QUICK[0], _XLA, QUICK[1], **small, bound=6),
        Case("first training step", STEP[0], _XLA, STEP[1], **small, bound=8),
    ]


def prepared(folder: Path, networks: Sequence[str]) -> None:
    """Writes what the processes read: checkpoints, and 45 pictures in three classes."""
    import numpy as np
    import torch
    from PIL import Image

    from flax_resblock.config import architecture
    from flax_resblock.parity.reference import torch_reference

    for name in networks:
        torch.save(torch_reference(architecture(name)).state_dict(), folder / f"{name}.pth")
    rng = np.random.default_rng(0)
    for number in range(45):
        place = folder / "pictures" / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")


def measured(
    case: Case, side: Side, root: Path, folder: Path, delay: float = 0.0
) -> dict[str, float]:
    """Elapsed seconds (``"s"``), processor seconds and MB of one process; raises RuntimeError if it
    fails.

    Args:
      root: The worktree whose library it imports.
      folder: From :func:`prepared`; holds the cache, too.
      delay: Seconds that it sleeps while it is timed, for a test.
    """
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        kept = folder / f"cache{abs(hash(root))}"
        environment: Mapping[str, str] = {
            **os.environ,
            "PYTHONPATH": str(root),
            "FLAX_RESBLOCK_CACHE": str(kept if case.cached else empty),
            "JAX_COMPILATION_CACHE_DIR": str(kept if case.cached else empty),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        values = {"network": case.network, "size": case.size, "batch": case.batch, "delay": delay}
        code = PROCESS.format(prepare=side.prepare, work=side.work, **values)
        command = [sys.executable, "-P", "-c", code]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{case.what} failed: {run.stderr.strip()[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def rows_of(
    case: Case, folder: Path, rounds: int, before: Path | None = None, seconds: str = "s"
) -> list[dict[str, Any]]:
    """Medians of both sides, and the median of the ratios within a round: a row for each unit.

    ``before`` is a worktree of another revision; what it cannot run is left out.
    """
    sides = {"now": (case.own, ROOT)}
    if before is not None:
        sides["before"] = (case.own, before.resolve())
    if case.other is not None:
        sides["other"] = (case.other, ROOT)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(-1 if case.cached else 0, rounds):  # the first one fills the cache
        for name, (side, root) in list(sides.items()):
            try:
                values = measured(case, side, root, folder)
            except RuntimeError as error:
                if name != "before":
                    raise
                print(f"not in {root}: {str(error).splitlines()[-1]}", file=sys.stderr)
                del sides[name], found[name]
                continue
            if number >= 0:
                found[name].append(values)
    rows = []
    for place, unit in enumerate(case.units):
        figure = seconds if unit == "s" else unit
        times = {name: [one[figure] for one in values] for name, values in found.items()}
        what = "the same, peak memory" if place else case.what
        row: dict[str, Any] = {"what": what, "unit": figure, "yardstick": case.yardstick}
        row |= {name: statistics.median(values) for name, values in times.items()}
        if case.other is not None:
            pairs = zip(times["now"], times["other"], strict=True)
            row["ratio"] = statistics.median(now / other for now, other in pairs)
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""

    def shown(row: Mapping[str, Any], name: str) -> str:
        if name not in row:
            return ""
        if row["unit"] == "MB":
            return f"{row[name]:.0f} MB"
        return f"{row[name]:.2g} {'s' if row['unit'] == 's' else 'CPU s'}"

    lines = ["| what | before | now | yardstick | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        yardstick = f"{shown(row, 'other')}, {row['yardstick']}" if row["yardstick"] else ""
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        cells = row["what"], shown(row, "before"), shown(row, "now"), yardstick, ratio
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(document: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The document with the table of these rows."""
    start, _, rest = document.partition(BEGIN)
    end = rest.partition(END)[2]
    return f"{start}{BEGIN}\n\n{table(rows)}\n\n{END}{end}"


def main() -> None:
    """Measures, prints, and writes what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="a worktree of another revision")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--quick", action="store_true", help="a small network and few rows")
    parser.add_argument("--processor", action="store_true", help="processor seconds")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    chosen = [one for one in (quick_cases if given.quick else cases)() if given.only in one.what]
    with tempfile.TemporaryDirectory() as name:
        prepared(Path(name), ["resnet20"] if given.quick else ["resnet18", "resnet50"])
        seconds = "processor s" if given.processor else "s"
        rows = []
        for case in chosen:
            new = rows_of(case, Path(name), given.rounds, given.before, seconds)
            print(*table(new).splitlines()[2:], sep="\n", flush=True)
            rows += new
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(filled(document, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
