"""The result of a compilation, and whether its precision is what the request asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from flax_resblock.aot.hlo import CompiledProgram, Product
from flax_resblock.aot.request import Request
from flax_resblock.aot.targets import ARITHMETIC

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([0-9.]+)([KMGT]?)"
_REFUSALS = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm", re.IGNORECASE),
)
"""libtpu's messages for a program that needs more memory than there is."""


def bytes_needed(refusal: str) -> tuple[int, int] | None:
    """The bytes that a program needs and those that there are, from a compiler's refusal; None if
    it refused for another reason."""
    for pattern in _REFUSALS:
        found = pattern.search(refusal)
        if found:
            needed, there = found[1], found[3]
            return int(float(needed) * _UNITS[found[2]]), int(float(there) * _UNITS[found[4]])
    return None


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on each device.

    Attributes:
      arguments: Parameters, optimizer state, images.
      outputs: Results; ``aliased`` of these bytes take the place of arguments.
      temporaries: Activations and other values that live only during the run.
      code: The program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @classmethod
    def of(cls, stats: Any) -> MemoryUse:
        """From jax's ``CompiledMemoryStats``."""
        return cls(
            stats.argument_size_in_bytes,
            stats.output_size_in_bytes,
            stats.alias_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One program, compiled or refused for its size.

    Attributes:
      device_kind: As jax names it, ``"TPU v5 lite"``.
      capacity: Bytes on each device.
      memory: None if the compiler refused.
      needed: Bytes on each device.
      program: None if the compiler refused.
    """

    devices: int
    device_kind: str
    capacity: int
    seconds: float
    memory: MemoryUse | None
    needed: int
    program: CompiledProgram | None

    @property
    def fits(self) -> bool:
        """Whether the program runs in the devices' memory."""
        return self.program is not None and self.needed <= self.capacity


@dataclass(frozen=True)
class Finding:
    """A product or values whose precision is not what the request asked for."""

    slot: str
    sentence: str


def computed_in(platform: str, product: Product) -> str:
    """The arithmetic of a product: ``"float32"``, ``"TF32"``, ``"bfloat16"``; the operands' type if
    that is narrower."""
    kind = product.operands[0]
    if kind != "f32":
        return {"bf16": "bfloat16", "f16": "float16"}.get(kind, kind)
    return ARITHMETIC[platform, product.kind].get(product.precision[0], product.precision[0])


def findings(request: Request, program: CompiledProgram) -> list[Finding]:
    """The precision certificate: everything that differs from the request; empty if it holds.

    It holds if both operands of every convolution and product have the precision that the request
    asks for at their slot, if no value has a narrower type where the request asks for float32 at
    ``"highest"`` everywhere, and if there is at least one convolution or product."""
    platform = request.parsed_target.platform
    found = []
    for product in program.products:
        asked = request.precision_of(product.slot)
        if product.precision != (asked, asked):
            place, real = product.slot or "a product without a slot", computed_in(platform, product)
            words = (
                f"{place}: the {product.direction} {product.kind} has precision "
                f"{{{','.join(product.precision)}}}, asked for was {asked}; it runs in {real}"
            )
            found.append(Finding(product.slot, words))
    everywhere = {request.precision, *(precision for _, precision in request.slot_precision)}
    if request.dtype == "float32" and everywhere == {"highest"}:
        for one in program.narrow:
            place = one.slot or "between the layers"
            found.append(Finding(one.slot, f"{place}: {one.count} values of type {one.dtype}"))
    if not program.products:
        found.append(Finding("", "the program has no convolution and no product at all"))
    return found
