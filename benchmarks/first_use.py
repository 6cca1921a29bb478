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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- table first use -->", "<!-- end first use -->"

_PROCESS = """
import json, os, sys, time
import numpy as np
network, size, batch = {network!r}, {size}, {batch}
{prepare}
usage = None
start, before = time.perf_counter(), sum(os.times()[:4])
time.sleep({delay})
{work}
seconds, busy = time.perf_counter() - start, sum(os.times()[:4]) - before
# of this program alone: ru_maxrss begins with the peak of the process that started it
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
peak = int(peak) if usage is None else usage.ru_maxrss
print(json.dumps({{"s": seconds, "processor s": busy, "MB": peak / 1024}}))
"""
_JAX = """
import jax, jax.numpy as jnp, flax_resblock
from flax import nnx
images = np.random.default_rng(0).standard_normal((batch, size, size, 3)).astype(np.float32)
"""
_TORCH = """
import dataclasses, torch, torch_ref
from flax_resblock.config import architecture
images = torch.randn(batch, 3, size, size)
build = lambda: torch_ref.ResNet(**dataclasses.asdict(architecture(network)))
"""
_MODEL = "model = flax_resblock.load(network + '.pth')\n"
_OWN_PREDICTION = "np.asarray(flax_resblock.compile_inference(model, images)(images))"
_QUICK_PREDICTION = "np.asarray(flax_resblock.compile_inference(model, images, quick=True)(images))"
_PLAIN_PREDICTION = """
graphdef, state = nnx.split(model)
with flax_resblock.conv_lowering("xla"):
    np.asarray(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, images))
"""
_STEP = """
model.train()
graphdef, params, rest = nnx.split(model, nnx.Param, ...)
def loss(params, rest, x):
    network = nnx.merge(graphdef, params, rest, copy=True)
    return -jnp.mean(jax.nn.log_softmax(network(x))[:, 1]), nnx.state(network, nnx.Not(nnx.Param))
def step(params, rest, x):
    (value, rest), slope = jax.value_and_grad(loss, has_aux=True)(params, rest, x)
    return value, jax.tree.map(lambda p, g: p - 1e-3 * g, params, slope), rest
with flax_resblock.conv_lowering({lowering!r}):
    options = dict(flax_resblock.compiler_options())
    jax.block_until_ready(jax.jit(step, compiler_options=options)(params, rest, images))
"""
_OWN_STEP, _PLAIN_STEP = _STEP.format(lowering="auto"), _STEP.format(lowering="xla")
_CHANNELS_LAST = """
module = build().eval().to(memory_format=torch.channels_last)
images = images.to(memory_format=torch.channels_last)
"""
_TORCH_FORWARD = "with torch.inference_mode(): module(images)"
_COMMAND = """
import shutil, subprocess
shutil.rmtree("run", ignore_errors=True)  # train replaces none
command = [sys.executable, "-m", "flax_resblock", *{arguments!r}]
"""
_WAITING = """
process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
assert status == 0, command
"""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
      prepare: Code that runs before the clock.
      work: Code that is timed.
    """

    prepare: str
    work: str

    @classmethod
    def command(cls, *arguments: str) -> Side:
        """The whole of a command of ``flax-resblock``."""
        return cls(_COMMAND.format(arguments=arguments), _WAITING)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      what: For the reader.
      own: This library's side.
      yardstick: What it is compared with.
      other: That side; None where there is nothing to compare with.
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


_JAX_CREATES = Side(
    _JAX, "jax.block_until_ready(nnx.state(flax_resblock.create(network, rngs=nnx.Rngs(0))))"
)
PREDICTION = Side(_JAX + _MODEL, _OWN_PREDICTION), Side(_JAX + _MODEL, _PLAIN_PREDICTION)
QUICK = Side(_JAX + _MODEL, _QUICK_PREDICTION), PREDICTION[1]
STEP = Side(_JAX + _MODEL, _OWN_STEP), Side(_JAX + _MODEL, _PLAIN_STEP)
_CONVERT = "convert", "resnet50.pth", "converted", "--force"
_INSPECT, _VERIFY = ("inspect", "resnet50.pth"), ("verify", "resnet18.pth")
_PREDICT = "predict", "resnet50.pth", "pictures/class0/0.png", "pictures/class1/1.png"
_TRAIN = "train", "--data", "pictures", "--val-fraction", "0.2", "--epochs", "1", "--out", "run"
_XLA = "plain XLA"


def cases() -> list[Case]:
    """Every row of the table."""
    torch_predicts = Side(_TORCH + _CHANNELS_LAST, _TORCH_FORWARD)
    rows = [
        Case(f"create {name}", _JAX_CREATES, "PyTorch", Side(_TORCH, "build()"), name)
        for name in ("resnet18_cifar", "resnet50")
    ]
    pair: dict[str, Any] = {"network": "resnet50", "batch": 2}
    for cached in (False, True):
        found = ", programs cached" if cached else ""
        first = f"first prediction, resnet50, 2 images{found}"
        step = f"first training step, resnet18{found}"
        rows.append(Case(first, PREDICTION[0], _XLA, PREDICTION[1], cached=cached, **pair))
        rows.append(Case(f"the same, quick=True{found}", QUICK[0], _XLA, QUICK[1], **pair))
        rows[-1] = replace(rows[-1], cached=cached)
        command = Side.command(*_PREDICT)
        rows.append(Case(f"`predict`, two pictures{found}", command, "", None, cached=cached))
        rows.append(Case(step, STEP[0], _XLA, STEP[1], size=32, batch=32, cached=cached))
    without = Side.command(*_CONVERT, "--no-certificate")
    larger = Side.command(*_TRAIN, "--image-size", "224")
    reading = Side("", "import torch; torch.load('resnet50.pth', mmap=True)")
    convert, pictures = Side.command(*_CONVERT), Side.command(*_TRAIN)
    inspect, verify = (Side.command(*words) for words in (_INSPECT, _VERIFY))
    both, memory = ("s", "MB"), ("MB",)
    return [
        *rows,
        Case("`convert resnet50.pth out`", convert, "no certificate", without, units=both),
        Case("`inspect resnet50.pth`", inspect, "torch.load", reading),
        Case("`verify resnet18.pth`", verify, "", None, units=both),
        Case("`train`, 45 pictures of 40x40", pictures, "the same at 224x224", larger),
        *(
            Case(
                f"memory of inference, {name}, batch 32",
                *(PREDICTION[0], "PyTorch", torch_predicts),
                network=name,
                batch=32,
                units=memory,
            )
            for name in ("resnet18", "resnet50")
        ),
    ]


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
    """Elapsed seconds (``"s"``), processor seconds and MB of one process.

    Args:
      case: Gives network and images.
      side: What it runs.
      root: The worktree whose library it imports.
      folder: From :func:`prepared`; holds the cache, too.
      delay: Seconds that it sleeps while it is timed, for a test.
    Raises:
      RuntimeError: The process failed.
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
        code = _PROCESS.format(prepare=side.prepare, work=side.work, **values)
        command = [sys.executable, "-P", "-c", code]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{case.what} failed: {run.stderr.strip()[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def rows_of(
    case: Case, folder: Path, rounds: int, before: Path | None = None, seconds: str = "s"
) -> list[dict[str, Any]]:
    """Medians of both sides, and the median of the ratios within a round: a row for each unit.

    Args:
      case: What is measured.
      folder: From :func:`prepared`.
      rounds: How often.
      before: A worktree of another revision; what this cannot run is left out.
      seconds: ``"s"`` or ``"processor s"``.
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
    start, rest = document.split(BEGIN)
    _, end = rest.split(END)
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
