"""Expressions of the emitted code, and the values that they compute."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flax_resblock.port.axes import Order, Shape

ATOM, PRODUCT, SUM, ANY = 3, 2, 1, 0
"""How tightly an expression binds: a name or call, ``a * b``, ``a + b``, anything else."""

BATCH = 1_000_003
"""Stands for the size of the batch: a prime, so that no product of other sizes is mistaken for it.
"""


@dataclass(frozen=True)
class Constant:
    """A number in the code of one instance, which may differ in another instance of its class.

    Attributes:
      value: Anything whose ``repr`` is code.
      hint: A name for it, should it become an argument of the class.
    """

    value: Any
    hint: str


@dataclass
class Code:
    """A piece of code with holes.

    Attributes:
      text: With ``{}`` for every hole; ``{2}`` is a hole for what binds at least so tightly.
      holes: Values and constants, in order.
      binding: How tightly the whole binds.
    """

    text: str
    holes: tuple[Any, ...] = ()
    binding: int = ATOM


@dataclass(eq=False)
class Value:
    """A tensor in the emitted code.

    Attributes:
      code: What computes it.
      shape: As PyTorch has it, with :data:`BATCH` for the batch.
      order: Of our array's axes; see :mod:`flax_resblock.port.axes`.
      hint: A name for it: what makes it.
      where: File, line and text of the user's code.
      expanded: The shape that PyTorch broadcast it to; None if it was not.
      uses: How often other code needs it.
      name: The variable that holds it; None if it is written where it is used.
      plain: Whether that variable may be given another value.
      assigned: Whether it will have a name.
      depth: Calls that are written inside one another to compute it.
      items: What it is made of, if it is several tensors.
      reshaped: The value of which its array is a reshape; None if it is none.
    """

    code: Code
    shape: Shape
    order: Order
    hint: str
    where: str = ""
    expanded: Shape | None = None
    uses: int = 0
    name: str | None = None
    plain: bool = False
    assigned: bool = False
    depth: int = 0
    items: list[Any] | None = None
    reshaped: Value | None = None

    @property
    def sizes(self) -> Shape:
        """The shape of our array."""
        return tuple(self.shape[axis] for axis in self.order)


SAME = f"{{{ATOM}}}"
"""The code of a value that is the same array as another one."""

_HOLE = re.compile(r"\{(\d?)\}")


@dataclass
class Writer:
    """Turns values into text, and collects the constants that the text holds."""

    constants: list[Constant] = field(default_factory=list)

    def text(self, code: Code) -> str:
        """The code with its holes filled; a constant becomes ``\\x01INDEX\\x02``."""
        holes = iter(code.holes)

        def fill(match: re.Match[str]) -> str:
            hole, least = next(holes), int(match[1] or ANY)
            if isinstance(hole, Constant):
                self.constants.append(hole)
                return f"\x01{len(self.constants) - 1}\x02"
            if isinstance(hole, Value) and (hole.assigned or hole.name is not None):
                return hole.name or hole.hint
            inner = hole.code if isinstance(hole, Value) else hole
            written = self.text(inner)
            return f"({written})" if inner.binding < least else written

        return _HOLE.sub(fill, code.text)


def needed_values(code: Code) -> Sequence[Value]:
    """The values that a piece of code needs, in order, with those of code inside its holes."""
    found: list[Value] = []
    for hole in code.holes:
        if isinstance(hole, Value):
            found.append(hole)
        elif isinstance(hole, Code):
            found += needed_values(hole)
    return found


def source(hole: Any) -> Any:
    """The value whose array a value is; PyTorch may see it in another shape."""
    while isinstance(hole, Value) and hole.name is None and hole.code.text == SAME:
        hole = hole.code.holes[0]
    return hole
