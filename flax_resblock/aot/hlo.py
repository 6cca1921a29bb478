"""Reads the text of optimised HLO, as ``compiled.as_text()`` prints it, without jax."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

NARROW = ("bf16", "f16", "f8")
"""Beginnings of the names of floating types narrower than float32."""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send", "recv")
COLLECTIVES += ("collective-permute", "collective-broadcast")
"""Operations that move values between devices; ``-start`` is counted for them, ``-done`` is not."""

_BITS = {"pred": 8, "token": 0}
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_SLOT = re.compile(r"slot=([\w.]+)")  # see flax_resblock.nn.scopes
_SCOPE = re.compile(r'op_name="([^"]*)"')
# further operands of cuDNN's fused convolutions are added, not multiplied
_PRECISION = re.compile(r"operand_precision=\{(\w+),(\w+)[,}]")
_GEMM_PRECISION = re.compile(r'"operand_precision":\["(\w+)","(\w+)"')
_ALGORITHM = re.compile(r"\balgorithm=(\w+)")
_CALL_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclass(frozen=True)
class Product:
    """One convolution or matrix product.

    Attributes:
      slot: Its layer, ``"stage1.0.conv1"``; ``""`` if the metadata names none.
      direction: ``"forward"``, or ``"backward"`` for a gradient.
      kind: ``"convolution"`` or ``"product"``, as the model asked for it.
      precision: Of the two operands, ``("highest", "highest")``.
      operands: Types of the two operands, ``("f32", "f32")``.
    """

    slot: str
    direction: Literal["forward", "backward"]
    kind: Literal["convolution", "product"]
    precision: tuple[str, str]
    operands: tuple[str, str]


@dataclass(frozen=True)
class Collective:
    """One operation between devices.

    Attributes:
      kind: ``"all-reduce"`` ...
      shapes: Of the values that each device contributes or receives.
      bytes: Of these values, per device.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    slot: str


@dataclass(frozen=True)
class Narrow:
    """So many values of one floating type narrower than float32, ``"bf16"``, at one slot."""

    dtype: str
    slot: str
    count: int


@dataclass(frozen=True)
class CompiledProgram:
    """A compiled program: every convolution and product, every operation between devices, and the
    values narrower than float32.

    Attributes:
      cycles: The compiler's own estimate, summed over the program; 0 if it makes none (CUDA). It
        compares two programs; it does not predict time.
    """

    products: tuple[Product, ...]
    collectives: tuple[Collective, ...]
    narrow: tuple[Narrow, ...]
    cycles: int


@dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      type: Of its value, with its memory layout: ``"f32[64]{0:T(128)S(1)}"``, or several in
        parentheses.
      opcode: ``"fusion"`` ...
      operands: Names of the values that it takes.
      entry: Whether it belongs to the computation that is run, and not to one that is called from
        there.
      types: Of the values of the same computation, by name.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    entry: bool
    types: dict[str, str]

    @property
    def scope(self) -> str:
        """``op_name`` of its metadata: the operation's name in the traced program, with the slot
        of its layer."""
        found = _SCOPE.search(self.text)
        return found[1] if found else ""


def slot_of(scope: str) -> str:
    """The innermost slot in an operation's scope (``op_name`` of its metadata); ``""`` for an
    operation between the layers."""
    found = _SLOT.findall(scope)
    return found[-1] if found else ""


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction of optimised HLO, in order."""
    types: dict[str, str] = {}
    entry = False
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            types, entry = {}, begins["entry"] is not None
            continue
        found = _INSTRUCTION.match(line)
        if found:
            types[found["name"]] = found["type"]
            operands = tuple(_OPERAND.findall(found["rest"].split("), ")[0]))
            name, kind, opcode = found["name"], found["type"], found["opcode"]
            yield Instruction(name, kind, opcode, operands, line, entry, types)


def _arrays(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (kind, tuple(int(size) for size in shape.split(",") if size))
        for kind, shape in _ARRAY.findall(type_text)
    ]


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    digits = re.search(r"\d+", kind)
    bits = _BITS[kind] if kind in _BITS else int(digits[0]) if digits else 0
    return math.prod(shape) * bits // 8


def _is_product(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        target = _CALL_TARGET.search(instruction.text)
        return target is not None and target[1].startswith(("__cudnn$conv", "__cublas"))
    return instruction.opcode in ("convolution", "dot")


def _precision(text: str) -> tuple[str, str]:
    algorithm = _ALGORITHM.search(text)
    if algorithm:
        return (algorithm[1], algorithm[1])
    found = _PRECISION.search(text) or _GEMM_PRECISION.search(text)
    return (found[1].lower(), found[2].lower()) if found else ("default", "default")


def _product(instruction: Instruction) -> Product:
    scope = instruction.scope
    kinds = [_arrays(instruction.types.get(name, ""))[:1] for name in instruction.operands[:2]]
    operands = [found[0][0] if found else "" for found in kinds] + ["", ""]
    matrix = instruction.opcode == "dot" or "cublas" in instruction.text or "dot_general" in scope
    direction = "backward" if "transpose(jvp" in scope else "forward"
    kind = "product" if matrix else "convolution"
    precision = _precision(instruction.text)
    return Product(slot_of(scope), direction, kind, precision, (operands[0], operands[1]))


def _collective(instruction: Instruction) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # The operands and not the result: that of a -start holds operands and results both.
    types = [instruction.types.get(name, "") for name in instruction.operands]
    found = [array for kind in types for array in _arrays(kind)]
    size = sum(_bytes(*array) for array in found)
    return Collective(kind, tuple(shape for _, shape in found), size, slot_of(instruction.scope))


def read_hlo(text: str) -> CompiledProgram:
    """Reads one compiled program: optimised HLO with metadata; raises ValueError if it is none."""
    products, collectives, cycles = [], [], 0
    narrow: Counter[tuple[str, str]] = Counter()
    count = 0
    for count, instruction in enumerate(instructions(text), start=1):  # noqa: B007
        if _is_product(instruction):
            products.append(_product(instruction))
        collective = _collective(instruction)
        if collective is not None:
            collectives.append(collective)
        for kind in {kind for kind, _ in _arrays(instruction.type) if kind.startswith(NARROW)}:
            narrow[kind, slot_of(instruction.scope)] += 1
        if instruction.entry:
            cycles += sum(map(int, _CYCLES.findall(instruction.text)[:1]))
    if not count:
        raise ValueError("this is no HLO: it contains no instruction.")
    narrow_values = tuple(Narrow(*key, number) for key, number in narrow.items())
    return CompiledProgram(tuple(products), tuple(collectives), narrow_values, cycles)
