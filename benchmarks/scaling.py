"""Scaling on paper: FLOPs, bytes and roofs of resnet50 on TPU v5e, H100 and this CPU, and what data
parallelism costs; writes the tables of docs/scaling.md.

    python benchmarks/scaling.py [--figures docs/scaling.json] [--document docs/scaling.md]
    [--picture docs/scaling.png] [--again NAME...]

What the compilers say of a program, and what was measured here, goes into the file of figures at
once. What is there is not obtained again, so that tables and picture are redrawn in a second and a
run that was interrupted goes on; ``--again`` names what is, ``--again all`` everything. `make
compilers` installs the compilers of TPU and CUDA. All of it takes a quarter of an hour on two
cores, nearly all of it for the TPU's."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from roofs_here import best, copy_rate, decode_rate, peak_of_products
from scaling_picture import draw
from scaling_tables import NAME, PER_CHIP, SIZE, WHATS, fill

from flax_resblock.aot.compiler import COMPILERS, ENVIRONMENT, require_compiler
from flax_resblock.aot.hlo import Instruction, instructions, read_hlo
from flax_resblock.aot.outcome import MemoryUse
from flax_resblock.aot.request import request_for
from flax_resblock.bench.report import machine
from flax_resblock.config import architecture
from flax_resblock.errors import InputError

CHIPS = 8
STRICT: dict[str, Any] = {"dtype": "float32", "precision": "highest"}
NARROW: dict[str, Any] = {"dtype": "bfloat16", "precision": "default"}
TF32: dict[str, Any] = {"dtype": "float32", "precision": "default"}
ARITHMETIC = {"float32": STRICT, "bfloat16": NARROW, "TF32": TF32}

PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{device} {what} {arithmetic}": (
        target,
        {"what": what, "batch": PER_CHIP, **ARITHMETIC[arithmetic]},
    )
    for device, target, names in (
        ("v5e", "tpu:v5e:1x1", ("float32", "bfloat16")),
        ("h100", "cuda:h100", ("float32", "TF32", "bfloat16")),
        ("cpu", "cpu", ("float32", "bfloat16")),
    )
    for what in WHATS
    for arithmetic in names
} | {
    f"{device} x{CHIPS} {norm}": (
        target,
        {"what": "train-step", "batch": CHIPS * PER_CHIP, "batch_norm": norm, **NARROW},
    )
    for device, target in (("v5e", "tpu:v5e:2x4"), ("h100", f"cuda:h100:{CHIPS}"))
    for norm in ("global", "replica")
}
"""Every program that is compiled: its name, its target and the options of a
:class:`flax_resblock.aot.request.Request`."""

_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "opt-barrier"}
"""Operations that move nothing."""
_COPIES = {"copy-start": 0, "slice-start": 1}
"""Those that run beside other operations, and which array of their type is written."""
_ARRAY = re.compile(r"\b[a-z]+(\d+)[a-z0-9]*\[([0-9,]*)\](\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")


def _arrays(type_text: str) -> list[tuple[int, int]]:
    """Bytes of each array of a type, and those of them that lie outside the chip: all or, where the
    compiler placed it in on-chip memory, none."""
    found = []
    for bits, shape, layout in _ARRAY.findall(type_text):
        size = math.prod(int(length) for length in shape.split(",") if length) * int(bits) // 8
        found.append((size, 0 if _ON_CHIP.search(layout) else size))
    return found


def _moved(instruction: Instruction) -> int:
    """Bytes that an operation reads from and writes to the device's memory, every operand once and
    whole; copies to and from the chip as much as they copy."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    written = _arrays(instruction.type)
    operands = dict.fromkeys(instruction.operands)
    sources = [_arrays(instruction.types.get(name, "")) for name in operands]
    if instruction.opcode in _COPIES:  # their type repeats the operand; only a slice of it is read
        size, outside = written[_COPIES[instruction.opcode]]
        return outside + (size if sources[0][0][1] else 0)
    if instruction.opcode.endswith("-start"):
        written = written[:1]
    return sum(outside for arrays in (written, *sources) for _, outside in arrays)


def traffic(text: str) -> dict[str, int]:
    """Bytes that a compiled program moves between the device and its memory, those of operations
    with a convolution or product and those without.

    Args:
      text: Optimised HLO.
    """
    moved = {"products": 0, "others": 0}
    for instruction in instructions(text):
        if instruction.entry:
            product = re.search("conv_general_dilated|dot_general", instruction.scope)
            product = product and instruction.opcode != "copy"
            moved["products" if product else "others"] += _moved(instruction)
    return moved


def compile_one(name: str) -> dict[str, Any]:
    """What the compiler says of one of :data:`PROGRAMS`; in a process of its own, whose environment
    is the compilers'."""
    import jax

    from flax_resblock.aot.child import devices_of
    from flax_resblock.aot.program import lower

    target, options = PROGRAMS[name]
    on_cpu = target == "cpu"
    request = request_for(architecture(NAME), "tpu:v5e:1x1" if on_cpu else target, **options)
    devices = jax.devices("cpu")[:1] if on_cpu else devices_of(request.parsed_target, 1)
    lowered = lower(request, devices)
    begun = time.monotonic()
    compiled = lowered.compile()
    seconds, text = time.monotonic() - begun, compiled.as_text()
    program = read_hlo(text)
    names = {"flops": "flops", "bytes": "bytes accessed"}

    def said(cost: Any) -> dict[str, float] | None:
        return {key: cost[name] for key, name in names.items()} if cost else None

    return {
        "seconds": round(seconds, 1),
        "asked": said(lowered.cost_analysis()),
        "compiled": said(compiled.cost_analysis()),
        "memory": asdict(MemoryUse.of(compiled.memory_analysis())),
        "traffic": traffic(text),
        "cycles": program.cycles,
        "all_reduces": [one.bytes for one in program.collectives if one.kind == "all-reduce"],
        "others": sorted({one.kind for one in program.collectives} - {"all-reduce"}),
    }


def in_child(name: str) -> dict[str, Any]:
    """:func:`compile_one` in a process with the compilers' environment; ends this program where it
    fails."""
    folders = os.pathsep.join([str(Path(__file__).parents[1]), str(COMPILERS)])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": folders}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, __file__, "--compile", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{done.stderr.strip()}\ncompiling {name!r} ended with status {done.returncode}; "
            f"what the compiler said is above."
        )
    return json.loads(done.stdout.splitlines()[-1])


def step_seconds(what: str, batch: int) -> float:
    """Of one run of the program on this CPU as XLA lowers it, float32, with random values."""
    import jax

    from flax_resblock.aot.program import lower

    request = request_for(architecture(NAME), "tpu:v5e:1x1", what=what, batch=batch, **STRICT)
    lowered = lower(request, jax.devices("cpu")[:1])
    compiled, rng = lowered.compile(), np.random.default_rng(0)

    def values(leaf: Any) -> Any:  # positive, as a variance must be
        return np.abs(rng.normal(0, 0.05, leaf.shape)).astype(leaf.dtype)

    arguments = list(jax.tree.map(values, lowered.in_avals[0]))
    held = [jax.device_put(argument) for argument in arguments]

    def run() -> None:
        result = jax.block_until_ready(compiled(*held))
        if what == "train-step":  # its state is donated
            held[:3] = result[:3]

    return best(run, rounds=4)


def measure() -> dict[str, Any]:
    """The roofs of this machine, and what a program reaches below them."""
    threads, size, batch = os.cpu_count() or 1, 4096, 8
    products, by = peak_of_products(size)
    decode, jpeg = decode_rate(SIZE)
    steps = {what: step_seconds(what, batch) for what in WHATS}
    found = {"size": size, "products": products, "by": by, "copy": copy_rate(threads)}
    return found | {"decode": decode, "jpeg": jpeg, "steps": steps, "steps_batch": batch}


def describe() -> dict[str, Any]:
    """The machine, in numbers and words."""
    found = machine()
    of = found["versions"]
    versions = f"Python {found['python']}, jax {of['jax']}, numpy {of['numpy']}"
    here = {"name": found["cpu"], "cores": found["cores"], "memory": found["memory_bytes"]}
    return here | {"versions": versions}


def main() -> None:
    """Obtains what is missing, then writes tables and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--figures", type=Path, default=Path("docs/scaling.json"))
    parser.add_argument("--document", type=Path, default=Path("docs/scaling.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/scaling.png"))
    parser.add_argument(
        "--again",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=[*PROGRAMS, "measured", "all"],
        help="obtain these figures anew",
    )
    parser.add_argument("--compile", choices=PROGRAMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        print(json.dumps(compile_one(options.compile)), flush=True)
        os._exit(0)  # the compilers' threads need no farewell
    if not options.document.exists():
        parser.error(
            f"{options.document} does not exist; the tables are written into a document that "
            f"has <!-- table NAME --> lines."
        )
    figures: dict[str, Any] = {"programs": {}}
    try:
        if options.figures.exists():
            figures = json.loads(options.figures.read_text(encoding="utf-8"))
    except ValueError as error:
        parser.error(
            f"{options.figures} is no JSON ({error}); remove it to obtain all figures anew."
        )

    def keep() -> None:  # whole or not at all: an interrupt may come at any moment
        part = options.figures.with_suffix(".part")
        part.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        part.replace(options.figures)

    again = set(PROGRAMS) | {"measured"} if "all" in options.again else set(options.again)
    if "measured" in again or "measured" not in figures:
        print("measuring this machine", file=sys.stderr, flush=True)
        figures["machine"], figures["measured"] = describe(), measure()
        keep()
    for name, (target, _) in PROGRAMS.items():
        if name in again or name not in figures["programs"]:
            if target != "cpu":
                try:
                    require_compiler(target.split(":")[0])
                except InputError as error:
                    raise SystemExit(str(error)) from error
            print(f"compiling {name}", file=sys.stderr, flush=True)
            figures["programs"][name] = in_child(name)
            keep()
    filled = fill(options.document.read_text(encoding="utf-8"), figures)
    options.document.write_text(filled, encoding="utf-8")
    draw(figures, options.picture)
    print(f"wrote {options.document} and {options.picture}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; run it again to go on with the next figure", file=sys.stderr)
        sys.exit(130)
